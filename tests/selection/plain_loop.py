"""Any training step under the Trainer, and once more in a plain loop that cuts the last layers' rows by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import Selection, select_batch
from tests.core.entries.gating import Cuts, whole
from tests.helpers.training import quiet_trainer

B = 8


@dataclass(frozen=True)
class Zoo:
    """A module's parts and its training step.

    Args:
        parts: Makes the parts, which become the module's attributes.
        step: ``(module, batch, batch_idx)``; it cuts by ``module.cut``.
        data: Makes a dataset, or a list of batches.
        optimizers: ``module -> optimizer or list of them``.
        manual: Whether the step runs its own backward.
        collate: Of the DataLoader.
        size: The batch size.
        epochs: How long it is trained.
    """

    parts: Callable[[], dict[str, nn.Module | Tensor]]
    step: Callable[[Any, Any, int], Tensor | None]
    data: Callable[[], Any]
    optimizers: Callable[[Any], Any] = lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    manual: bool = False
    collate: Callable[[Any], Any] | None = None
    size: int = B
    epochs: int = 1


class Module(pl.LightningModule):
    """What a user writes."""

    def __init__(self, zoo: Zoo) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.zoo = zoo
        self.automatic_optimization = not zoo.manual
        self.cut: Callable[..., Tensor] = whole
        for name, part in zoo.parts().items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        torch.manual_seed(batch_idx)  # of what the step draws
        return self.zoo.step(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.zoo.optimizers(self)


class Record(pl.Callback):
    """Keeps the batches and what was selected from them."""

    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection = selection
        self.steps: list[tuple[int, Any, Selection | None]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((batch_idx, copy.deepcopy(batch), self.selection.last_selection))


@dataclass
class Run:
    """A run that is over."""

    module: Module
    selection: SparseSelectionCallback
    steps: list[tuple[int, Any, Selection | None]] = field(default_factory=list)


def train(zoo: Zoo, mode: str, **options: Any) -> Run:
    """Train under the Trainer, in float64; in ``prune`` the first of two epochs is a dense one."""
    pruned = mode == "prune"
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.5, count_flops=False, **options)  # type: ignore[arg-type]
    record = Record(selection)
    stages = TwoStageScheduler(warmup_epochs=1 if pruned else 0)
    trainer = quiet_trainer(max_epochs=zoo.epochs + pruned, callbacks=[selection, stages, record], precision="64-true")
    module = Module(zoo)
    trainer.fit(module, DataLoader(zoo.data(), batch_size=zoo.size, collate_fn=zoo.collate))
    return Run(module, selection, record.steps)


def by_hand(zoo: Zoo, mode: str, steps: list[tuple[int, Any, Selection | None]]) -> Module:
    """Train on the same selections without the package."""
    module = Module(zoo).double()
    with _float64():
        made = module.configure_optimizers()
        optimizers = made if isinstance(made, list) else [made]
        _without_trainer(module, optimizers)
        for batch_idx, batch, selection in steps:
            assert selection is not None
            rows, factors = _kept(selection, _size(zoo, batch), mode)
            shown = select_batch(batch, rows, batch_size=_size(zoo, batch)) if mode == "subset" else batch
            module.cut = Cuts(factors)
            if zoo.manual:
                module.training_step(shown, batch_idx)
            else:
                optimizers[0].step(lambda shown=shown, batch_idx=batch_idx: _closure(module, shown, batch_idx))
    return module


def check(zoo: Zoo, mode: str, tolerance: float = 1e-8, **options: Any) -> Run:
    """Train both ways; the parameters must be the same."""
    run = train(zoo, mode, **options)
    assert run.selection.savings["samples"] > 0.1
    other = by_hand(zoo, mode, run.steps)
    start = dict(Module(zoo).double().named_parameters())
    moved = False
    for (name, left), right in zip(run.module.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
        moved = moved or not torch.equal(left, start[name])
    assert moved
    return run


def _kept(selection: Selection, size: int, mode: str) -> tuple[Tensor, Tensor]:
    indices = selection.indices
    weights = torch.ones(len(indices)) if selection.weights is None else selection.weights.double()
    if mode == "subset":
        return indices, weights * len(indices) / weights.sum()
    factors = torch.zeros(size)
    factors[indices] = weights * size / weights.sum()
    return indices, factors


def _size(zoo: Zoo, batch: Any) -> int:
    """Count the samples of these tests' batches: a list of samples, or tensors whose last one has a row a sample."""
    if isinstance(batch, dict):
        batch = batch["y"]
    if isinstance(batch, (list, tuple)):
        batch = batch[-1]
    return len(batch)


def _closure(module: Module, batch: Any, batch_idx: int) -> Tensor:
    for parameter in module.parameters():
        parameter.grad = None
    loss = module.training_step(batch, batch_idx)
    assert loss is not None
    loss.backward()
    return loss


def _without_trainer(module: Module, optimizers: list[Any]) -> None:
    stubs = {
        "log": lambda *_, **__: None,
        "optimizers": lambda: optimizers if len(optimizers) > 1 else optimizers[0],
        "manual_backward": lambda loss, **options: loss.backward(**options),
    }
    for name, stub in stubs.items():
        object.__setattr__(module, name, stub)


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
