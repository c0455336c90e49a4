"""Counting FLOPs changes nothing: the run is bitwise what it is without, whatever the training step does."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import BackwardFlops
from tests.helpers.training import BATCH_MODES, MODES, assert_same_weights, quiet_trainer, weights
from tests.selection.differentiating import BATCH, BATCHES, MODULES, Step, data, fresh

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's forward AD


def by_first_feature(losses: Tensor, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """A significance that a loop by hand can compute as well."""
    return inputs[:, 0].abs()


class AfterOneEpoch(pl.Callback):
    """Keeps the weights and what was spent."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.weights, self.flops = weights(pl_module), trainer.callbacks[0].ledger.spent_flops()


def train(name: str, *extra: pl.Callback, warmup: int = 0, **options: Any) -> tuple[Step, SparseSelectionCallback]:
    """One epoch, and a dense one before it if there is to be a warmup."""
    module = fresh(name)
    callback = SparseSelectionCallback(
        target_activation_rate=0.5, gate="topk", significance=by_first_feature, **options
    )
    chain = [callback, TwoStageScheduler(warmup_epochs=warmup), *extra]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lightning-ast: in mode='partial' these backward operations")
        warnings.filterwarnings("ignore", "lightning-ast: mode=")
        quiet_trainer(max_epochs=1 + warmup, callbacks=chain).fit(module, data())
    return module, callback


def by_hand(name: str, *, rate: float) -> Step:
    """Every step on the samples with the largest first feature, in plain torch."""
    module = fresh(name)
    optimizer = module.configure_optimizers()
    for batch in data():
        kept = batch[0][:, 0].abs().topk(round(rate * BATCH)).indices
        optimizer.zero_grad()
        module.by_hand(batch)[kept].mean().backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODULES)
def test_a_run_is_the_same_with_and_without(name: str, mode: str) -> None:
    warmup = int(mode == "prune")
    counted, on = train(name, mode=mode, warmup=warmup)
    plain, off = train(name, mode=mode, warmup=warmup, count_flops=False)
    assert_same_weights(weights(counted), weights(plain))
    assert on.ledger.flops is not None
    assert on.savings["flops"] is not None
    assert off.ledger.flops is None
    assert off.savings["flops"] is None
    assert off.savings["samples"] == on.savings["samples"]


@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("Jagged", "Distilled")])
def test_a_sparse_run_is_the_loop_by_hand(name: str, mode: str) -> None:
    """(Jagged's samples differ by their place in the batch, and the teacher draws for those it sees.)"""
    module, _ = train(name, mode=mode)
    for key, want in weights(by_hand(name, rate=0.5)).items():
        torch.testing.assert_close(weights(module)[key], want, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", MODULES)
def test_a_warmup_is_the_loop_by_hand(name: str) -> None:
    """Bitwise where the loss is torch's own mean; what it costs is what plain steps cost."""
    after = AfterOneEpoch()
    train(name, after, warmup=1, mode="mask")
    hand = fresh(name)
    optimizer = hand.configure_optimizers()
    with Formulas() as formulas:
        for batch_idx, batch in enumerate(data()):
            optimizer.zero_grad()
            hand.training_step(batch, batch_idx).backward()
            optimizer.step()
    assert_same_weights(after.weights, weights(hand))
    if name not in ("Jagged", "Subclassed", "Distilled"):  # whose ops the plain counter below does not see
        assert after.flops == pytest.approx(formulas.total)


class Formulas(TorchDispatchMode):
    """Torch's formulas, applied to what comes along."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=result)
        return result


def test_jagged_and_inference_ops_are_counted() -> None:
    _, callback = train("Jagged", warmup=1)
    tokens = sum(1 + i % 4 for i in range(BATCH))
    layers = 2 * tokens * 4 * 4 + 2 * BATCH * (4 * 8 + 8 * 3)
    assert callback.ledger.flops.forward == pytest.approx(layers / BATCH)
    assert callback.ledger.flops.backward == pytest.approx(2 * layers / BATCH)
    _, callback = train("Distilled", warmup=1)
    assert callback.ledger.flops.forward == 2 * (4 * 8 + 8 * 3 + 4 * 8), "the student, and a layer in inference mode"
    _, callback = train("Subclassed", warmup=1)
    assert callback.ledger.flops.forward == 2 * (4 * 8 + 8 * 3 + 4 * 4)


@pytest.mark.parametrize("mode", ["warmup", *MODES])
def test_a_formula_that_fails_is_warned_of_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*shapes: Any, **options: Any) -> int:
        raise ZeroDivisionError("no such shape")

    options: dict[str, Any] = {"mode": "mask", "warmup": 1} if mode == "warmup" else {"mode": mode}
    options |= {"warmup": 1} if mode == "prune" else {}
    plain, _ = train("Custom", count_flops=False, **options)
    monkeypatch.setitem(flop_registry, torch.ops.aten.addmm, broken)
    with pytest.warns(UserWarning, match="FLOPs are not counted.*aten.addmm.*no such shape.*count_flops") as said:
        module, callback = train("Custom", **options)
    assert sum("FLOPs are not counted" in str(w.message) for w in said) == 1
    assert callback.savings["flops"] is None
    assert_same_weights(weights(plain), weights(module))


class Skips(MODULES["Custom"]):
    """Returns None for the first batch, as steps do that cannot use one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 0 and self.trainer.current_epoch == 0 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.", "ignore:lightning-ast. NaN or infinity")
@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.parametrize("first", ["skipped", "not finite"])
def test_a_first_batch_that_nothing_is_trained_on_is_not_the_measure(
    mode: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = train("Custom", mode=mode)
    if first == "skipped":
        monkeypatch.setitem(MODULES, "Custom", Skips)
    else:
        images = data().dataset.tensors[0]
        images[:BATCH] = torch.nan
        spoilt = DataLoader(TensorDataset(images, data().dataset.tensors[1]), batch_size=BATCH)
        monkeypatch.setattr("tests.selection.test_counting.data", lambda: spoilt)
    _, callback = train("Custom", mode=mode, quarantine_limit=1.0)
    assert callback.ledger.flops == whole.ledger.flops


@pytest.mark.parametrize("mode", ["subset", "partial"])
def test_a_counter_of_the_users_sees_the_same(mode: str) -> None:
    counts = []
    for count_flops in (True, False):
        with FlopCounterMode(display=False) as counter:
            train("Custom", mode=mode, count_flops=count_flops)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_an_op_without_tensors_is_not_taken_apart() -> None:
    """Such as the marks for torch's profiler that an optimizer sets, which are composed ops in torch 2.6."""
    library = torch.library.Library("marks", "DEF")
    library.define("mark(str name) -> int")
    library.impl("mark", len, "CompositeImplicitAutograd")
    with FlopCounterMode(display=False), BackwardFlops() as flops:
        assert torch.ops.marks.mark("step") == 4
    assert flops.failure is None


def test_a_profiler_around_changes_nothing() -> None:
    plain, _ = train("Pinn", count_flops=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        profiled, _ = train("Pinn")
    assert_same_weights(weights(plain), weights(profiled))


def test_a_compiled_function_in_the_step_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not in the module's tree; under other dispatch modes torch runs it uncompiled."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        compiled.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(MODULES["Custom"], "losses", lambda self, x, y: (self.compiled(x), None))
    monkeypatch.setattr(MODULES["Custom"], "compiled", property(lambda self: function(self.net)), raising=False)
    made: dict[Any, Any] = {}

    def function(net: Any) -> Any:
        return made.setdefault(net, torch.compile(lambda x: net(x).relu(), backend=backend))

    _, callback = train("Custom", mode="mask")
    assert len(compiled) == 1
    assert callback.savings["flops"] is not None, "counted in the first batch, which is traced uncompiled"
    assert callback.ledger.stages["sparse"].steps == BATCHES
