"""Batches of a run with a target coverage that are trained on whole, because a selection costs more than it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ast import SparseSelectionCallback
from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.selection.fit_parts import Watcher
from lightning_ast.selection.step_state import StepState
from tests.helpers.modules import Trained, fresh
from tests.helpers.training import BATCH_MODES, assert_close_weights, assert_same_weights, gloo, quiet_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:lightning-ast. mode='subset' at an activation rate")  # a small net
SIZE = 8
X = 6
EACH_MODE = pytest.mark.parametrize("mode", BATCH_MODES)


class Wide(Trained):
    """A regression whose significance is the distance from the target: data decides how it is spread."""

    lr = 0.01

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(X, 5), nn.Tanh(), nn.Linear(5, 1))
        self.forwards: list[int] = []
        self.net.register_forward_hook(self.count)

    def count(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.forwards.append(len(output))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.l1_loss(self.net(batch[0]), batch[1]) if self.alike else F.mse_loss(self.net(batch[0]), batch[1])

    alike = False
    """Whether the gradient of every sample has the same norm, as that of the absolute distance has."""


class Still(Wide):
    """Learns nothing that would change its scores."""

    lr = 1e-9


class Alike(Wide):
    alike = True


def batches(*spread: bool, size: int = SIZE) -> TensorDataset:
    """Batches whose significances are spread over three decades, or nearly alike."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(spread) * size, X, generator=g)
    y = torch.cat(
        [10 ** (3 * torch.rand(size, 1, generator=g)) if wide else torch.full((size, 1), 500.0) for wide in spread]
    )
    return TensorDataset(x, y)


class Seen(Watcher):
    """Keeps each step, what was selected of it, and the gradients and parameters of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[StepState] = []

    def finish_batch(self, step: StepState) -> None:
        self.steps.append(step)


class Steps(pl.Callback):
    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection = selection
        self.seen = Seen()
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.selection.session.watchers.append(self.seen)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.before.append(weights(module))
        self.gradients.append([p.grad.clone() for p in module.parameters()])


def train(module: Any, data: Any, *, size: int = SIZE, trainer: Any = None, **options: Any) -> Any:
    selection = SparseSelectionCallback(**options)
    steps = Steps(selection)
    loader = data if isinstance(data, DataLoader) else DataLoader(data, size)
    quiet_trainer(callbacks=[selection, steps], **(trainer or {})).fit(module, loader)
    return selection, steps


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("accumulate", [1, 3])
@EACH_MODE
def test_a_whole_batch_counts_as_one_among_micro_batches(mode: Any, accumulate: int, weighting: str) -> None:
    """The gradient of each optimizer step is that of all micro-batches in one: a whole one's weights are 1."""
    spread = (True, False, True, False, False, True, True, True)
    data = batches(*spread)
    selection, steps = train(
        fresh(Wide),
        data,
        target_coverage=0.96,
        mode=mode,
        weighting=weighting,
        trainer={"accumulate_grad_batches": accumulate},
    )
    whole = [step.is_whole for step in steps.seen.steps]
    if mode != "subset":  # which does not score each batch
        assert whole == [not wide for wide in spread]
    assert any(whole)
    assert not all(whole)
    assert selection.ledger.stages["sparse"].dense_steps == sum(whole)
    model = fresh(Wide)
    for number, (before, gradients) in enumerate(zip(steps.before, steps.gradients, strict=True)):
        model.load_state_dict(before)
        micros = range(number * accumulate, min((number + 1) * accumulate, len(spread)))
        total: Any = 0.0
        divisor = 0.0
        for k in micros:
            x, y = data[k * SIZE : (k + 1) * SIZE]
            kept = steps.seen.steps[k].selection
            w = torch.ones(len(kept.indices)) if kept.weights is None else kept.weights.float()
            assert not whole[k] or bool((w == 1).all())
            total = total + (w * F.mse_loss(model.net(x), y, reduction="none")[kept.indices, 0]).sum()
            divisor += SIZE if weighting == "unbiased" else float(w.sum())
        scale = len(micros) / accumulate  # Lightning divides the last, short window by the accumulation as well
        expected = torch.autograd.grad(total / divisor * scale, list(model.parameters()))
        for left, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)


@EACH_MODE
def test_a_run_of_whole_batches_is_bitwise_the_plain_run(mode: Any) -> None:
    """All samples matter alike: nothing is gained by leaving any out."""
    data = batches(*[False] * 6)
    selection, _ = train(module := fresh(Alike), data, target_coverage=0.97, mode=mode, trainer={"max_epochs": 2})
    plain = fresh(Alike)
    quiet_trainer(max_epochs=2).fit(plain, DataLoader(data, SIZE))
    assert_same_weights(weights(module), weights(plain))
    totals = selection.ledger.stages["sparse"]
    assert (totals.steps, totals.dense_steps, totals.selected) == (12, 12, 96)
    assert (selection.activation_rate, selection.session.coverage) == (1.0, 1.0)


# ---------------------------------------------------------------------- the books


@EACH_MODE
def test_the_ledger_counts_what_was_run(mode: Any) -> None:
    """Forwards are counted by a hook of the network; backwards are those of the samples trained on."""
    spread = [True] * 3 + [False] * 30 + [True] * 15
    module = fresh(Wide)
    selection, steps = train(module, batches(*spread), target_coverage=0.8 if mode == "subset" else 0.96, mode=mode)
    totals = selection.ledger.stages["sparse"]
    scored = [step for step in steps.seen.steps if step.is_scored_ahead]
    assert totals.steps == len(spread)
    assert totals.dense_steps == sum(step.is_whole for step in steps.seen.steps) > 0
    assert totals.selected == sum(step.selected for step in steps.seen.steps)
    assert totals.forwarded == sum(module.forwards)
    spares = mode != "mask"
    assert totals.backwarded == sum(step.selected if spares else SIZE for step in steps.seen.steps)
    if mode == "subset":
        assert 0 < len(scored) < len(spread)
    flops = selection.ledger.flops
    spent = totals.forwarded * flops.forward + totals.backwarded * flops.backward
    assert selection.savings["flops"] == pytest.approx(1 - spent / (len(spread) * SIZE * flops.dense))


def test_subset_scores_one_batch_of_sixteen_while_scoring_does_not_pay() -> None:
    spread = [False] * 40 + [True] * 20
    _, steps = train(fresh(Still), batches(*spread), target_coverage=0.8, mode="subset")
    scored = [number for number, step in enumerate(steps.seen.steps) if step.is_scored_ahead]
    # alike: a rate of 0.8 at the first batch and at 16 and 32; from 48 on it has fallen
    assert scored == [0, 16, 32, *range(48, 60)]
    assert all(step.is_whole for number, step in enumerate(steps.seen.steps) if number not in scored)
    assert not any(steps.seen.steps[number].is_whole for number in scored), "what is scored is selected from"
    assert all(step.selected < SIZE for number, step in enumerate(steps.seen.steps) if number in scored)


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated", "ignore:You're resuming")
@pytest.mark.parametrize("at", [5, 16, 20, 33, 50])
def test_subset_is_resumed_where_it_skips_scoring(at: int, tmp_path: Path) -> None:
    data = batches(*[False] * 40 + [True] * 20)
    ends = []

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == at:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    for path in (None, tmp_path / "run.ckpt"):
        torch.manual_seed(7)
        selection = SparseSelectionCallback(target_coverage=0.8, mode="subset")
        steps = Steps(selection)
        module = Still()
        trainer = quiet_trainer(callbacks=[selection, steps, Save()])
        trainer.fit(module, StatefulDataLoader(data, SIZE), ckpt_path=path)
        kinds = [(step.is_scored_ahead, step.selected) for step in steps.seen.steps]
        ends.append((weights(module), kinds, selection.ledger.stages["sparse"], selection.session.coverage))
    (straight, all_kinds, books, coverage), (resumed, kinds, again, coverage_again) = ends
    assert_same_weights(straight, resumed)
    assert kinds == all_kinds[at + 1 :]
    assert (books.dense_steps, books.forwarded, books.selected) == (again.dense_steps, again.forwarded, again.selected)
    assert coverage == coverage_again


# ---------------------------------------------------------------------- two processes


class Unequal(Wide):
    """Batches of 8 in one process and of 6 in the other, all alike."""

    def train_dataloader(self) -> Any:
        data = batches(*[False] * 6)
        sizes = [8, 6]
        start = 0
        own = []
        for _ in range(3):
            for rank, size in enumerate(sizes):
                if rank == self.trainer.global_rank:
                    own.append(data[start : start + size])
                start += size
        return DataLoader(own, batch_size=None)


class Write(pl.Callback):
    def __init__(self, folder: Path, selection: SparseSelectionCallback) -> None:
        self.folder = folder
        self.selection = selection

    def on_train_end(self, trainer: Any, module: Any) -> None:
        totals = self.selection.ledger.stages["sparse"]
        torch.save((weights(module), totals.dense_steps), self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@EACH_MODE
def test_whole_batches_of_two_processes_are_one_large_batch(mode: Any, tmp_path: Path) -> None:
    selection = SparseSelectionCallback(target_coverage=0.97, mode=mode, count_flops=False)
    trainer = quiet_trainer(
        devices=2, strategy=gloo(), use_distributed_sampler=False, callbacks=[selection, Write(tmp_path, selection)]
    )
    trainer.fit(fresh(Unequal))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert [dense for _, dense in ranks] == [3, 3]
    assert_same_weights(ranks[0][0], ranks[1][0])
    together = fresh(Wide)
    quiet_trainer().fit(together, DataLoader(TensorDataset(*batches(*[False] * 6)[:42]), 14))
    assert_close_weights(ranks[0][0], weights(together))


# ---------------------------------------------------------------------- unusual batches


@pytest.mark.parametrize("gate", ["soft", "threshold", "topk"])
@EACH_MODE
def test_batches_of_zeros_of_one_sample_and_with_nan(mode: Any, gate: Any) -> None:
    """A fitted batch, a batch that is all alike, one that holds NaN, and a last one of a single sample."""
    data = batches(True, True, True, True, True)
    x, y = data.tensors
    module = fresh(Wide)
    x[: 2 * SIZE] = 0.0
    y[:SIZE] = float(module.net(torch.zeros(1, X)).detach())  # a loss of 0, and a gradient of 0
    y[SIZE : 2 * SIZE] = 1.0
    x[2 * SIZE + 1, 0] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinity"):
        selection, steps = train(
            module,
            TensorDataset(x[:-7], y[:-7]),
            target_coverage=0.9,
            mode=mode,
            gate=gate,
            quarantine_limit=0.5,
        )
    kept = [step.selected for step in steps.seen.steps]
    assert len(kept) == 5
    assert 1 not in steps.seen.steps[2].selection.indices.tolist()
    assert all(2 <= count <= SIZE for count in kept[:4])
    assert kept[4] == 1
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert 0 <= selection.session.coverage <= 1


@EACH_MODE
def test_a_whole_batch_with_a_sample_that_is_not_finite(mode: Any) -> None:
    """All of the others are trained on, and alike."""
    data = batches(*[False] * 20)
    x, y = data.tensors
    x[17 * SIZE + 3, 0] = torch.inf
    with pytest.warns(UserWarning, match="NaN or infinity"):
        selection, steps = train(
            module := fresh(Still), TensorDataset(x, y), target_coverage=0.97, mode=mode, quarantine_limit=0.5
        )
    step = steps.seen.steps[17]
    assert step.selection.indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    model = fresh(Wide)
    model.load_state_dict(steps.before[17])
    rows = 17 * SIZE + step.selection.indices
    expected = torch.autograd.grad(F.mse_loss(model.net(x[rows]), y[rows]), list(model.parameters()))
    for left, right in zip(steps.gradients[17], expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert selection.ledger.stages["sparse"].selected == 20 * SIZE - 1


# ---------------------------------------------------------------------- without Lightning


@pytest.mark.parametrize("execution", ["mask", "partial"])
def test_a_plain_loop_keeps_batches_whole(execution: Any) -> None:
    model = fresh(Wide).net
    gate = GradientGate(SampleSelector(target_coverage=0.96), execution=execution)
    for spread in (True, False):
        x, y = batches(spread).tensors
        with gate.trace((x, y)):
            loss = F.mse_loss(model(x), y)
        gate.open(loss, batch_size=SIZE)
        plain = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
        model.zero_grad()
        loss.backward()
        same = all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
        assert same == (not spread)
        assert (len(gate.selection.indices) == SIZE) == (not spread)
