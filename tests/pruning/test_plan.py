"""Which samples reach the model in mode ``prune``, in which order and with which weights."""

from __future__ import annotations

import csv
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import (
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_ast import SparseLossMixin
from lightning_ast.core import planned_count
from lightning_ast.errors import ConfigurationError
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer
from tests.pruning.prune_by_hand import (
    SIZE,
    Indexed,
    Recorded,
    Witness,
    fit,
    fresh,
    history_by_hand,
    loader,
    plan_by_hand,
    pruned,
)


class Backwards(Sampler[int]):
    """A sampler of the user's own, from the global Python generator."""

    def __iter__(self) -> Any:
        indices = list(range(SIZE))[::-1]
        indices[:50] = random.sample(indices[:50], 50)
        return iter(indices)

    def __len__(self) -> int:
        return SIZE


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.linspace(0.1, 2, SIZE).tolist(), num_samples=200)


def as_dict(rows: list[Any]) -> dict[str, Tensor]:
    x, y, i = zip(*rows)
    return {"x": torch.stack(x), "y": torch.stack(y), "i": torch.tensor(i)}


SAMPLERS: dict[str, Any] = {
    "shuffled": lambda: RandomSampler(range(SIZE)),
    "sequential": lambda: SequentialSampler(range(SIZE)),
    "weighted, with replacement": weighted,
    "part of the data": lambda: SubsetRandomSampler(range(40, 240)),
    "the user's own": Backwards,
    "a list": lambda: list(range(0, SIZE, 2)),
}

LOADERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drop_last": {"drop_last": True},
    "batches that divide": {"batch_size": 20},
    "single samples": {"batch_size": 1, "dataset": Indexed(40)},
    "dicts": {"collate_fn": as_dict},
    "one worker": {"num_workers": 1},
    "two workers": {"num_workers": 2, "prefetch_factor": 1},
    "three workers": {"num_workers": 3},
    "persistent workers": {"num_workers": 4, "persistent_workers": True, "prefetch_factor": 3},
}

LIMITS: dict[str, dict[str, Any]] = {
    "limit_train_batches in batches": {"limit_train_batches": 5},
    "limit_train_batches as a share": {"limit_train_batches": 0.5},
    "overfit_batches": {"overfit_batches": 3},
    "accumulation": {"accumulate_grad_batches": 3},
}

VARIANTS = [
    *(pytest.param(make, {}, {}, id=name) for name, make in SAMPLERS.items()),
    *(pytest.param(SAMPLERS["shuffled"], options, {}, id=name) for name, options in LOADERS.items()),
    *(pytest.param(SAMPLERS["shuffled"], {}, limit, id=name) for name, limit in LIMITS.items()),
    pytest.param(weighted, {"num_workers": 2, "drop_last": True}, {"limit_train_batches": 4}, id="several at once"),
]


@pytest.mark.parametrize(("make", "options", "limits"), VARIANTS)
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:This DataLoader will create")
def test_what_reaches_the_model_is_the_plan(make: Any, options: Any, limits: Any) -> None:
    """Beside a plan from the module's own scores: dense epochs are the sampler's, pruned ones what the plan leaves."""
    size = len(options["dataset"]) if "dataset" in options else SIZE
    sampler = Recorded(make() if size == SIZE else RandomSampler(range(size)))
    data = loader(sampler=sampler, **options)
    module = fresh(batchnorm=data.batch_size > 1)
    callback = pruned()
    fit(module, data, callback, **limits)
    batch, last = data.batch_size, data.drop_last
    dense_batches = len(data)
    limit = limits.get("limit_train_batches", limits.get("overfit_batches", 1.0))
    dense_batches = min(dense_batches, limit) if isinstance(limit, int) else int(dense_batches * limit)
    draws = sampler.drawn or [list(range(size))] * 4  # overfitting takes them in order
    offered = min(len(draws[0]), dense_batches * batch)
    count = planned_count(offered, 0.4, batch_size=batch, drop_last=last)
    assert abs(count / offered - 0.4) < (0.01 if not last else 0.2)
    seen = module.epochs()
    assert sorted(seen) == [0, 1, 2, 3]
    assert len(draws) == 4, "the user's sampler is asked once an epoch"
    for epoch in range(4):
        expected = draws[epoch][:offered]
        if epoch in (1, 2):
            expected = plan_by_hand(module, expected, epoch=epoch, count=count, size=size)
        assert seen[epoch] == expected, f"epoch {epoch}"
    totals = callback.ledger.stages["sparse"]
    assert (totals.offered, totals.selected) == (2 * offered, 2 * count)
    assert (totals.forwarded, totals.backwarded) == (2 * count, 2 * count)


def test_without_a_schedule_every_epoch_is_pruned_and_every_sample_comes_soon() -> None:
    module = fresh()
    quiet_trainer(callbacks=[pruned()], max_epochs=8).fit(module, loader(shuffle=True))
    seen = module.epochs()
    assert [len(seen[e]) for e in range(8)] == [120] * 8
    assert len(set(seen[0])) == 120
    assert set().union(*seen.values()) == set(range(SIZE)), "what was not seen yet comes first"
    counts = Counter(i for e in range(4) for i in seen[e])
    assert max(counts.values()) <= 4


def test_scores_are_those_of_the_training_forward_at_no_extra_pass() -> None:
    module, forwards = fresh(), []
    module.net[0].register_forward_hook(lambda *_: forwards.append(1))
    callback = pruned()
    fit(module, loader(shuffle=True), callback)
    assert len(forwards) == len(module.batches) == 28
    epochs = callback.session.epochs
    epochs.history.fold()
    torch.testing.assert_close(
        epochs.history.significance(), history_by_hand(module, 4).significance(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("weighting", ["sqrt", "unbiased"])
@pytest.mark.parametrize("explicit", [False, True])
def test_weights_enter_the_loss(weighting: str, explicit: bool) -> None:
    """One pruned batch beside the step by hand."""

    class Explicit(SparseLossMixin, Witness):
        def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.batches.append((self.trainer.current_epoch, batch_idx, batch[2].tolist(), []))
            return self.per_sample_loss(batch, batch_idx).mean()

    options = {"dropout": 0.0, "batchnorm": False}
    module = fresh(Explicit if explicit else Witness, **options)
    callback = pruned(weighting=weighting, significance="loss")
    gradients, before = [], []

    class Spy(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
            before.append(({k: v.clone() for k, v in pl_module.state_dict().items()}, loss.detach()))

        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gradients.append([p.grad.clone() for p in pl_module.parameters()])

    fit(module, loader(shuffle=True), callback, Spy(), max_epochs=2, cooldown=0)
    plan = callback.session.epochs.epoch.plan
    assert plan.weights.unique().numel() > 10
    data = Indexed()
    for step in range(10, 14):
        epoch, batch_idx, indices, _ = module.batches[step]
        assert epoch == 1
        reference = fresh(PlainNet, **options)
        reference.load_state_dict(before[step][0])
        losses = F.cross_entropy(reference(data.x[indices]), data.y[indices], reduction="none")
        w = plan.weights[32 * batch_idx :][: len(indices)]
        loss = (w * losses).sum() / (w.sum() if weighting == "sqrt" else len(indices))
        for got, want in zip(gradients[step], torch.autograd.grad(loss, list(reference.parameters()))):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(before[step][1], losses.mean().detach(), msg="the logged loss is the batch's")


class Flat(Witness):
    """BatchNorm over the batch alone: it cannot train on a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize("rate", [0.2701, 0.43, 0.11, 0.0034])
def test_no_last_batch_of_one_sample(rate: float) -> None:
    module = fresh(Flat)
    fit(module, loader(shuffle=True, batch_size=20), pruned(target_activation_rate=rate))
    sizes = [len(indices) for epoch, _, indices, _ in module.batches if epoch in (1, 2)]
    assert min(sizes) >= 2
    assert sum(sizes) / 2 / SIZE == pytest.approx(rate, abs=1.5 / SIZE)


def test_drop_last_drops_nothing_that_was_planned() -> None:
    module = fresh()
    fit(module, loader(shuffle=True, drop_last=True, batch_size=50), pruned(target_activation_rate=0.3))
    for epoch in (1, 2):
        seen = module.epochs()[epoch]
        assert len(seen) == 100, "two whole batches of 50 for 0.3 * 300"
        assert sorted(seen) == plan_by_hand(module, list(range(SIZE)), epoch=epoch, count=100)


@pytest.mark.parametrize("gate", ["soft", "threshold", "topk"])
@pytest.mark.parametrize("significance", ["el2n", "loss", "confidence", lambda losses, *_: losses.abs() + 1])
def test_every_gate_and_score(gate: str, significance: Any) -> None:
    module, callback = fresh(), pruned(gate=gate, significance=significance)
    fit(module, loader(shuffle=True), callback)
    assert [len(v) for v in module.epochs().values()] == [SIZE, 120, 120, SIZE]
    assert callback.threshold > 0


def test_what_is_logged(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    callback = pruned()
    fit(fresh(), loader(shuffle=True), callback, logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    shown = [(r["ast/stage"], r["ast/activation_rate"]) for r in rows if r["ast/stage"]]
    assert Counter(stage for stage, _ in shown) == {"0.0": 10, "1.0": 8, "2.0": 10}
    assert all(float(rate) == pytest.approx(0.4) for stage, rate in shown if stage == "1.0")
    assert {float(rate) for stage, rate in shown if stage != "1.0"} == {1.0}
    thresholds = {r["ast/threshold"] for r in rows if r["ast/stage"] == "1.0"}
    assert len(thresholds) == 2, "one an epoch"
    assert callback.savings["samples"] == callback.savings["flops"] == pytest.approx(0.3), "two of four epochs at 0.4"


class Sorted(SparseLossMixin, Witness):
    """Its batches are sorted by label, as a recurrent network wants them by length."""

    shift = 0

    def sample_indices(self, batch: Any) -> Tensor:
        return batch[2] + self.shift


def by_label(rows: list[Any]) -> Any:
    return torch.utils.data.default_collate(sorted(rows, key=lambda row: int(row[1])))


@pytest.mark.parametrize("weighting", ["none", "sqrt"])
def test_a_collate_function_that_reorders(weighting: str) -> None:
    module, callback = fresh(Sorted), pruned(weighting=weighting)
    weighted = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            weights = callback.last_selection.weights
            if weights is not None:
                indices, epoch = module.last[2], callback.session.epochs.epoch.plan
                for index, weight in zip(indices.tolist(), weights):
                    assert weight == epoch.weights[epoch.indices.tolist().index(index)]
                    weighted.append(index)

    def step(batch: Any, batch_idx: int) -> Tensor:
        module.last = batch
        return Sorted.training_step(module, batch, batch_idx)

    module.training_step = step
    fit(module, loader(collate_fn=by_label), callback, Weights())
    assert len(weighted) == (0 if weighting == "none" else 2 * 120)
    callback.session.epochs.history.fold()
    assert torch.allclose(callback.session.epochs.history.significance(), history_by_hand(module, 4).significance())


def test_indices_that_were_not_drawn_are_refused() -> None:
    module = fresh(Sorted)
    module.shift = 1
    with pytest.raises(ConfigurationError, match="sample_indices of batch 0 are not those"):
        fit(module, loader(), pruned())


def test_a_batch_that_is_none_is_passed_over() -> None:
    """Lightning goes on to the next one; the scores stay those of the right samples."""

    def collate(rows: list[Any]) -> Any:
        return None if rows[0][2] == 32 else torch.utils.data.default_collate(rows)

    module, callback = fresh(), pruned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, loader(collate_fn=collate), callback)
    callback.session.epochs.history.fold()
    assert sorted(module.epochs()[0]) == [*range(32), *range(64, SIZE)]
    mine, hand = callback.session.epochs.history, history_by_hand(module, 4)
    assert torch.equal(mine.seen, hand.seen)
    assert torch.allclose(mine.significance(), hand.significance())
