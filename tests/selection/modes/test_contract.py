"""The questions that every mode is asked, with a real Trainer; a mode that is added to ``Mode`` is asked them too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ast import SparseLossMixin, SparseSelectionCallback
from lightning_ast.core import cost_share
from lightning_ast.mode_facts import Mode
from tests.compatibility.compare import check
from tests.compatibility.matrix import Cell
from tests.compatibility.train_cell import run as train_cell
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, SaveAt, assert_same_weights, gloo, quiet_trainer, weights
from tests.selection.plain_and_ours import (
    BATCH,
    AtEpochEnd,
    Draws,
    assert_clean,
    data,
    ours,
    random_state,
    seed,
)

EPOCH, RATE = 128, 0.5
EACH_MODE = pytest.mark.parametrize("mode", MODES)


class Scale(nn.Module):
    """A learned factor for each input: it makes the first layer's inputs need a gradient, at no matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Layers(PlainNet):
    """A network whose backward costs exactly twice its forward, as the cost formulas assume."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), Scale(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class Watch(pl.Callback):
    """Keeps, for each batch, the stage, the size of the batch, how many samples it was trained on, and the rate."""

    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection = selection
        self.batches: list[tuple[str, int, Tensor, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        kept = self.selection.last_selection.indices
        self.batches.append((self.selection.stage, len(batch[0]), kept, self.selection.activation_rate))


# ------------------------------------------------------------------ it trains, and its books are right


@EACH_MODE
def test_it_trains_and_its_books_are_right(few: Digits, mode: Mode) -> None:
    """One dense epoch and two sparse ones; in ``prune`` the batches are the selection."""
    selection, schedule = ours(mode)
    watch, module = Watch(selection), fresh(Layers)
    before = weights(module)
    trainer = quiet_trainer(callbacks=[selection, schedule, watch], max_epochs=3)
    trainer.fit(module, data(few))
    assert selection.session.stage == "sparse"
    assert any(not torch.equal(value, before[name]) for name, value in weights(module).items())
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    dense = [batch for batch in watch.batches if batch[0] == "warmup"]
    assert [(size, len(kept), rate) for _, size, kept, rate in dense] == [(BATCH, BATCH, 1.0)] * 8
    sparse = [batch for batch in watch.batches if batch[0] == "sparse"]
    totals = selection.ledger.stages["sparse"]
    assert (totals.steps, totals.offered) == (len(sparse), 2 * EPOCH)
    assert totals.selected == sum(len(kept) for _, _, kept, _ in sparse)
    assert totals.selected / totals.offered == pytest.approx(RATE, abs=0.05)
    for _, size, kept, rate in sparse:
        assert kept.unique().numel() == kept.numel() >= 2
        assert 0 <= int(kept.min()) <= int(kept.max()) < size
        assert rate == pytest.approx(len(kept) / size if totals.steps == 16 else RATE)
    assert selection.ledger.selected == EPOCH + totals.selected
    assert selection.savings["samples"] == pytest.approx((2 * EPOCH - totals.selected) / (3 * EPOCH))


@EACH_MODE
def test_the_saved_flops_are_those_of_its_formula(few: Digits, mode: Mode) -> None:
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=RATE)
    quiet_trainer(callbacks=[selection], max_epochs=2).fit(fresh(Layers), data(few))
    products = 2 * 64 * 32 + 2 * 32 * 10  # a multiply-add is 2
    assert vars(selection.ledger.flops) == {"forward": products, "backward": 2 * products}
    assert selection.savings["flops"] == pytest.approx(1 - cost_share(mode, selection.ledger.activation_rate))


# ------------------------------------------------------------------ where it has nothing to do, it is the plain run


class Scheduled(PlainNet):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps + 1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Trace(pl.Callback):
    """What each optimizer step was made with."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        gradients = [p.grad.clone() for p in module.parameters()]  # accumulated so far, or clipped
        self.steps.append((trainer.optimizers[0].param_groups[0]["lr"], gradients))


@pytest.mark.parametrize(
    ("clip", "target"),
    [("norm", "target_activation_rate"), ("value", "target_activation_rate"), ("norm", "target_coverage")],
)
@EACH_MODE
def test_a_target_of_one_is_the_plain_run(digits: Digits, mode: Mode, clip: str, target: str) -> None:
    """Three micro-batches a step, a short window and a short batch at the end, clipping, a schedule, two epochs."""
    selection = SparseSelectionCallback(**{"mode": mode, target: 1})
    ends = []
    for callbacks in ([], [selection]):
        module, trace = fresh(Scheduled), Trace()
        seed()
        trainer = quiet_trainer(
            callbacks=[*callbacks, trace],
            max_epochs=2,
            accumulate_grad_batches=3,
            gradient_clip_val=0.05,
            gradient_clip_algorithm=clip,
        )
        some = digits[0][:250], digits[1][:250]
        trainer.fit(module, data(some, batch_size=32, shuffle=True), data(some, batch_size=64))
        optimizer = trainer.optimizers[0].state_dict()["state"]
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("ast/")}
        ends.append((weights(module), trace.steps, optimizer, metrics, random_state(), trainer.global_step))
    plain, whole = ends
    assert_same_weights(plain[0], whole[0])
    assert [lr for lr, _ in plain[1]] == [lr for lr, _ in whole[1]]
    for (_, one), (_, other) in zip(plain[1], whole[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(plain[1]) == 16
    for index, state in plain[2].items():
        assert all(torch.equal(value, whole[2][index][name]) for name, value in state.items())
    assert {k: v for k, v in whole[3].items() if k in plain[3]} == plain[3]
    assert plain[4] == whole[4]
    assert plain[5] == whole[5] == 6
    assert (selection.savings["flops"], selection.activation_rate) == (0.0, 1.0)


@pytest.mark.parametrize("accumulate", [1, 3])
@EACH_MODE
def test_a_warmup_is_the_plain_run(few: Digits, mode: Mode, accumulate: int) -> None:
    """Weights, buffers, moments of the optimizer, and every generator that the step draws from."""
    ends = []
    for callbacks in ([], ours(mode, warmup=2)):
        ends.append(AtEpochEnd())
        seed()
        trainer = quiet_trainer(callbacks=[*callbacks, ends[-1]], max_epochs=3, accumulate_grad_batches=accumulate)
        trainer.fit(fresh(Draws), data(few, shuffle=True))
    for epoch in (0, 1):
        assert_same_weights(ends[0].weights[epoch], ends[1].weights[epoch])
        assert ends[0].random[epoch] == ends[1].random[epoch]
        assert all(torch.equal(a, b) for a, b in zip(ends[0].momenta[epoch], ends[1].momenta[epoch], strict=True))
    assert int(ends[1].weights[1]["net.1.num_batches_tracked"]) == 16
    assert any(not torch.equal(t, ends[1].weights[2][n]) for n, t in ends[0].weights[2].items()), "the third is sparse"


# ------------------------------------------------------------------ resume, processes, accumulation


RATED: dict[str, Any] = {}
COVERED: dict[str, Any] = {"target_activation_rate": None, "target_coverage": 0.9}


@pytest.mark.parametrize("target", [RATED, COVERED], ids=["rate", "coverage"])
@EACH_MODE
@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated", "ignore:You're resuming")
def test_a_run_that_is_resumed_in_mid_epoch_is_the_uninterrupted_one(
    few: Digits, mode: Mode, target: dict[str, Any], tmp_path: Path
) -> None:
    path, ends = tmp_path / "run.ckpt", []
    for save, ckpt_path, own_seed in (([SaveAt(path, "batch end", 1, 2)], None, 1), ([], path, 7)):
        torch.manual_seed(own_seed)
        module, callbacks = PlainNet(), ours(mode, seed=3, **target)
        loaded: Any = data(few, shuffle=True)
        if mode != "prune":  # which restores the place in a plain loader by itself
            loaded = StatefulDataLoader(TensorDataset(*few), batch_size=BATCH, shuffle=True)
        quiet_trainer(callbacks=[*callbacks, *save], max_epochs=3).fit(module, loaded, ckpt_path=ckpt_path)
        ends.append((weights(module), callbacks[0], random_state()[0]))
    (straight, whole, after), (again, resumed, after_resumed) = ends
    assert_same_weights(straight, again)
    assert after == after_resumed
    assert resumed.threshold == whole.threshold
    assert resumed.session.coverage == whole.session.coverage
    assert resumed.savings["flops"] == whole.savings["flops"]
    for stage, totals in whole.ledger.stages.items():
        counted = {name: value for name, value in vars(totals).items() if "timed" not in name}
        assert counted.items() <= vars(resumed.ledger.stages[stage]).items()
    torch.load(path, weights_only=True)  # tensors and primitives alone


class Share(pl.Callback):
    """Writes what a process ended with."""

    def __init__(self, folder: Path, selection: SparseSelectionCallback) -> None:
        self.folder = folder
        self.selection = selection

    def on_train_end(self, trainer: Any, module: Any) -> None:
        totals = self.selection.ledger.stages["sparse"]
        torch.save((weights(module), totals.offered, totals.selected), self.folder / f"rank{trainer.global_rank}.pt")


@EACH_MODE
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_processes_end_with_the_same_weights(few: Digits, mode: Mode, tmp_path: Path) -> None:
    selection, schedule = ours(mode)
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[selection, schedule, Share(tmp_path, selection)],
        max_epochs=2,
    )
    trainer.fit(fresh(dropout=0.0, batchnorm=False), data(few))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_weights(ranks[0][0], ranks[1][0])
    assert [offered for _, offered, _ in ranks] == [EPOCH // 2] * 2
    assert sum(selected for _, _, selected in ranks) == pytest.approx(RATE * EPOCH, abs=0.1 * EPOCH)


@EACH_MODE
def test_accumulated_micro_batches_are_one_large_batch(mode: Mode, tmp_path: Path) -> None:
    """The weights at the end are those of a loop by hand, whose denominator is that of all micro-batches of a step."""
    cell = Cell(mode=mode, accumulation="3", optimization="automatic")
    check(cell, train_cell(cell, tmp_path))


# ------------------------------------------------------------------ a sample that is not finite; what is left behind


class Numbered(SparseLossMixin, PlainNet):
    """Its batches hold the samples' indices in the data set."""

    def sample_indices(self, batch: Any) -> Tensor:
        return batch[2]


@EACH_MODE
def test_a_sample_that_is_not_finite_is_left_out_and_named(few: Digits, mode: Mode) -> None:
    """In the warmup and in sparse epochs; ``prune`` does not load it again."""
    x, bad = few[0].clone(), 37
    x[bad, 0, 2, 2] = math.nan
    loaded = DataLoader(TensorDataset(x, few[1], torch.arange(EPOCH)), batch_size=BATCH)
    selection, schedule = ours(mode)
    trained: list[int] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if selection.stage == "sparse":
                trained.extend(batch[2][selection.last_selection.indices].tolist())

    module = fresh(Numbered)
    with pytest.warns(UserWarning, match=rf"NaN or infinity.*dataset index {bad} \(epoch 0\)"):
        quiet_trainer(callbacks=[selection, schedule, Spy()], max_epochs=3).fit(module, loaded)
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert bad not in trained
    assert len(trained) == selection.ledger.stages["sparse"].selected > 0.4 * 2 * EPOCH
    assert {sample.index for sample in selection.quarantined} == {bad}
    assert selection.session.quarantine.samples[0].epoch == 0


class Fails(pl.Callback):
    """Raises an error of the user's own in the second sparse batch."""

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 9:
            raise RuntimeError("the user's own")


@pytest.mark.parametrize("fails", [False, True], ids=["ended", "failed"])
@EACH_MODE
def test_the_module_and_the_trainer_are_left_as_they_were(few: Digits, mode: Mode, fails: bool) -> None:
    module, plain = fresh(), fresh()
    step = module.training_step
    quiet_trainer(max_epochs=2).fit(plain, data(few))
    trainer = quiet_trainer(callbacks=[*ours(mode), *([Fails()] if fails else [])], max_epochs=2)
    if fails:
        with pytest.raises(RuntimeError, match="the user's own"):
            trainer.fit(module, data(few))
    else:
        trainer.fit(module, data(few))
    assert_clean(trainer, module)
    assert vars(module).keys() == vars(plain).keys()
    assert module.training_step == step
    assert not [layer for layer in module.modules() if layer._forward_hooks or layer._forward_pre_hooks]
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()
