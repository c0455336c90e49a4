"""Weights of the user's own: each step is that of the weighted mean over the samples that it trains on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import ConfigurationError
from tests.helpers.modules import OneLayer
from tests.helpers.training import (
    MODES,
    SaveAt,
    assert_close_weights,
    assert_same_weights,
    gloo,
    quiet_trainer,
    weights,
)

SIZE, BATCH = 64, 16


class Weighted(SparseLossMixin, OneLayer):
    """Tells the weight of each sample; its loss is a plain mean."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def sample_weights(self, batch: Any) -> Tensor | None:
        return batch[2]


class ByHand(OneLayer):
    """The same loss, weighted in the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return (batch[2] * losses).sum() / batch[2].sum()


def data(**options: Any) -> DataLoader:
    torch.manual_seed(3)
    u = torch.rand(SIZE) * 3
    u[5] = 0.0
    columns = (torch.randn(SIZE, 6), torch.randint(0, 3, (SIZE,)), u)
    return DataLoader(TensorDataset(*columns), batch_size=BATCH, **options)


class Record(pl.Callback):
    """Keeps what each step was trained on: batch, positions, importance weights."""

    def __init__(self, selection: SparseSelectionCallback, path: Path | None = None) -> None:
        self.selection, self.path, self.steps = selection, path, []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        kept = self.selection.last_selection
        assert kept is not None
        w = torch.ones(len(kept.indices)) if kept.weights is None else kept.weights
        self.steps.append((trainer.current_epoch, *(column[kept.indices] for column in batch), w, batch[2].sum()))

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.path is not None:
            torch.save((self.steps, weights(module)), self.path / f"{trainer.global_rank}.pt")


def replay(groups: Any, *, unbiased: bool = False) -> dict[str, Tensor]:
    """Train by hand on groups of recorded steps, each of which is one large batch."""
    module = OneLayer()
    optimizer = torch.optim.SGD(module.parameters(), lr=module.lr)
    for steps in groups:
        numerator, denominator = torch.tensor(0.0), torch.tensor(0.0)
        for _, x, y, u, w, whole in steps:
            numerator = numerator + (w * u * F.cross_entropy(module.net(x), y, reduction="none")).sum()
            denominator = denominator + (whole if unbiased else (w * u).sum())
        optimizer.zero_grad()
        (numerator / denominator).backward()
        optimizer.step()
    return weights(module)


def train(module: Any, *callbacks: Any, loader: Any = None, warmup: int = 1, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(
        callbacks=[*callbacks, TwoStageScheduler(warmup_epochs=warmup)], **{"max_epochs": 3, **options}
    )
    trainer.fit(module, loader or data())
    return trainer


def selecting(mode: Any, **options: Any) -> SparseSelectionCallback:
    defaults = {"mode": mode, "target_activation_rate": 0.5, "count_flops": False}
    return SparseSelectionCallback(**{**defaults, **options})


@pytest.mark.parametrize("mode", MODES)
def test_where_nothing_is_left_out_the_run_is_that_of_the_weighted_loss(mode: Any) -> None:
    module, plain = Weighted(), ByHand()
    train(module, selecting(mode, target_activation_rate=1.0))
    quiet_trainer(max_epochs=3).fit(plain, data())
    assert_close_weights(weights(module), weights(plain))


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", MODES)
def test_the_selected_samples_are_weighed(mode: Any, weighting: Any) -> None:
    module, callback = Weighted(), selecting(mode, weighting=weighting)
    record = Record(callback)
    train(module, callback, record)
    if mode == "prune" and weighting == "unbiased":
        # a plan's weights are those of the whole data set: the batch that was loaded is its normaliser
        record.steps = [(*step[:-1], step[3].sum()) for step in record.steps]
    assert_close_weights(weights(module), replay(([s] for s in record.steps), unbiased=weighting == "unbiased"))
    assert len({len(step[1]) for step in record.steps}) > 1 or mode == "prune", "something was left out"


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_batches_are_one_large_batch(mode: Any) -> None:
    module, callback = Weighted(), selecting(mode)
    record = Record(callback)
    train(module, callback, record, accumulate_grad_batches=2)
    epochs = [list(steps) for _, steps in itertools.groupby(record.steps, key=lambda step: step[0])]
    groups = [steps[i : i + 2] for steps in epochs for i in range(0, len(steps), 2)]
    assert_close_weights(weights(module), replay(groups))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["partial", "prune"])
def test_two_processes_are_one_large_batch(tmp_path: Path, mode: Any) -> None:
    callback = selecting(mode)
    train(Weighted(), callback, Record(callback, tmp_path), devices=2, strategy=gloo())
    (first, ended), (second, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same_weights(ended, same)
    assert_close_weights(ended, replay(zip(first, second, strict=True)))


class WeightedInPart(Weighted):
    """Has no weights in some batches; they differ between processes and micro-batches."""

    def sample_weights(self, batch: Any) -> Tensor | None:
        return batch[2] if batch[2].mean() > 1.5 else None


def replayed_in_part(groups: Any) -> dict[str, Tensor]:
    return replay([[(*s[:3], s[3] if s[-1] else torch.ones_like(s[3]), *s[4:6]) for s in steps] for steps in groups])


class RecordInPart(Record):
    """Notes whether the batch had weights, too."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self.steps[-1] = (*self.steps[-1], module.sample_weights(batch) is not None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_process_without_weights_counts_its_samples_by_one(tmp_path: Path) -> None:
    callback = selecting("partial")
    train(WeightedInPart(), callback, RecordInPart(callback, tmp_path), devices=2, strategy=gloo())
    (first, ended), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert any(one[-1] != other[-1] for one, other in zip(first, second, strict=True))
    assert_close_weights(ended, replayed_in_part(zip(first, second, strict=True)))


def test_a_micro_batch_without_weights_counts_its_samples_by_one() -> None:
    module, callback = WeightedInPart(), selecting("mask")
    record = RecordInPart(callback)
    train(module, callback, record, accumulate_grad_batches=2)
    groups = [record.steps[i : i + 2] for i in range(0, len(record.steps), 2)]
    assert any(one[-1] != other[-1] for one, other in groups)
    assert_close_weights(weights(module), replayed_in_part(groups))


def test_a_sample_counts_by_its_weight_for_the_selection() -> None:
    module, callback = Weighted(), selecting("partial", gate="topk", target_activation_rate=1 / 8)
    record = Record(callback)
    train(module, callback, record, warmup=0, max_epochs=1)
    x, y, u = next(iter(data()))
    errors = OneLayer().net(x).softmax(1) - F.one_hot(y, 3)
    top = (errors.norm(dim=1) * u).topk(2).indices.sort().values
    assert torch.equal(record.steps[0][1], x[top])


def test_a_sample_that_is_not_finite_is_left_out_of_the_normaliser() -> None:
    loader = data()
    loader.dataset.tensors[0][2] = torch.nan  # type: ignore[attr-defined]
    module, callback = Weighted(), selecting("mask", target_activation_rate=1.0, quarantine_limit=0.5)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        train(module, callback, loader=loader, max_epochs=1, warmup=0)
    plain = data()
    rest = TensorDataset(*(torch.cat([t[:2], t[3:]]) for t in plain.dataset.tensors))  # type: ignore[attr-defined]
    batches = [list(range(15)), *(list(range(start, start + 16)) for start in (15, 31, 47))]
    other = ByHand()
    quiet_trainer().fit(other, DataLoader(rest, batch_sampler=batches))
    assert_close_weights(weights(module), weights(other))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (torch.ones(3), r"shape \(16,\), each sample's weight"),
        ([1.0] * BATCH, "got list"),
        (-torch.ones(BATCH), "at least 0, got -1 for the sample at position 0"),
        (torch.full((BATCH,), torch.nan), "at least 0, got nan"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(told: Any, message: str) -> None:
    class Wrong(Weighted):
        def sample_weights(self, batch: Any) -> Any:
            return told

    with pytest.raises(ConfigurationError, match=message):
        train(Wrong(), selecting("partial"))


def test_a_module_without_the_mixin_is_told_of_it() -> None:
    class Bare(OneLayer):
        def sample_weights(self, batch: Any) -> Tensor:
            return torch.ones(BATCH)

    with pytest.warns(UserWarning, match="defines sample_weights, which"):
        train(Bare(), selecting("mask"))


@pytest.mark.parametrize("mode", ["subset", "prune"])
def test_a_resumed_run_is_weighted_alike(tmp_path: Path, mode: Any) -> None:
    path = tmp_path / "run.ckpt"
    straight, again = Weighted(), Weighted()
    train(straight, selecting(mode), SaveAt(path, "epoch end", 1))
    trainer = quiet_trainer(callbacks=[selecting(mode), TwoStageScheduler(warmup_epochs=1)], max_epochs=3)
    trainer.fit(again, data(), ckpt_path=path)
    assert_same_weights(weights(straight), weights(again))


def test_weights_of_nothing_leave_the_parameters_alone() -> None:
    class Nothing(Weighted):
        def sample_weights(self, batch: Any) -> Tensor:
            return torch.zeros(len(batch[0]))

    for mode in MODES:
        module = Nothing()
        train(module, selecting(mode), max_epochs=2)
        assert_same_weights(weights(module), weights(OneLayer()))
