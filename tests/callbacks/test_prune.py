"""Mode ``prune`` in a real Trainer: which samples reach the model, and everything Lightning counts by them."""

from __future__ import annotations

import copy
import csv
import itertools
import multiprocessing
import pickle
import random
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_ast import PIController, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import planned_count
from lightning_ast.errors import ConfigurationError
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun
from lightning_ast.schedule import Schedule
from tests.callbacks.pruning import (
    SIZE,
    Cycle,
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
from tests.conftest import PlainNet, assert_same_weights, quiet_trainer, weights


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


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": 2, "val_check_interval": 0.5}])
@pytest.mark.parametrize("workers", [0, 2])
def test_dense_is_bitwise_the_plain_run(limits: dict[str, Any], workers: int) -> None:
    """Warmup and a rate of 1: the same samples in the same order, the same draws, the same weights."""
    results = []
    for callback in (None, pruned(target_activation_rate=1.0)):
        module = fresh(Cycle)
        data = loader(shuffle=True, num_workers=workers, dataset=Indexed(noise=0.1))
        torch.manual_seed(5)
        trainer = quiet_trainer(callbacks=[callback] if callback else [], **limits)
        trainer.fit(module, data, DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=100))
        results.append((module, trainer.global_step, torch.rand(3)))
    (plain, steps, after), (ours, our_steps, our_after) = results
    assert ours.batches == plain.batches
    assert (our_steps, ours.steps) == (steps, plain.steps)
    assert torch.equal(after, our_after), "the global generator"
    assert_same_weights(weights(plain), weights(ours))


class Once(Cycle):
    """Whose schedule raises when it is stepped once more than planned."""

    def configure_optimizers(self) -> Any:
        optimizers, (scheduler,) = super().configure_optimizers()
        scheduler["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(
            optimizers[0], max_lr=0.2, total_steps=self.steps, div_factor=10, final_div_factor=100
        )
        return optimizers, [scheduler]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 5},
        {"max_epochs": 5, "accumulate_grad_batches": 3},
        {"max_epochs": 9, "max_steps": 37},
        {"max_epochs": -1, "max_steps": 37, "cooldown": 2},
        {"max_epochs": -1, "max_steps": 41, "cooldown": 0.2, "warmup": 0.3},
        {"max_epochs": 10, "cooldown": 0.125, "warmup": 0.1},
        {"max_epochs": 4, "limit_train_batches": 6},
        {"max_epochs": 3, "cooldown": 0, "warmup": 0},
    ],
    ids=str,
)
def test_step_wise_schedules_end_with_the_run(limits: dict[str, Any]) -> None:
    module = fresh(Once)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    callback = pruned()
    stages: dict[int, str] = {}

    class Stages(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert stages.setdefault(trainer.current_epoch, callback.stage) == callback.stage, "one stage an epoch"

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of")
        trainer = fit(module, loader(shuffle=True), callback, Rates(), Stages(), **limits)
    assert trainer.global_step == module.steps
    assert callback.planned_steps(trainer) is not None
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert schedule.last_epoch == module.steps or schedule.last_epoch == module.steps - 1
    assert max(rates) == pytest.approx(0.2, rel=0.2)
    assert min(rates[-3:]) < 0.02, "it came down"
    lengths = [len(indices) for indices in module.epochs().values()]
    assert "sparse" in stages.values()
    if "max_steps" not in limits:
        assert lengths == [120 if stages[e] == "sparse" else lengths[0] for e in range(len(lengths))] or limits.get(
            "limit_train_batches"
        )


def test_estimated_steps_without_prune_and_outside_a_fit_are_lightnings_own() -> None:
    module = fresh(Cycle)
    trainer = fit(module, loader(), SparseSelectionCallback(), max_epochs=4)
    assert module.steps == 4 * 10
    trainer = fit(fresh(Cycle), loader(), pruned())
    assert type(trainer) is pl.Trainer
    assert type(trainer.fit_loop) is _FitLoop


def test_the_planned_number_of_steps_is_offered_by_the_callback() -> None:
    callback = pruned()
    told = []

    class Asks(Witness):
        def configure_optimizers(self) -> Any:
            told.append(callback.planned_steps(self.trainer))
            return super().configure_optimizers()

    trainer = fit(fresh(Asks), loader(shuffle=True), callback)
    assert told == [2 * 10 + 2 * 4] == [trainer.global_step]


class Counts(pl.Callback):
    """Batches of each epoch when it ends, and where validation ran."""

    def __init__(self) -> None:
        self.totals, self.validated, self.last = [], [], []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.totals.append(trainer.num_training_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            self.last.append((trainer.current_epoch, batch_idx))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated.append((trainer.current_epoch, trainer.fit_loop.batch_idx))


VALIDATION = [
    ({}, [(0, 9), (1, 3), (2, 3), (3, 9)]),
    ({"val_check_interval": 0.5}, [(0, 4), (0, 9), (1, 1), (1, 3), (2, 1), (2, 3), (3, 4), (3, 9)]),
    (
        {"val_check_interval": 2},
        [(0, b) for b in (1, 3, 5, 7, 9)] + [(1, 1), (1, 3), (2, 1), (2, 3)] + [(3, b) for b in (1, 3, 5, 7, 9)],
    ),
    ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [(0, 6), (1, 3), (3, 2), (3, 9)]),
    ({"check_val_every_n_epoch": 2}, [(1, 3), (3, 9)]),
]


@pytest.mark.parametrize(("limits", "expected"), VALIDATION, ids=[str(limits) for limits, _ in VALIDATION])
@pytest.mark.parametrize("workers", [0, 1])
def test_validation_comes_when_it_is_due(limits: dict[str, Any], expected: Any, workers: int) -> None:
    counts, data = Counts(), loader(shuffle=True, num_workers=workers)
    fit(fresh(), data, counts, pruned(), val=DataLoader(TensorDataset(Indexed().x, Indexed().y), 150), **limits)
    assert counts.totals == [10, 4, 4, 10]
    assert counts.last == [(0, 9), (1, 3), (2, 3), (3, 9)]
    assert counts.validated == expected


def test_one_loader_may_train_and_validate() -> None:
    data = loader()
    sampler, sizes = data.batch_sampler.sampler, []

    class Sizes(pl.Callback):
        def on_validation_batch_start(self, *args: Any) -> None:
            sizes.append(len(args[2][0]))

    fit(fresh(), data, pruned(), Sizes(), val=data, num_sanity_val_steps=0)
    assert sum(sizes) == 4 * SIZE
    assert data.batch_sampler.sampler is sampler, "the user's loader is as it was"


@pytest.mark.parametrize("first", [True, False])
def test_progress_bar_totals(first: bool) -> None:
    totals: list[Any] = []

    class Bar(TQDMProgressBar):
        def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            super().on_train_epoch_start(trainer, *args)
            totals.append(self.train_progress_bar.total)

    callbacks = [Bar(), pruned()] if first else [pruned(), Bar()]
    fit(fresh(), loader(shuffle=True), *callbacks, enable_progress_bar=True)
    assert totals == [10, 4, 4, 10]


def test_reloaded_loaders_are_pruned_like_the_first() -> None:
    module = fresh()

    class Data(pl.LightningDataModule):
        made = 0

        def train_dataloader(self) -> Any:
            self.made += 1
            return loader(shuffle=True, num_workers=1)

    data = Data()
    fit(module, data, pruned(), reload_dataloaders_every_n_epochs=1)
    assert data.made == 4
    seen = module.epochs()
    assert [len(seen[e]) for e in range(4)] == [SIZE, 120, 120, SIZE]
    for epoch in (1, 2):
        planned = plan_by_hand(module, list(range(SIZE)), epoch=epoch, count=120)
        assert sorted(seen[epoch]) == planned, "what was remembered outlives the loader"


@pytest.mark.parametrize(("options", "expected"), [({"fast_dev_run": True}, [13]), ({"max_steps": 12}, [SIZE, 64])])
def test_short_runs(options: dict[str, Any], expected: list[int]) -> None:
    module = fresh()
    trainer = quiet_trainer(callbacks=[pruned(), TwoStageScheduler()], **{"max_epochs": 4, **options})
    trainer.fit(module, loader(shuffle=True))
    assert [len(indices) for indices in module.epochs().values()] == expected


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


# ---------------------------------------------------------------------- refusals


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Indexed())


class Pairs(BatchSampler):
    """A batch sampler with a rule of its own."""


class Unsized(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(SIZE))


class Stateful(DataLoader[Any]):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Names(Sampler[Any]):
    def __iter__(self) -> Any:
        return (str(i) for i in range(SIZE))

    def __len__(self) -> int:
        return SIZE


class Shorter(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(SIZE - 1))

    def __len__(self) -> int:
        return SIZE


class Beyond(Shorter):
    def __iter__(self) -> Any:
        return iter(range(1, SIZE + 1))


class Endless(Shorter):
    def __iter__(self) -> Any:
        return (i % SIZE for i in itertools.count())


class Shuffles(DataLoader[Any]):
    """Batches in an order of its own."""

    def __iter__(self) -> Any:
        return iter(random.sample(list(super().__iter__()), len(self)))


class Plain:
    """An iterable that is no DataLoader."""

    def __iter__(self) -> Any:
        return iter([(Indexed().x[:8], Indexed().y[:8], torch.arange(8))] * 4)


def two_loaders() -> Any:
    return {"a": loader(), "b": loader()}


REFUSED = [
    (lambda: loader(dataset=Stream()), "a map-style dataset: an IterableDataset cannot skip"),
    (
        lambda: loader(batch_sampler=Pairs(SequentialSampler(range(SIZE)), 32, False), batch_size=1),
        "torch's own BatchSampler, got Pairs",
    ),
    (lambda: loader(batch_size=None), "needs batch_size: with batch_size=None"),
    (two_loaders, "one training dataloader, got 2"),
    (lambda: loader(num_workers=1, in_order=False), "needs in_order=True"),
    (lambda: Stateful(Indexed(), batch_size=32), "Stateful restores its own position"),
    (Plain, "needs a torch DataLoader, got"),
    (lambda: loader(sampler=Unsized()), "the sampler has no __len__"),
    (lambda: loader(sampler=Names()), "a sampler of integer dataset indices: Names yields others"),
    (lambda: loader(sampler=Shorter()), "Shorter drew 299 samples where its length was 300"),
    (lambda: loader(sampler=Endless()), "Endless drew more than 300 samples where its length was 300"),
    (lambda: Shuffles(Indexed(), batch_size=32), "Shuffles iterates in a way of its own"),
    (lambda: loader(sampler=Beyond()), r"Beyond drew indices outside \[0, 300\)"),
    (
        lambda: loader(collate_fn=lambda rows: torch.utils.data.default_collate(rows[1:])),
        "batch 0 holds 31 samples where 32 were drawn",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_pruned_is_refused_before_the_first_batch(make: Any, message: str) -> None:
    module = fresh()
    with pytest.raises(ConfigurationError, match=message):
        fit(module, make(), pruned(), limit_train_batches=5)
    assert module.batches == []


def test_faults_of_the_loader_come_together() -> None:
    data = Stateful(
        Indexed(), batch_sampler=Pairs(SequentialSampler(range(SIZE)), 32, False), num_workers=1, in_order=False
    )
    with pytest.raises(ConfigurationError) as raised:
        fit(fresh(), data, pruned())
    assert len(raised.value.faults) == 3


@pytest.mark.parametrize(
    ("options", "limits", "message"),
    [
        ({"controller": PIController()}, {}, "a controller would have nothing to correct"),
        ({}, {"warmup": 0.4, "cooldown": 0.4, "max_epochs": 2}, "no epoch would be pruned"),
        ({}, {"val_check_interval": 5}, "val_check_interval=5 is more than the 4 batches of a pruned epoch"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: Any, limits: Any, message: str) -> None:
    module = fresh()
    val = DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=150)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, loader(), pruned(**options), val=val, **limits)
    assert module.batches == []


def test_a_data_set_that_changes_its_length_is_refused() -> None:
    class Data(pl.LightningDataModule):
        size = SIZE

        def train_dataloader(self) -> Any:
            self.size -= 1
            return loader(dataset=Indexed(self.size))

    with pytest.raises(ConfigurationError, match="had 299 samples and has 298 now"):
        fit(fresh(), Data(), pruned(), reload_dataloaders_every_n_epochs=1)


def test_a_data_set_that_shrinks_in_place_is_refused() -> None:
    dataset = Indexed()

    class Shrink(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            dataset.x = dataset.x[:-10]

    with pytest.raises(ConfigurationError, match="had 300 samples and has 290 now"):
        fit(fresh(), loader(dataset=dataset), pruned(), Shrink())


def test_the_module_and_the_trainer_are_free_after_a_failure() -> None:
    class Fails(Witness):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    module, callback = fresh(Fails), pruned()
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(module, loader(dataset=Indexed(290)))
    assert type(trainer) is pl.Trainer
    assert "training_step" not in vars(module)
    trainer.fit(fresh(), loader())  # a second fit starts anew, on another data set


def epochs_by_hand(module: Witness) -> dict[int, list[int]]:
    """What a run without shuffling must load."""
    everyone = list(range(SIZE))
    return {e: everyone if e in (0, 3) else plan_by_hand(module, everyone, epoch=e, count=120) for e in range(4)}


@pytest.mark.parametrize(
    "hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_validation_start"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_may_be_looked_into_at_any_time(hook: str, workers: int) -> None:
    """As for a picture of a batch, or BatchNorm's statistics: it is the user's own, and the run goes on as planned."""
    seen = []

    class Looks(pl.Callback):
        pass

    def look(self: Any, trainer: pl.Trainer, *_: Any) -> None:
        assert len(trainer.train_dataloader) == 10
        seen.append(sum(len(batch[0]) for batch in itertools.islice(trainer.train_dataloader, 10 * (not seen) + 1)))

    setattr(Looks, hook, look)
    module, callback = fresh(), pruned()
    val = DataLoader(TensorDataset(Indexed().x, Indexed().y), 150)
    limits = {"val": val, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    trainer = fit(module, loader(num_workers=workers), callback, Looks(), **limits)
    assert seen[0] == SIZE
    assert module.epochs() == epochs_by_hand(module)
    callback.session.epochs.history.fold()
    assert torch.allclose(callback.session.epochs.history.significance(), history_by_hand(module, 4).significance())
    assert sum(len(batch[0]) for batch in trainer.train_dataloader) == SIZE


@pytest.mark.parametrize("reload", [0, 1])
def test_a_combined_loader_is_the_users_too(reload: int) -> None:
    combined = CombinedLoader(loader(), "min_size")
    for _ in range(2):
        module = fresh()
        fit(module, combined, pruned(), reload_dataloaders_every_n_epochs=reload)
        assert [len(indices) for indices in module.epochs().values()] == [SIZE, 120, 120, SIZE]
    plain = fresh()
    quiet_trainer(max_epochs=1).fit(plain, combined)
    assert plain.epochs() == {0: list(range(SIZE))}


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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 5}])
@pytest.mark.parametrize("make", [RandomSampler, None])
def test_dense_leaves_the_users_generator_where_the_plain_run_does(workers: int, limits: Any, make: Any) -> None:
    """torch's RandomSampler draws once more when it is asked for one index more than it has, which not all loaders do."""
    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        generator, module = torch.Generator().manual_seed(1), fresh()
        how = {"sampler": make(range(SIZE), generator=generator)} if make else {"shuffle": True, "generator": generator}
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=3, **limits)
        trainer.fit(module, loader(batch_size=30, num_workers=workers, **how))
        runs.append((module, generator.get_state()))
    assert runs[0][0].epochs() == runs[1][0].epochs()
    assert torch.equal(runs[0][1], runs[1][1])
    assert_same_weights(*(weights(module) for module, _ in runs))


def test_one_loader_that_is_reloaded_keeps_its_workers() -> None:
    class Data(pl.LightningDataModule):
        kept = loader(shuffle=True, num_workers=1, persistent_workers=True)

        def train_dataloader(self) -> Any:
            return self.kept

    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        module = fresh()
        torch.manual_seed(3)
        quiet_trainer(callbacks=callbacks, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module, Data())
        runs.append(module)
        assert not multiprocessing.active_children()
    assert runs[0].epochs() == runs[1].epochs()


def test_validation_by_the_clock() -> None:
    module, val = fresh(), DataLoader(TensorDataset(Indexed().x, Indexed().y), 150)
    try:
        fit(module, loader(), pruned(), val=val, val_check_interval=timedelta(seconds=0.01))
    except (MisconfigurationException, TypeError):
        pytest.skip("this Lightning does not validate by the clock")
    assert module.epochs() == epochs_by_hand(module)


def test_no_training_batches() -> None:
    """As without this callback: nothing is trained, and the trainer's estimate is its own."""
    module = fresh()

    class Asks(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.steps = trainer.estimated_stepping_batches

    plain, asks = Asks(), Asks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(callbacks=[plain], max_epochs=4, limit_train_batches=0).fit(fresh(), loader())
        fit(module, loader(), pruned(), asks, limit_train_batches=0)
    assert module.batches == []
    assert asks.steps == plain.steps


def test_a_second_fit_goes_on() -> None:
    module, callback = fresh(), pruned()
    trainer = fit(module, loader(), callback, cooldown=0, max_epochs=2)
    selected = callback.ledger.selected
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    assert callback.ledger.selected == selected + 2 * 120
    for epoch in (1, 2, 3):
        assert module.epochs()[epoch] == plan_by_hand(module, list(range(SIZE)), epoch=epoch, count=120)
    trainer.fit_loop.max_epochs = 5
    assert type(trainer.fit_loop) is _FitLoop
    with pytest.warns(UserWarning, match="what was remembered is forgotten"):
        trainer.fit(module, loader(dataset=Indexed(200)))
    assert len(callback.session.epochs.history) == 200


def test_copies_and_pickles_after_and_within_a_fit() -> None:
    copies, trainers = [], []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            copies.append(copy.deepcopy(callback))
            if trainer.current_epoch == 1 and not trainers:
                trainers.append(copy.deepcopy(trainer))

    callback = pruned()
    original = fresh()
    trainer = fit(original, loader(), callback, Copies())
    assert original.epochs() == epochs_by_hand(original)
    (within,) = trainers
    assert type(within) is pl.Trainer
    assert type(within.fit_loop) is _FitLoop
    within.callbacks, plain = [], fresh()
    within.fit(plain, loader(dataset=Indexed(60)))
    assert {len(indices) for indices in plain.epochs().values()} == {60}, "a copy without callbacks is a plain trainer"
    copies += [pickle.loads(pickle.dumps(callback)), copy.deepcopy(trainer).callbacks[0]]
    assert copies[-1].ledger.selected == copies[-2].ledger.selected == callback.ledger.selected
    assert copies[0].ledger.selected < callback.ledger.selected
    module = fresh()
    fit(module, loader(), copies[-1])
    assert module.epochs() == epochs_by_hand(module)


@pytest.mark.parametrize("scheduling", [{2: 4}, {0: 4, 2: 1}, {1: 3, 3: 2}])
@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 13}])
def test_steps_with_scheduled_accumulation(scheduling: dict[int, int], limits: dict[str, int]) -> None:
    module = fresh(Cycle)
    trainer = fit(module, loader(), pruned(), GradientAccumulationScheduler(scheduling), cooldown=0, **limits)
    assert trainer.global_step == module.steps


@pytest.mark.parametrize("cooldown", [0, 1])
@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:SWA is currently")
def test_weight_averaging_adds_no_epoch_to_the_plan(cooldown: int) -> None:
    """It does add one to the run where there is BatchNorm, whose statistics it renews."""
    module = fresh(Cycle)
    fit(module, loader(), pruned(), StochasticWeightAveraging(0.05, swa_epoch_start=2), cooldown=cooldown)
    assert module.steps == (2 * 10 + 2 * 4 if cooldown else 10 + 3 * 4)
    lengths = [SIZE, 120, 120, SIZE if cooldown else 120, SIZE]
    assert [len(indices) for indices in module.epochs().values()] == lengths


def test_planned_steps_are_not_known_before_the_fit() -> None:
    with pytest.raises(RuntimeError, match="ask for it in configure_optimizers"):
        pruned().planned_steps(quiet_trainer())


@pytest.mark.parametrize("accumulate", [{0: 1}, {0: 3, 2: 1, 7: 5}])
@pytest.mark.parametrize("schedule", [None, (2, 3), (0.25, 0.25), (0, 1)])
def test_the_planned_run_is_that_of_its_epochs(accumulate: dict[int, int], schedule: Any) -> None:
    """Against a count epoch by epoch, and at once for a run without a foreseeable end."""
    stages = Schedule() if schedule is None else Schedule(warmup_epochs=schedule[0], cooldown_epochs=schedule[1])
    dense, sparse = EpochLengths(100, 10), EpochLengths(40, 4)

    def run(**limits: Any) -> PlannedRun:
        return PlannedRun(stages, dense, sparse, accumulate, **{"max_epochs": None, "max_steps": None, **limits})

    def steps(total: int) -> int:
        count = 0
        for epoch in range(total):
            factor = accumulate[max(e for e in accumulate if e <= epoch)]
            length = sparse if run(max_epochs=total).stage(epoch) == "sparse" else dense
            count += -(-length.batches // factor)
        return count

    for total in range(1, 20):
        planned = run(max_epochs=total)
        assert planned.steps == steps(total)
        assert planned.sparse_epochs() == sum(planned.stage(epoch) == "sparse" for epoch in range(total))
    for most in range(1, 60):
        planned = run(max_steps=most)
        assert steps(planned.total_epochs - 1) < most <= steps(planned.total_epochs)
        assert planned.steps == most
    endless = run(max_steps=10**12)
    assert endless.stage(endless.total_epochs // 2) == "sparse"


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


class Tunable(Cycle):
    """What Lightning's tuner wants of a module."""

    lr, batch_size = 0.1, 32

    def train_dataloader(self) -> Any:
        return loader(shuffle=True, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=100)


@pytest.mark.parametrize(
    "cls", [Tunable, type("Plain", (Tunable,), {"configure_optimizers": PlainNet.configure_optimizers})]
)
@pytest.mark.parametrize("tuner", ["lr_find", "LearningRateFinder", "scale_batch_size"])
def test_the_tuner_works_on_dense_trials_and_leaves_the_run_alone(
    tuner: str, cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = fresh(cls)
    callbacks: list[Any] = [pruned(), TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1)]
    if tuner == "LearningRateFinder":
        callbacks.append(LearningRateFinder(num_training_steps=25, min_lr=0.01))
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=4, num_sanity_val_steps=0)
    if tuner == "lr_find":
        Tuner(trainer).lr_find(module, num_training=25, min_lr=0.01)
    elif tuner == "scale_batch_size":
        Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=1, init_val=20)
    trials = 25 if tuner == "LearningRateFinder" else 0
    module.batches = module.batches[:0]
    trainer.fit(module)
    module.batches = module.batches[trials:]
    seen = module.epochs()
    assert sorted(seen[0]) == sorted(seen[3]) == list(range(SIZE)), "all of them, once"
    assert [len(seen[e]) for e in range(4)] == [SIZE, 120, 120, SIZE]
    assert sorted(seen[1]) == sorted(plan_by_hand(module, list(range(SIZE)), epoch=1, count=120))
