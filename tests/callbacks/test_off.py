"""Off means off: what the callback does not need it lets go of, and what it does not change is the plain run, bitwise."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ast import PIController, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.core.batch.finite import all_finite, finite_samples, replace_samples
from lightning_ast.core.history import SignificanceHistory
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.selection import quarantine as _quarantine
from lightning_ast.selection.quarantine import Quarantine
from lightning_ast.selection.step_state import BatchFacts, StepState
from tests.conftest import PlainNet, assert_same_weights, loader, quiet_trainer, weights

Digits = tuple[Tensor, Tensor]
MODES = ["mask", "subset", "partial", "prune"]
BATCH = 16


def ours(mode: str, *, warmup: Any = 1, cooldown: Any = 0, **options: Any) -> list[Any]:
    """The selection first, the schedule behind it."""
    selection = SparseSelectionCallback(**{"mode": mode, "target_activation_rate": 0.5, **options})
    return [selection, TwoStageScheduler(warmup_epochs=warmup, cooldown_epochs=cooldown)]


def fresh(cls: type[Any] = PlainNet, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(**options)


@pytest.fixture
def few(digits: Digits) -> Digits:
    """Eight batches."""
    return digits[0][: 8 * BATCH], digits[1][: 8 * BATCH]


def data(few: Digits, **options: Any) -> Any:
    return loader(few, **{"batch_size": BATCH, **options})


def seed(value: int = 1) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def assert_clean(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Nothing of the callback is left on either."""
    assert not {"training_step", "per_sample_loss", "log", "log_dict"} & set(vars(module))
    assert type(trainer) is pl.Trainer
    assert type(trainer.fit_loop) is _FitLoop


# ---------------------------------------------------------------------- 1. nothing is kept


class Watched(PlainNet):
    """Follows the memory of what each training step is given and makes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps = 0
        self.made: list[tuple[int, str, StorageWeakRef]] = []
        self.net[0].register_forward_hook(lambda module, inputs, output: self.watch(hidden=output))

    def watch(self, **tensors: Tensor) -> None:
        self.made += [(self.steps, name, StorageWeakRef(t.untyped_storage())) for name, t in tensors.items()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        scores = self(x)
        self.watch(x=x, y=y, scores=scores)
        loss = F.cross_entropy(scores, y)
        self.watch(loss=loss)
        self.log("train_loss", loss)
        return loss


class Alive(pl.Callback):
    """At the end of each batch: ``(age in steps, name)`` of the tensors that still have their memory."""

    def __init__(self) -> None:
        self.seen: list[set[tuple[int, str]]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        module.watch(loaded=module.unpack(batch)[0])

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        gc.collect()
        module.made = [(step, name, ref) for step, name, ref in module.made if not ref.expired()]
        self.seen.append({(module.steps - step, name) for step, name, _ in module.made})
        module.steps += 1


class Hoarder(pl.Callback):
    """The fault that these tests are there to find."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(batch[0])


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Collections that look at nothing older."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_watched(callbacks: list[Any], few: Digits, *, epochs: int = 2) -> None:
    seed()
    with only_new_objects():
        quiet_trainer(callbacks=callbacks, max_epochs=epochs).fit(fresh(Watched), data(few))


@pytest.mark.parametrize(("spoiled", "place"), [(False, "before"), (False, "after"), (True, "after")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
def test_nothing_of_a_batch_outlives_the_next(few: Digits, mode: str, spoiled: bool, place: str) -> None:
    x = few[0].clone()
    if spoiled:
        x[[3, 2 * BATCH + 5, 3 * BATCH], 0, 2, 2] = torch.nan
    plain, alive = Alive(), Alive()
    run_watched([plain], (x, few[1]))
    callbacks = ours(mode, quarantine_limit=1.0)
    run_watched([alive, *callbacks] if place == "before" else [*callbacks, alive], (x, few[1]))

    assert len(alive.seen) == (16 if mode != "prune" else 8 + 4)
    assert any(plain.seen), "the plain run holds its batch: the instrument sees something"
    for step, tensors in enumerate(alive.seen):
        assert not [name for age, name in tensors if age > 0], f"step {step} still holds {tensors}"
        if place == "after":
            assert tensors <= plain.seen[0], f"at the end of step {step}, more than plain Lightning holds"
    assert callbacks[0].ledger.selected < callbacks[0].ledger.offered
    assert bool(callbacks[0].quarantined) == spoiled


def test_the_instrument_finds_what_is_kept(few: Digits) -> None:
    alive = Alive()
    run_watched([Hoarder(), alive], few)
    assert {(15, "x"), (15, "loaded")} <= alive.seen[-1]


class Census(pl.Callback):
    """The most tensors and bytes that were alive at the end of a batch, by epoch; those of the start are not counted."""

    def __init__(self) -> None:
        self.count: dict[int, int] = defaultdict(int)
        self.bytes: dict[int, int] = defaultdict(int)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        gc.collect()
        found = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        size = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        epoch = trainer.current_epoch
        self.count[epoch] = max(self.count[epoch], len(found))
        self.bytes[epoch] = max(self.bytes[epoch], sum(size.values()))


@pytest.mark.parametrize("mode", ["plain", "hoarder", *MODES])
def test_live_tensors_do_not_grow(few: Digits, mode: str) -> None:
    """Five dense epochs, then five sparse ones: 80 steps (60 in ``prune``), no more tensors in the last than in the
    second of each, where the moments of the optimizer and the books are there.
    """
    census = Census()
    before = {"plain": [], "hoarder": [Hoarder()]}.get(mode) or (ours(mode, warmup=5) if mode in MODES else [])
    seed()
    with only_new_objects():
        trainer = quiet_trainer(callbacks=[*before, census], max_epochs=10, log_every_n_steps=1)
        trainer.fit(fresh(), data(few))
    grown = [census.count[last] - census.count[first] for first, last in ((1, 4), (6, 9))]
    more = [census.bytes[last] - census.bytes[first] for first, last in ((1, 4), (6, 9))]
    if mode == "hoarder":
        assert min(grown) >= 3 * 8
        assert min(more) >= 3 * 8 * BATCH * 64 * 4
    else:
        assert max(grown) <= 0
        assert max(more) <= 12 * BATCH, "positions and weights of the last selection, whose size varies"


# ---------------------------------------------------------------------- 2. generators and buffers


class Draws(PlainNet):
    """Draws from every global generator in each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        self.drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
        loss = F.cross_entropy(self(x * (1 + 0.1 * self.drawn)), y)
        self.log("train_loss", loss)
        return loss


class AtEpochEnd(pl.Callback):
    """Weights with buffers, moments and generators at the end of each epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.random: list[Any] = []
        self.momenta: list[list[Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.weights.append(weights(module))
        self.random.append(random_state())
        state = trainer.optimizers[0].state.values()
        self.momenta.append([s["momentum_buffer"].clone() for s in state if "momentum_buffer" in s])


@pytest.mark.parametrize("mode", MODES)
def test_a_warmup_leaves_generators_and_buffers_where_the_plain_run_does(few: Digits, mode: str) -> None:
    ends = []
    for callbacks in ([], ours(mode, warmup=2)):
        ends.append(AtEpochEnd())
        seed()
        quiet_trainer(callbacks=[*callbacks, ends[-1]], max_epochs=3).fit(fresh(Draws), data(few, shuffle=True))
    for epoch in (0, 1):
        assert_same_weights(ends[0].weights[epoch], ends[1].weights[epoch])
        assert ends[0].random[epoch] == ends[1].random[epoch]
        assert all(torch.equal(a, b) for a, b in zip(ends[0].momenta[epoch], ends[1].momenta[epoch]))
    assert int(ends[1].weights[1]["net.1.num_batches_tracked"]) == 16
    assert any(not torch.equal(t, ends[1].weights[2][n]) for n, t in ends[0].weights[2].items()), "the third is sparse"


@pytest.mark.parametrize(("mode", "dropout"), [("mask", 0.1), ("partial", 0.1), ("subset", 0.0)])
@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_sparse_steps_draw_from_a_generator_of_their_own(few: Digits, mode: str, dropout: float, gate: str) -> None:
    """``subset`` without dropout, which draws for fewer samples there."""
    ends = []
    for callbacks in ([], [SparseSelectionCallback(mode=mode, gate=gate, target_activation_rate=0.5)]):
        ends.append(AtEpochEnd())
        seed()
        module = fresh(Draws, dropout=dropout)
        quiet_trainer(callbacks=[*callbacks, ends[-1]], max_epochs=2).fit(module, data(few, shuffle=True))
    assert ends[0].random == ends[1].random
    assert any(not torch.equal(t, ends[1].weights[1][n]) for n, t in ends[0].weights[1].items())


# ---------------------------------------------------------------------- 3. copies and pickles

HOOKS = ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_start"]


class DigitsData(pl.LightningDataModule):
    """What a user writes; with the attribute that the batch size finder wants."""

    def __init__(self, few: Digits, batch_size: int = BATCH) -> None:
        super().__init__()
        self.few, self.batch_size = few, batch_size

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*self.few), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*self.few), 2 * self.batch_size)


class Copies(pl.Callback):
    """Copies everything in two ways, once in each hook of each epoch."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.found: list[tuple[str, int, dict[str, Tensor], Any, list[Any], Any]] = []
        self.done: set[tuple[str, int]] = set()

    def duplicate(self, value: Any) -> Any:
        return copy.deepcopy(value) if self.how == "deepcopy" else pickle.loads(pickle.dumps(value))

    def take(self, hook: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or (hook, trainer.current_epoch) in self.done:
            return
        self.done.add((hook, trainer.current_epoch))
        others = [c for c in trainer.callbacks if c is not self]
        mine = trainer.callbacks
        trainer.callbacks = others  # a datamodule brings its trainer, and that its callbacks: not these copies again
        try:
            copies = [self.duplicate(value) for value in (module, others, trainer.datamodule)]
        finally:
            trainer.callbacks = mine
        self.found.append((hook, trainer.current_epoch, weights(module), *copies))

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.take("on_train_batch_start", trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.take("on_train_batch_end", trainer, module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.take("on_train_epoch_end", trainer, module)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.take("on_validation_start", trainer, module)


def like(module: PlainNet) -> PlainNet:
    """A new module with the same weights, each part of it in the same mode: a fit does not switch to training."""
    new = fresh(type(module))
    new.load_state_dict(module.state_dict())
    for part, original in zip(new.modules(), module.modules()):
        part.training = original.training
    return new


def train_plainly(module: PlainNet, datamodule: DigitsData) -> dict[str, Tensor]:
    seed(5)
    trainer = quiet_trainer(limit_train_batches=3, limit_val_batches=0)
    trainer.fit(module, datamodule=datamodule)
    return weights(module)


@pytest.mark.parametrize(
    ("how", "place"),
    [
        ("deepcopy", "after"),
        ("pickle", "before"),
        pytest.param("deepcopy", "before", marks=pytest.mark.slow),
        pytest.param("pickle", "after", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_copies_within_and_after_a_fit_are_their_own(few: Digits, mode: str, how: str, place: str) -> None:
    copies, module, datamodule = Copies(how), fresh(), DigitsData(few)
    callbacks = [] if mode == "plain" else ours(mode)
    seed()
    trainer = quiet_trainer(callbacks=[copies, *callbacks] if place == "before" else [*callbacks, copies], max_epochs=2)
    trainer.fit(module, datamodule=datamodule)
    assert [(hook, epoch) for hook, epoch, *_ in copies.found] == [
        (hook, epoch)
        for epoch in (0, 1)
        for hook in ("on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_train_epoch_end")
    ]
    copies.take("after", trainer, module)
    final = weights(module)
    for _, _, then, its_module, its_callbacks, its_data in copies.found:
        assert_same_weights(then, weights(its_module))
        reference = like(its_module)
        expected = train_plainly(reference, DigitsData(few))
        assert_same_weights(expected, train_plainly(its_module, its_data))
        assert [type(c) for c in its_callbacks] == [type(c) for c in callbacks]
    assert_same_weights(final, weights(module))
    assert_clean(trainer, module)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_a_copy_of_the_module_does_not_keep_the_original(few: Digits, mode: str, how: str) -> None:
    """The best model of each of many runs is kept: not the others, with their trainers and optimizers."""
    with only_new_objects():
        copies, module = Copies(how), fresh()
        callbacks = [] if mode == "plain" else ours(mode)
        trainer = quiet_trainer(callbacks=[*callbacks, copies], max_epochs=2)
        trainer.fit(module, data(few))
        kept = [its_module for _, _, _, its_module, _, _ in copies.found]
        original = weakref.ref(module)
        del copies, module, trainer, callbacks
        gc.collect()
        assert len(kept) == 6
        assert original() is None


@pytest.mark.parametrize(
    ("mode", "controller"), [*((mode, False) for mode in MODES), *((mode, True) for mode in MODES[:3])]
)
def test_a_copy_of_the_callback_made_within_a_fit_starts_as_a_new_one(few: Digits, mode: str, controller: bool) -> None:
    def make() -> list[Any]:
        return ours(mode, seed=3, controller=PIController(kp=0.3) if controller else None)

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 10:
                self.copied = copy.deepcopy(trainer.callbacks[:2])
                self.offered = trainer.callbacks[0].ledger.offered

    copying = Copy()
    quiet_trainer(callbacks=[*make(), copying], max_epochs=2).fit(fresh(), data(few))
    assert copying.copied[0].ledger.offered == copying.offered > 0, "with its books, outside the fit"
    assert copying.copied[0].activation_rate is None
    ends = []
    for callbacks in (make(), copying.copied):
        module = fresh()
        seed()
        quiet_trainer(callbacks=callbacks, max_epochs=2).fit(module, data(few))
        ends.append((weights(module), callbacks[0].ledger.offered, callbacks[0].ledger.selected))
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


# ---------------------------------------------------------------------- 4. evaluation


class Evaluated(Draws):
    """Also tests and predicts; a random number takes part, so that a generator that was moved is seen."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.unpack(batch)
        self.log("val_loss", F.cross_entropy(self(x + 0.01 * torch.rand_like(x)), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.unpack(batch)
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]) + torch.rand(())


def evaluate(trainer: pl.Trainer, module: pl.LightningModule, few: Digits) -> list[Any]:
    seed(7)
    values: list[Any] = [getattr(trainer, do)(module, data(few), verbose=False) for do in ("validate", "test")]
    return [*values, torch.cat(trainer.predict(module, data(few))).tolist(), random_state()]


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_before_between_and_after_fits(few: Digits, mode: str) -> None:
    module = fresh(Evaluated)
    trainer = quiet_trainer(callbacks=ours(mode), max_epochs=2)

    def check() -> None:
        plain = fresh(Evaluated)
        plain.load_state_dict(module.state_dict())
        plain.drawn = getattr(module, "drawn", 0.0)
        assert evaluate(quiet_trainer(), plain, few) == evaluate(trainer, module, few)
        assert_clean(trainer, module)

    check()
    trainer.fit(module, data(few))
    check()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data(few))
    assert trainer.callbacks[0].ledger.selected < trainer.callbacks[0].ledger.offered
    check()


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_within_a_fit(few: Digits, mode: str) -> None:
    """Every validation, twice an epoch, is that of the weights of the moment."""
    seen: list[tuple[dict[str, Tensor], Any, float]] = []

    class Spy(pl.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            self.start = weights(module), torch.get_rng_state()

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append((*self.start, trainer.callback_metrics["val_loss"].item()))
                assert_same_weights(self.start[0], weights(module))

    trainer = quiet_trainer(callbacks=[Spy(), *ours(mode)], max_epochs=2, val_check_interval=0.5)
    trainer.fit(fresh(Evaluated), data(few), data(few))
    assert len(seen) == 4
    assert trainer.callbacks[1].ledger.selected < trainer.callbacks[1].ledger.offered
    for then, generator, value in seen:
        plain = fresh(Evaluated)
        plain.load_state_dict(then)
        loaded = data(few)

        class Replay(pl.Callback):
            def on_validation_start(self, trainer: Any, module: Any, generator: Any = generator) -> None:
                torch.set_rng_state(generator)

        (metrics,) = quiet_trainer(callbacks=[Replay()]).validate(plain, loaded, verbose=False)
        assert metrics["val_loss"] == value


# ---------------------------------------------------------------------- 5. the tuner


class Tunable(PlainNet):
    """What Lightning's tuner wants of a module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lr = 0.05

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@pytest.mark.parametrize("tool", ["lr_find", "scale_batch_size", "LearningRateFinder", "BatchSizeFinder"])
@pytest.mark.parametrize("mode", [*(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[:2]), *MODES[2:]])
def test_the_tuner_finds_what_it_finds_without(
    digits: Digits, mode: str, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve, what is suggested, and the warmup of the fit that follows, bitwise; which then is sparse."""
    monkeypatch.chdir(tmp_path)
    search = {"min_lr": 1e-3, "max_lr": 3.0, "early_stop_threshold": None}
    scaling = {"mode": "power", "steps_per_trial": 2, "init_val": 8, "max_trials": 2}
    found: list[Any] = []
    ends: list[AtEpochEnd] = []
    for selection in ([], ours(mode)):
        module, datamodule = fresh(Tunable), DigitsData((digits[0][:256], digits[1][:256]))
        ends.append(AtEpochEnd())
        finder: Any = None
        if tool == "LearningRateFinder":
            finder = LearningRateFinder(num_training_steps=20, **search)
        elif tool == "BatchSizeFinder":
            finder = BatchSizeFinder(**scaling)
        callbacks = [*selection, ends[-1], *([] if finder is None else [finder])]
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=3, num_sanity_val_steps=0)
        seed()
        if tool == "lr_find":
            result = Tuner(trainer).lr_find(module, datamodule=datamodule, num_training=20, **search)
            found.append((result.results, result.suggestion(), random_state()))
        elif tool == "scale_batch_size":
            with only_new_objects():
                size = Tuner(trainer).scale_batch_size(module, datamodule=datamodule, **scaling)
            found.append((size, random_state()))
        with only_new_objects():
            trainer.fit(module, datamodule=datamodule)
        if tool == "LearningRateFinder":
            found.append((finder.optimal_lr.results, finder.optimal_lr.suggestion()))
        elif tool == "BatchSizeFinder":
            found.append(finder.optimal_batch_size)
        found[-1] = (found[-1], module.lr, datamodule.batch_size)
        assert trainer.current_epoch == 3
        if selection:
            assert_clean(trainer, module)
            ledger = selection[0].ledger
            assert ledger.offered == 3 * 256, "the trials are not in the books"
            assert 256 + 0.4 * 512 < ledger.selected < 256 + 0.6 * 512
    assert found[0] == found[1]
    if tool.endswith("Finder") and not hasattr(_FitLoop, "is_resuming"):
        return  # in Lightning 2.5 a finder's own checkpoint resumes the run: another random state, the same samples
    assert_same_weights(ends[0].weights[0], ends[1].weights[0])
    assert ends[0].random[0] == ends[1].random[0]


# ---------------------------------------------------------------------- 6. trainers of all kinds


class Quiet(PlainNet):
    """Logs nothing while it trains."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        return F.cross_entropy(self(x), y)


KINDS: dict[str, tuple[dict[str, Any], Any, int]] = {  # options, other callbacks, optimizer steps of the plain run
    "fast_dev_run": ({"fast_dev_run": True}, lambda: [], 1),
    "overfit_batches": ({"overfit_batches": 2}, lambda: [], 6),
    "one batch": ({"limit_train_batches": 1}, lambda: [], 3),
    "barebones": ({"barebones": True}, lambda: [], 24),
    "anomaly": ({"detect_anomaly": True}, lambda: [], 24),
    "clipped": ({"gradient_clip_val": 0.1}, lambda: [], 24),
    "averaged": ({}, lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)], 25),
    "stopped early": ({}, lambda: [EarlyStopping("val_loss", patience=0, min_delta=10.0)], 16),
    "checkpoints": ({"enable_checkpointing": True}, lambda: [ModelCheckpoint(monitor="val_loss", save_top_k=2)], 24),
}


def run_kind(kind: str, few: Digits, callbacks: list[Any], tmp_path: Path) -> tuple[pl.Trainer, PlainNet]:
    options, others, _ = KINDS[kind]
    options = {"max_epochs": 3, "default_root_dir": tmp_path, **options}
    seed()
    module = fresh(Quiet)
    if kind == "barebones":
        options = {"barebones": True, "max_epochs": 3, "accelerator": "cpu", "devices": 1}
        trainer = pl.Trainer(**options, callbacks=callbacks)
    else:
        trainer = quiet_trainer(**options, callbacks=[*callbacks, *others()])
    shuffle = kind != "overfit_batches"
    with warnings.catch_warnings():
        for message in (
            "Swapping scheduler",
            "SWA is currently",
            ".*barebones",
            ".*anomaly",
            "You requested to overfit",
        ):
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, data(few, shuffle=shuffle), data(few))
    return trainer, module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [pytest.param("mask", marks=pytest.mark.slow), *MODES[1:]])
def test_trainers_of_all_kinds(few: Digits, mode: str, kind: str, tmp_path: Path) -> None:
    """At a rate of 1, and where every epoch is dense, the plain run, bitwise; at a lower rate a sparse one."""
    plain_trainer, plain = run_kind(kind, few, [], tmp_path / "plain")
    assert plain_trainer.global_step == KINDS[kind][2]
    after = random_state()
    whole = SparseSelectionCallback(mode=mode, target_activation_rate=1.0)
    trainer, module = run_kind(kind, few, [whole], tmp_path / "whole")
    assert_same_weights(weights(plain), weights(module))
    assert after == random_state()
    assert trainer.global_step == plain_trainer.global_step
    assert vars(module).keys() == vars(plain).keys()
    assert_clean(trainer, module)

    selection, *schedule = ours(mode)
    trainer, module = run_kind(kind, few, [selection, *schedule], tmp_path / "sparse")
    assert_clean(trainer, module)
    assert all(bool(t.isfinite().all()) for t in weights(module).values())
    assert trainer.current_epoch == plain_trainer.current_epoch
    if mode != "prune":
        assert trainer.global_step == plain_trainer.global_step
    assert selection.stage == "sparse" or kind == "averaged", "which adds an epoch that is not trained on"
    assert selection.ledger.selected < selection.ledger.offered
    if kind == "checkpoints":
        (keeper,) = (c for c in trainer.callbacks if isinstance(c, ModelCheckpoint))
        best = torch.load(keeper.best_model_path, weights_only=True)
        restored = fresh(Quiet)
        restored.load_state_dict(best["state_dict"])
        (metrics,) = quiet_trainer().validate(restored, data(few), verbose=False)
        assert metrics["val_loss"] == pytest.approx(float(keeper.best_model_score), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*max_epochs=0")
def test_no_epoch(few: Digits, mode: str) -> None:
    module = fresh()
    before = weights(module)
    trainer = quiet_trainer(callbacks=[SparseSelectionCallback(mode=mode)], max_epochs=0)
    trainer.fit(module, data(few))
    assert_same_weights(before, weights(module))
    assert_clean(trainer, module)
    assert trainer.callbacks[0].ledger.offered == 0
    assert module.seen == []


class NoMomentum(PlainNet):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_two_fits_are_one_longer_fit(few: Digits, mode: str) -> None:
    """Where the optimizer keeps nothing, which Lightning makes anew, and no stage depends on the length of the run."""
    runs = []
    for lengths in ([4], [2, 4]):
        module = fresh(NoMomentum, dropout=0.0)
        trainer = quiet_trainer(callbacks=[] if mode == "plain" else ours(mode), max_epochs=lengths[0])
        for length in lengths:
            trainer.fit_loop.max_epochs = length
            trainer.fit(module, data(few))
            assert_clean(trainer, module)
        ledgers = [callback.ledger for callback in trainer.callbacks[:1]]
        runs.append((weights(module), [(ledger.offered, ledger.selected) for ledger in ledgers]))
    assert_same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


class Fails(pl.Callback):
    def __init__(self, hook: str, error: type[BaseException], at: int) -> None:
        self.error, self.at = error, at
        setattr(self, hook, self.fail)

    def fail(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.at and not trainer.sanity_checking:
            raise self.error("the user's own")


@pytest.mark.parametrize(
    ("hook", "at", "place", "error"),
    [
        ("on_train_batch_start", 9, "before", RuntimeError),
        ("on_train_batch_start", 9, "after", KeyboardInterrupt),
        ("on_before_backward", 9, "after", RuntimeError),
        ("on_after_backward", 9, "before", KeyboardInterrupt),
        ("on_before_optimizer_step", 9, "after", RuntimeError),
        ("on_validation_start", 9, "after", RuntimeError),
        ("on_train_batch_end", 3, "before", KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_fit_that_fails_leaves_all_clean(
    few: Digits, mode: str, hook: str, at: int, place: str, error: type[BaseException]
) -> None:
    """And the same module and the same callback train on as new ones with the same weights."""
    module, callbacks = fresh(), ours(mode)
    fails = Fails(hook, error, at)
    trainer = quiet_trainer(
        callbacks=[fails, *callbacks] if place == "before" else [*callbacks, fails],
        max_epochs=3,
        val_check_interval=0.5,
    )
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, data(few), data(few))
    assert_clean(trainer, module)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()
    ends = []
    for one, its_callbacks in ((like(module), ours(mode)), (module, callbacks)):
        seed()
        again = quiet_trainer(callbacks=its_callbacks, max_epochs=2)
        again.fit(one, data(few))
        ends.append((weights(one), its_callbacks[0].ledger.offered, its_callbacks[0].ledger.selected))
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


# ---------------------------------------------------------------------- 7. no device is waited for


class NoData(SingleDeviceStrategy):
    """Trains on the ``meta`` device: every operation works, but nothing can be read. Who would wait for a GPU fails."""

    def __init__(self) -> None:
        class Accelerator(CPUAccelerator):
            def setup_device(self, device: torch.device) -> None:
                pass

        super().__init__(device=torch.device("meta"), accelerator=Accelerator())

    def teardown(self) -> None:
        pass


class OnItsWay:
    """News from the device that have not arrived."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer on the ``meta`` device. Two things are put in place of what that device cannot do: Lightning's own look
    at the loader's length before the fit, and the asynchronous copy, which the package has for CUDA alone.
    """

    def send(found: Any) -> None:
        assert found.bad.device.type == "meta"
        found.bad, found.arrived = torch.zeros(found.bad.shape, dtype=torch.bool), OnItsWay()

    monkeypatch.setattr("lightning.pytorch.loops.fit_loop.has_len_all_ranks", lambda *_, **__: True)
    monkeypatch.setattr(_quarantine, "_send", send)


def fit_without_data(few: Digits, callbacks: list[Any], cls: type[PlainNet] = Quiet) -> pl.Trainer:
    """Six warmup steps. The first batch, in which a sample is followed, may wait; here that fails, and is warned of."""

    class Steady(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        strategy=NoData(),
        devices=1,
        callbacks=[*callbacks, Steady()],
        max_epochs=4,
        min_epochs=0,
        log_every_n_steps=1000,
        enable_model_summary=False,
        **defaults,
    )
    trainer.fit(fresh(cls), data(few))
    assert trainer.global_step == 6
    return trainer


@pytest.mark.usefixtures("meta")
def test_without_the_callback_nothing_is_waited_for_and_who_waits_fails(few: Digits) -> None:
    class Waits(Quiet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            loss.item()
            return loss

    fit_without_data(few, [])
    with pytest.raises(RuntimeError, match="meta"):
        fit_without_data(few, [], Waits)


@pytest.mark.filterwarnings("ignore:lightning-ast. the run ended after", "ignore:lightning-ast. which rows belong")
@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_warmup_step_waits_for_no_device(few: Digits, mode: str, warmup: int) -> None:
    """In ``prune`` with a warmup of one epoch the scores of the steps are remembered, too."""
    callbacks = ours(mode, warmup=warmup)
    trainer = fit_without_data(few, callbacks)
    assert callbacks[0].ledger.offered == 6 * BATCH
    assert_clean(trainer, trainer.lightning_module)


def test_looking_for_samples_that_are_not_finite_waits_for_no_device() -> None:
    x, y = torch.rand(8, 3, device="meta"), torch.randint(0, 3, (8,), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        all_finite(x)
    finite = finite_samples(x)
    assert (finite.shape, finite.device.type) == ((8,), "meta")
    assert replace_samples(x, finite).shape == x.shape
    assert replace_samples(y, finite).dtype == y.dtype
    quarantine, plan = Quarantine(0.01, Processes(quiet_trainer())), StepState(BatchFacts(size=8))
    memory = StorageWeakRef(x.untyped_storage())
    quarantine.examine(plan, (x, y))
    assert StorageWeakRef(x.untyped_storage()) != memory
    quarantine.restore()
    assert StorageWeakRef(x.untyped_storage()) == memory
    assert plan.bad.shape == (8,)
    assert not plan.known_bad
    assert quarantine.eligible(plan, torch.rand(8, device="meta")).shape == (8,)
    assert quarantine.lost(torch.rand((), device="meta")) is False


def test_what_says_that_it_waits_for_no_device_does_not() -> None:
    SignificanceHistory(20).observe(torch.arange(8), torch.rand(8, device="meta"))


class SwitchesSync(pl.Callback):
    """In the steady state an operation that waits for the GPU raises: from one batch's start to its end."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        logs = (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % trainer.log_every_n_steps == 0
        strict = trainer.global_step >= self.after and not logs
        self.steps += strict
        torch.cuda.set_sync_debug_mode("error" if strict else "default")

    def on_train_epoch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")


class StopsAfterWarmup(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["plain", *MODES])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_warmup_step_on_a_gpu_waits_for_nothing(digits: Digits, mode: str) -> None:
    """What raises in ``plain`` is Lightning's own."""
    switch = SwitchesSync(after=4)
    trainer = quiet_trainer(
        accelerator="gpu",
        callbacks=[switch, *([] if mode == "plain" else ours(mode)), StopsAfterWarmup()],
        max_epochs=2,
        log_every_n_steps=1000,
    )
    try:
        trainer.fit(fresh(Quiet), data(digits, pin_memory=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert switch.steps >= 16


# ---------------------------------------------------------------------- 8. the order of the callbacks


class Busy(pl.Callback):
    """Draws from the global generators in its hooks, and reads what the others show."""

    def on_train_batch_start(self, *_: Any) -> None:
        random.random(), np.random.rand(), torch.rand(1)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        torch.rand(1)
        for parameter in module.parameters():
            parameter.grad.mul_(0.5)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        torch.rand(1)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_the_callbacks_does_not_matter(few: Digits, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    ends = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 2, 3, 0), (2, 0, 3, 1), (0, 3, 2, 1), (2, 3, 1, 0)):
        selection, schedule = ours(mode, cooldown=1)
        callbacks = [selection, schedule, Busy(), SparseTrainingMonitor()]
        module = fresh()
        seed()
        trainer = quiet_trainer(callbacks=[callbacks[i] for i in order], max_epochs=3, accumulate_grad_batches=2)
        trainer.fit(module, data(few, shuffle=True))
        ledger = selection.ledger
        ends.append((order, weights(module), random_state(), ledger.offered, ledger.selected, selection.threshold))
    assert ends[0][4] < ends[0][3]
    for _, final, *others in ends[1:]:
        assert_same_weights(ends[0][1], final)
        assert others == list(ends[0][2:])
    assert "Skipped" in capsys.readouterr().out
