"""Batches that are lost as a whole, and batches without a sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast import QuarantineError, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import (
    BATCH_MODES,
    MODES,
    StopAfter,
    assert_close_weights,
    assert_same_weights,
    fit,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:lightning-ast. the run ended after")  # within the warmup


class SeesNan(PlainNet):
    """The loss of one sample is NaN though its input is finite: a dense step cannot tell whose."""

    bad = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hurt = torch.zeros(len(x), 1)
        hurt[0] = math.nan if batch_idx == self.bad else 0.0
        return F.cross_entropy(self(x) + hurt, y)


def sixty_four(digits: Digits) -> DataLoader[Any]:
    return DataLoader(torch.utils.data.TensorDataset(digits[0][:64], digits[1][:64]), batch_size=16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
def test_a_dense_step_leaves_out_the_sample_alone(digits: Digits, mode: str) -> None:
    """The loss of the batch is NaN; the gradient tells whose fault that is, and the others train as without it."""
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.02)
    module, reference = (fresh(SeesNan, dropout=0.0, batchnorm=False) for _ in range(2))
    schedule = TwoStageScheduler(warmup_epochs=1)
    trainer = fit(module, sixty_four(digits), callback, schedule, StopAfter(4), max_epochs=2, log_every_n_steps=1)
    assert trainer.callback_metrics["ast/quarantined"] == 1
    assert [(s.batch, s.position) for s in callback.quarantined] == [(1, 0)]
    assert callback.ledger.selected == 63
    optimizer = reference.configure_optimizers()
    for step in range(4):
        rows = slice(16 * step + (step == 1), 16 * step + 16)
        optimizer.zero_grad()
        F.cross_entropy(reference(digits[0][rows]), digits[1][rows]).backward()
        optimizer.step()
    assert_close_weights(weights(module), weights(reference))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
def test_more_than_the_limit_is_known_at_once(digits: Digits, mode: str) -> None:
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.015)
    name = "dataset index 16" if mode == "prune" else r"\(batch 1, position 0\)"
    with pytest.raises(QuarantineError, match=rf"1 sample of epoch 0, more than .* of its 64: {name}"):
        fit(fresh(SeesNan), sixty_four(digits), callback, TwoStageScheduler(warmup_epochs=1), max_epochs=2)
    assert callback.ledger.offered == 32, "not at the end of the epoch"


@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
def test_a_loss_that_only_the_step_of_subset_shows(digits: Digits) -> None:
    """The scoring pass leaves one sample out; in the step on the others the first one's loss is NaN, too."""
    module = fresh(SeesNan, dropout=0.0, batchnorm=False)
    callback = SparseSelectionCallback(mode="subset", quarantine_limit=0.1, gate="topk")
    fit(module, sixty_four(digits), callback)
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert [s.batch for s in callback.quarantined] == [1, 1]
    assert callback.quarantined[0].position == 0 < callback.quarantined[1].position


# ------------------------------------------------------------------ empty batches


class Dense(PlainNet):
    """Does without BatchNorm, which cannot do with an empty batch."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batchnorm=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch if len(batch) else (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
        self.seen.append(len(x))
        return F.cross_entropy(self(x), y)


class Explicit(SparseLossMixin, Dense):
    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(len(batch[0]))
        return self.per_sample_loss(batch, batch_idx).mean()


def filtered(digits: Digits, *, empty: Any, where: int) -> DataLoader[Any]:
    """A collate_fn that drops what it does not like: here all samples of one batch of four."""
    x, y = digits[0][:64], digits[1][:64]

    def collate(rows: list[int]) -> Any:
        return empty if rows[0] == 16 * where else (x[rows], y[rows])

    return DataLoader(range(64), batch_size=16, collate_fn=collate)


NONE = (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_in_the_warmup_is_that_of_a_plain_run(digits: Digits, mode: str, where: int) -> None:
    plain, ours = fresh(Dense), fresh(Dense)
    data = filtered(digits, empty=NONE, where=where)
    fit(plain, data, max_epochs=1)
    callback = SparseSelectionCallback(mode=mode)
    fit(ours, data, callback, TwoStageScheduler(warmup_epochs=1), StopAfter(4), max_epochs=2)
    assert_same_weights(weights(plain), weights(ours))
    assert [n for n in ours.seen if n == 0] == [0]
    assert (callback.ledger.offered, callback.ledger.selected) == (48, 48)


@pytest.mark.parametrize("empty", [NONE, []], ids=["no rows", "no list"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_an_empty_batch_in_the_sparse_stage(digits: Digits, mode: str, empty: Any) -> None:
    """The step is the user's own there; the others are what they are without it, step by step by hand."""
    module, reference = fresh(Dense), fresh(Dense)
    callback = SparseSelectionCallback(mode=mode, gate="topk", target_activation_rate=0.5, significance="loss")
    fit(module, filtered(digits, empty=empty, where=1), callback)
    optimizer = reference.configure_optimizers()
    for step in range(4):
        x, y = digits[0][16 * step : 16 * step + 16], digits[1][16 * step : 16 * step + 16]
        losses = F.cross_entropy(reference(x), y, reduction="none")
        optimizer.zero_grad()
        (losses.sum() * 0 if step == 1 else losses.topk(8).values.mean()).backward()
        optimizer.step()
    assert_close_weights(weights(module), weights(reference))
    assert (callback.ledger.offered, callback.ledger.selected) == (48, 24)


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_an_empty_batch_under_accumulation(digits: Digits, mode: str) -> None:
    """Explicit losses; a window's only batch has Lightning's share of it, as in a plain run."""
    module, reference = fresh(Explicit), fresh(Explicit)
    callback = SparseSelectionCallback(mode=mode, gate="topk", target_activation_rate=0.5, significance="loss")
    fit(module, filtered(digits, empty=NONE, where=0), callback, accumulate_grad_batches=2)
    optimizer = reference.configure_optimizers()
    for window in ([1], [2, 3]):
        optimizer.zero_grad()
        for step in window:
            rows = slice(16 * step, 16 * step + 16)
            losses = reference.per_sample_loss((digits[0][rows], digits[1][rows]), 0)
            (losses.topk(8).values.mean() / 2).backward()
        optimizer.step()
    assert_close_weights(weights(module), weights(reference))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None")
def test_a_skipped_batch_and_a_batch_of_none(digits: Digits) -> None:
    class Skips(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    callback = SparseSelectionCallback()
    fit(fresh(Skips), loader(digits), callback, TwoStageScheduler(warmup_epochs=0.5))
    assert callback.ledger.offered == 512

    for mode in ("mask", "subset", "partial"):
        callback = SparseSelectionCallback(mode=mode)
        fit(fresh(Skips), loader(digits), callback)
        assert callback.ledger.offered == 512
        assert callback.ledger.stages["sparse"].selected < 512 - 64

    x, y = digits
    batches = [None, (x[:64], y[:64])]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    with pytest.warns(UserWarning, match="yielded None"):
        fit(fresh(), data, callback)
    assert callback.ledger.offered == 64
