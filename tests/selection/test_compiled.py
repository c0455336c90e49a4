"""torch.compile of the LightningModule, of its step and of its network: what trains, how often it compiles, what not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import EntryError
from tests.helpers.data import Digits, loader
from tests.helpers.logs import warned
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import assert_close_weights, quiet_trainer, weights

BACKEND = "aot_eager"
SLOW = pytest.mark.slow


def whole(module: pl.LightningModule, backend: Any) -> Any:
    """Compile the LightningModule: its step, its loss and its network are one function."""
    return torch.compile(module, backend=backend)


def in_place(module: pl.LightningModule, backend: Any) -> Any:
    """Compile what ``self(x)`` runs."""
    module.compile(backend=backend)
    return module


def step_alone(module: pl.LightningModule, backend: Any) -> Any:
    """Compile the training step alone."""
    module.training_step = torch.compile(module.training_step, backend=backend)  # type: ignore[method-assign]
    return module


def network(module: Any, backend: Any) -> Any:
    """Compile the network inside."""
    module.net = torch.compile(module.net, backend=backend)
    return module


def trained(
    digits: Digits,
    mode: str,
    compiled: Callable[[pl.LightningModule, Any], Any] = lambda module, _: module,
    *,
    backend: Any = BACKEND,
    kind: type[pl.LightningModule] = PlainNet,
    epochs: int = 3,
    **options: Any,
) -> tuple[pl.LightningModule, SparseSelectionCallback]:
    """Train a network without dropout, one epoch of it dense."""
    torch.manual_seed(0)
    module: Any = fresh(kind, dropout=0.0, batchnorm=False)
    data = loader((digits[0][:64], digits[1][:64]), batch_size=16)
    callback = SparseSelectionCallback(mode=mode, target_activation_rate=0.5, **options)  # type: ignore[arg-type]
    trainer = quiet_trainer(callbacks=[callback, TwoStageScheduler(warmup_epochs=1)], max_epochs=epochs)
    with warned():
        trainer.fit(compiled(module, backend), data)
    return module, callback


@pytest.mark.parametrize("compiled", [whole, *(pytest.param(each, marks=SLOW) for each in (in_place, step_alone))])
@pytest.mark.parametrize("mode", ["prune", *(pytest.param(each, marks=SLOW) for each in ("subset", "mask", "partial"))])
def test_what_is_compiled_trains_as_what_is_not(mode: str, compiled: Any, digits: Digits) -> None:
    plain, ours = trained(digits, mode), trained(digits, mode, compiled)
    assert_close_weights(dict(zip(weights(plain[0]), weights(ours[0]).values(), strict=True)), weights(plain[0]))
    assert ours[1].ledger.selected == plain[1].ledger.selected < plain[1].ledger.offered


def test_the_module_is_compiled_as_before_behind_the_fit(digits: Digits) -> None:
    module: Any = fresh(PlainNet)
    compiled = torch.compile(module, backend="eager")
    trainer = quiet_trainer(callbacks=[SparseSelectionCallback(mode="mask")], max_steps=1)
    trainer.fit(compiled, loader(digits, batch_size=16))
    assert hasattr(module.training_step, "get_compiler_config"), "Lightning's own, for a fit without selection"
    assert all(each._compiled_call_impl is None for each in module.modules())


@SLOW
def test_a_step_that_is_decorated_in_its_class(digits: Digits) -> None:
    class Decorated(PlainNet):
        training_step = torch.compile(PlainNet.training_step, backend="eager")  # type: ignore[assignment]

    plain, ours = trained(digits, "prune"), trained(digits, "prune", kind=Decorated)
    assert_close_weights(weights(ours[0]), weights(plain[0]))


@pytest.mark.parametrize("compiled", [network, pytest.param(whole, marks=SLOW)])
def test_a_fixed_number_of_rows_is_compiled_once(compiled: Any, digits: Digits) -> None:
    """With static shapes a new size is a new graph: the dense batch, the scoring pass and the selected rows make 3."""
    counted = CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
        _, callback = trained(digits, "subset", compiled, backend=counted, gate="topk", epochs=6)
    assert counted.frame_count == 3
    sparse = callback.ledger.stages["sparse"]
    assert (sparse.selected, sparse.offered) == (5 * 4 * 8, 5 * 4 * 16)


@SLOW
def test_a_number_of_rows_that_differs_is_compiled_once_too(digits: Digits) -> None:
    """The soft gate keeps a sample more or less: torch makes the size of a batch a variable, which it is by default."""
    counted = CompileCounterWithBackend("eager")
    trained(digits, "subset", network, backend=counted, epochs=12)
    assert counted.frame_count <= 4


@SLOW
def test_the_scoring_pass_runs_compiled(digits: Digits) -> None:
    sizes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            sizes.append(next(arg.shape[0] for arg in args if isinstance(arg, Tensor) and arg.shape[1:] == (1, 8, 8)))
            return graph(*args)

        return run

    trained(digits, "subset", network, backend=backend, gate="topk")
    assert sizes.count(16) >= 3 + 7, "dense batches behind the first, and a scoring pass for each sparse one"
    assert sizes.count(8) == 8


@SLOW
def test_inductor(digits: Digits) -> None:
    plain, ours = trained(digits, "prune"), trained(digits, "prune", whole, backend="inductor")
    assert_close_weights(weights(ours[0]), weights(plain[0]), rtol=1e-4)


class LossInside(PlainNet):
    """A network whose ``forward`` returns the loss, as those of transformers do."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        out: Tensor = self.net(x)
        return out if y is None else F.cross_entropy(out, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(*batch)


@pytest.mark.parametrize("mode", ["prune", *(pytest.param(each, marks=SLOW) for each in ("subset", "mask", "partial"))])
def test_a_loss_that_is_compiled_with_the_network_is_refused(mode: str, digits: Digits) -> None:
    trained(digits, mode, kind=LossInside)
    with pytest.raises(EntryError, match="Compile the network alone"):
        trained(digits, mode, in_place, kind=LossInside)


@SLOW
def test_parts_of_a_list_are_compiled_each(digits: Digits) -> None:
    class Listed(PlainNet):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.net = nn.ModuleList([self.net])  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            for each in self.net:
                x = each(x)
            return x

    counted = CompileCounterWithBackend("eager")
    trained(digits, "prune", whole, backend=counted, kind=Listed)
    assert counted.frame_count >= 1
