"""Samples with NaN or infinity: never trained on, counted, named; the others train as if these were not there."""

from __future__ import annotations

import math
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ast import SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import QuarantineError
from tests.callbacks.pruning import Indexed, Witness, pruned
from tests.callbacks.pruning import fit as fit_pruned
from tests.callbacks.test_prune_resume import SaveAt
from tests.callbacks.test_sparse_selection import ExplicitNet, fit, fresh
from tests.conftest import PlainNet, assert_same_weights, gloo, loader, quiet_trainer, weights

Digits = tuple[Tensor, Tensor]
MODES = ["mask", "subset", "partial"]
BAD = [3, 70, 200]

pytestmark = pytest.mark.filterwarnings(
    "ignore:lightning-ast. NaN or infinity",
    "ignore:lightning-ast. the run ended after",  # within the warmup
)


def spoiled(digits: Digits, value: float = math.nan, where: list[int] = BAD) -> Digits:
    x = digits[0].clone()
    x[where, 0, 2, 2] = value
    return x, digits[1]


def finite(module: torch.nn.Module) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in weights(module).values())


def places(callback: SparseSelectionCallback) -> list[int]:
    """Positions in the data of an unshuffled loader of batches of 64."""
    return [64 * s.batch + s.position for s in callback.quarantined if s.position >= 0]


class StopAfter(pl.Callback):
    """Ends a run whose planned length is longer."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.steps


@pytest.mark.parametrize("explicit", [False, True], ids=["captured", "explicit"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_survives_bad_inputs(digits: Digits, mode: str, stage: str, value: float, explicit: bool) -> None:
    """With BatchNorm, which would carry one NaN to the whole batch and to its running statistics."""
    module = fresh(ExplicitNet if explicit else PlainNet)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.01)
    schedule = [TwoStageScheduler(warmup_epochs=1)] if stage == "warmup" else []
    trainer = fit(module, loader(spoiled(digits, value)), callback, *schedule, max_epochs=2, log_every_n_steps=1)
    assert finite(module)
    assert places(callback) == BAD * 2
    assert [s.epoch for s in callback.quarantined] == [0] * 3 + [1] * 3
    assert trainer.callback_metrics["ast/quarantined"] == 3
    if not explicit:
        assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize("mode", ["plain", *MODES])
@pytest.mark.filterwarnings("ignore:lightning-ast")  # whose rows are whose cannot be told where all is NaN
def test_what_it_is_for(digits: Digits, mode: str) -> None:
    """The plain run, and one that does not look, are lost."""
    callbacks = [] if mode == "plain" else [SparseSelectionCallback(mode=mode, quarantine_limit=None)]
    module = fresh()
    fit(module, loader(spoiled(digits)), *callbacks)
    assert not finite(module)


@pytest.mark.parametrize("mode", [*MODES, "prune"])
def test_a_dense_step_equals_one_without_the_bad_samples(digits: Digits, mode: str) -> None:
    """Warmup: the gradient is the mean over the finite samples of each batch, written out by hand."""
    module, reference = fresh(dropout=0.0, batchnorm=False), fresh(dropout=0.0, batchnorm=False)
    callback = SparseSelectionCallback(mode=mode)
    fit(module, loader(spoiled(digits)), callback, TwoStageScheduler(warmup_epochs=1), StopAfter(8), max_epochs=2)
    optimizer = reference.configure_optimizers()
    for step in range(8):
        rows = [i for i in range(64 * step, 64 * step + 64) if i not in BAD]
        optimizer.zero_grad()
        F.cross_entropy(reference(digits[0][rows]), digits[1][rows]).backward()
        optimizer.step()
    for name, value in weights(module).items():
        torch.testing.assert_close(value, weights(reference)[name], rtol=1e-5, atol=1e-6, msg=name)
    assert callback.savings["samples"] == pytest.approx(3 / 512), "they are counted as not trained on"


@pytest.mark.filterwarnings("ignore:lightning-ast. mode='subset' at an activation rate of 90%")  # costs more than dense
@pytest.mark.parametrize("gate", ["soft", "topk", "threshold"])
@pytest.mark.parametrize("mode", MODES)
def test_bad_samples_are_never_selected(digits: Digits, mode: str, gate: str) -> None:
    chosen: set[int] = set()

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            chosen.update((64 * index + callback.last_selection.indices).tolist())

    callback = SparseSelectionCallback(mode=mode, gate=gate, target_activation_rate=0.9)
    fit(fresh(), loader(spoiled(digits)), callback, Spy(), max_epochs=4)
    assert not chosen & set(BAD)
    assert len(chosen) > 400


class BadLoss(PlainNet):
    """Finite inputs; the scores of marked samples (first pixel 9) become NaN, as after a division by zero."""

    explicit = False

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        hurt = x[:, 0, 0, 0] == 9
        return self(x.where(x != 9, torch.zeros_like(x))) / (~hurt).float()[:, None] * 1.0, y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores, y = self.losses(batch)
        loss = F.cross_entropy(scores, y)
        self.log("train_loss", loss)
        return loss


class BadExplicitLoss(SparseLossMixin, BadLoss):
    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        scores, y = self.losses(batch)
        return F.cross_entropy(scores, y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.per_sample_loss(batch, batch_idx).mean()
        self.log("train_loss", loss)
        return loss


def marked(digits: Digits, where: list[int] = BAD) -> Digits:
    x = digits[0].clone()
    x[where, 0, 0, 0] = 9
    return x, digits[1]


@pytest.mark.parametrize("cls", [BadLoss, BadExplicitLoss])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("mode", [*MODES, "prune"])
def test_a_run_survives_bad_losses(digits: Digits, mode: str, stage: str, cls: type[PlainNet]) -> None:
    module = fresh(cls)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.2)  # the first batch may be lost as a whole
    schedule = TwoStageScheduler(warmup_epochs=2 if stage == "warmup" else 0)
    trainer = fit(module, loader(marked(digits)), callback, schedule, StopAfter(16), max_epochs=3)
    assert finite(module)
    found = {s.index for s in callback.quarantined if s.index >= 0} if mode == "prune" else set(places(callback))
    assert found <= set(BAD)
    assert len(found) == 3 or stage == "sparse"
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
def test_the_selection_s_gradient_is_that_without_them(digits: Digits, mode: str, weighting: str) -> None:
    module, reference = (fresh(BadLoss, dropout=0.0, batchnorm=False) for _ in range(2))
    callback = SparseSelectionCallback(mode=mode, weighting=weighting, target_activation_rate=0.5)
    kept, gradients = [], []

    class Spy(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gradients.append([p.grad.clone() for p in pl_module.parameters()])

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            kept.append(callback.last_selection)

    fit(module, loader(marked(digits, [3, 9])), callback, Spy(), max_steps=1, log_every_n_steps=1)
    losses = F.cross_entropy(reference(digits[0][:64]), digits[1][:64], reduction="none")
    picked, w = losses[kept[0].indices], kept[0].weights
    loss = {
        "none": picked.mean,
        "sqrt": lambda: (w * picked).sum() / w.sum(),
        "unbiased": lambda: (w * picked).sum() / 62,
    }[weighting]()
    for got, want in zip(gradients[0], torch.autograd.grad(loss, list(reference.parameters()))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_prune_does_not_load_them_again_before_a_dense_epoch() -> None:
    dataset = Indexed()
    dataset.x = dataset.x.clone()
    dataset.x[[5, 17, 40]] = math.nan
    module, callback = Witness(), pruned(quarantine_limit=0.02)
    fit_pruned(module, DataLoader(dataset, batch_size=32, shuffle=True), callback, max_epochs=5)
    epochs = module.epochs()
    loaded = {epoch: set(indices) & {5, 17, 40} for epoch, indices in epochs.items()}
    assert {s.index for s in callback.quarantined} == {5, 17, 40}
    assert [s.epoch for s in callback.quarantined] == [0] * 3 + [4] * 3, "dense epochs see them, pruned ones do not"
    assert [len(loaded[e]) for e in (1, 2, 3)] == [0, 0, 0]
    assert finite(module)


def test_prune_takes_a_mended_sample_back() -> None:
    dataset = Indexed()
    good, dataset.x = dataset.x, dataset.x.clone()
    dataset.x[5] = math.nan

    class Mend(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                dataset.x[5] = good[5]

    module, callback = Witness(), pruned(quarantine_limit=0.02)
    fit_pruned(module, DataLoader(dataset, batch_size=32), callback, Mend(), warmup=2)
    assert not callback.session.epochs.history.quarantined[5]
    assert len(callback.quarantined) == 1


def test_dataset_indices_are_named_where_the_module_knows_them(digits: Digits) -> None:
    class Net(SparseLossMixin, PlainNet):
        def sample_indices(self, batch: Any) -> Tensor:
            return batch[2]

    x, y = spoiled(digits)
    data = DataLoader(torch.utils.data.TensorDataset(x, y, torch.arange(512)), batch_size=64, shuffle=True)
    callback = SparseSelectionCallback()
    with pytest.warns(UserWarning, match=r"dataset index (3|70|200) \(epoch 0\)"):
        fit(fresh(Net), data, callback)
    assert sorted(s.index for s in callback.quarantined) == BAD


@pytest.mark.parametrize("mode", [*MODES, "prune"])
def test_more_than_the_limit_stops_the_run(digits: Digits, mode: str) -> None:
    bad = [1, 65, 130, 195, 260, 325, 390]
    callback = SparseSelectionCallback(mode=mode)
    with pytest.raises(QuarantineError) as error:
        fit(fresh(), loader(spoiled(digits, where=bad)), callback, TwoStageScheduler(warmup_epochs=1), max_epochs=2)
    assert "6 samples of epoch 0, more than quarantine_limit=0.01 of its 512" in str(error.value)
    assert ("dataset index 1, 65, 130" if mode == "prune" else "(batch 0, position 1), (batch 1, position 1)") in str(
        error.value
    )
    assert "quarantine_limit=None" in str(error.value)


def test_a_limit_of_zero_and_one(digits: Digits) -> None:
    with pytest.raises(QuarantineError, match="1 sample of"):
        fit(fresh(), loader(spoiled(digits)), SparseSelectionCallback(quarantine_limit=0))
    module = fresh()
    fit(module, loader(spoiled(digits, where=list(range(0, 512, 2)))), SparseSelectionCallback(quarantine_limit=1.0))
    assert finite(module)


@pytest.mark.parametrize("mode", [*MODES, "prune"])
def test_a_batch_without_a_finite_sample_moves_nothing(digits: Digits, mode: str) -> None:
    module, moved = fresh(), []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.before = [p.detach().clone() for p in pl_module.parameters()]

        def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
            moved.append(any(bool(p.grad.any()) for p in pl_module.parameters()))

    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.5)
    where = list(range(128, 192))
    fit(module, loader(spoiled(digits, where=where)), callback, TwoStageScheduler(warmup_epochs=1), Spy(), max_epochs=2)
    assert finite(module)
    assert [i for i, m in enumerate(moved) if not m] == ([2] if mode == "prune" else [2, 10])


def test_a_diverged_model_is_told_so(digits: Digits) -> None:
    class Net(PlainNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e30)

    with pytest.raises(QuarantineError, match="the model has diverged: lower the learning rate"):
        fit(fresh(Net, batchnorm=False), loader(digits), SparseSelectionCallback(), max_epochs=3)


def test_finite_batches_are_passed_on_untouched(digits: Digits) -> None:
    seen = []

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    given = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            given.append(batch)

    fit(fresh(Net), loader(digits), Spy(), SparseSelectionCallback(), max_steps=3)
    assert all(a is b for a, b in zip(given, seen))


def test_missing_labels_are_meant(digits: Digits) -> None:
    """NaN behind the first floating-point tensor is the user's own; NaN in it needs quarantine_limit=None."""

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            known = y.isfinite()
            scores = self(x)[:, 0]
            return F.mse_loss(scores.where(known, torch.zeros_like(scores)), y.nan_to_num(0.0))

    y = digits[1].float()
    y[::3] = math.nan
    module, callback = fresh(Net), SparseSelectionCallback()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lightning-ast")
        fit(module, loader((digits[0], y)), callback, max_steps=4)
    assert callback.quarantined == []
    assert finite(module)


def test_state_of_the_quarantine_is_saved(digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"

    counts = []
    for ckpt_path, callbacks in ((None, [SaveAt(path, "batch end", 0, 2)]), (path, [])):
        callback = SparseSelectionCallback()
        trainer = quiet_trainer(callbacks=[callback, *callbacks], max_epochs=1, log_every_n_steps=1)
        trainer.fit(fresh(), loader(spoiled(digits)), ckpt_path=ckpt_path)
        counts.append([len(callback.quarantined), int(trainer.callback_metrics["ast/quarantined"])])
    assert counts == [[3, 3], [5, 5]], "two before the checkpoint; Lightning starts a plain loader anew for the rest"


@pytest.mark.parametrize("mode", MODES)
def test_looking_changes_nothing_where_all_is_finite(digits: Digits, mode: str) -> None:
    ends = []
    for limit in (None, 0.01):
        module = fresh()
        torch.manual_seed(1)
        fit(module, loader(digits), SparseSelectionCallback(mode=mode, quarantine_limit=limit), max_epochs=2)
        ends.append(weights(module))
    assert_same_weights(*ends)


class Alternating(pl.LightningDataModule):
    """Two ranks take turns, in the order of the data."""

    def __init__(self, digits: Digits) -> None:
        super().__init__()
        self.digits = digits

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = DistributedSampler(range(512), num_replicas=2, rank=self.trainer.global_rank, shuffle=False)
        return loader(self.digits, batch_size=32, sampler=sampler)


class Ends(pl.Callback):
    """Writes down what each rank ended with."""

    def __init__(self, folder: Path, callback: SparseSelectionCallback) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = [(s.epoch, s.batch, s.position) for s in self.callback.quarantined]
        torch.save({"weights": weights(pl_module), "found": found}, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize("where", ["one rank", "a whole batch"])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("mode", [*MODES, "prune"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_stay_in_step(digits: Digits, tmp_path: Path, mode: str, stage: str, where: str) -> None:
    """Bad samples in one rank alone: nobody waits for ever, and the ranks agree on finite weights."""
    bad = [0, 2, 130] if where == "one rank" else list(range(0, 64, 2))  # rank 0 has the even samples
    module = fresh(dropout=0.0)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.5)
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[callback, TwoStageScheduler(warmup_epochs=2 if stage == "warmup" else 1), Ends(tmp_path, callback)],
        max_epochs=3 if stage == "warmup" else 2,
    )
    trainer.fit(module, Alternating(spoiled(digits, where=bad)))
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in (0, 1)]
    for name, value in ranks[0]["weights"].items():
        assert "running" in name or torch.equal(value, ranks[1]["weights"][name]), name
        assert value.isfinite().all(), name
    assert ranks[1]["found"] == []
    assert len([f for f in ranks[0]["found"] if f[0] == 0]) == len(bad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_limit_holds_over_all_ranks(digits: Digits) -> None:
    """Twelve of 512, all of them in one rank: both stop at the end of the epoch."""
    callback = SparseSelectionCallback()
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[callback],
    )
    with pytest.raises(
        ProcessRaisedException, match=r"12 samples of epoch 0, more than quarantine_limit=0.01 of its 512"
    ):
        trainer.fit(fresh(), loader(spoiled(digits, where=list(range(0, 480, 40))), batch_size=32))


class CountsRuns(BadLoss):
    """A NaN that only the loss shows; what the step does besides happens once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.runs: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.runs.append(batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_a_dense_step_is_never_run_twice(digits: Digits, mode: str) -> None:
    """Also where only its loss shows what is not finite: the gradient tells which sample it is."""
    module = fresh(CountsRuns)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.2)
    where = [70, 200, 330]
    fit(module, loader(marked(digits, where)), callback, TwoStageScheduler(warmup_epochs=1), StopAfter(8), max_epochs=2)
    assert module.runs == list(range(8))
    assert [(s.batch, s.position) for s in callback.quarantined] == [(1, 6), (3, 8), (5, 10)]
    assert finite(module)
    assert callback.ledger.selected == 512 - 3


def test_a_manual_step_is_watched_in_the_warmup(digits: Digits) -> None:
    class Net(BadLoss):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    module, callback = fresh(Net), SparseSelectionCallback()
    fit(module, loader(marked(digits)), callback, TwoStageScheduler(warmup_epochs=1), StopAfter(8), max_epochs=2)
    assert finite(module)
    assert places(callback) == BAD


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_rank_that_logs_over_all_ranks_does_not_wait_for_ever(digits: Digits, tmp_path: Path) -> None:
    class Net(BadLoss):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores, y = self.losses(batch)
            loss = F.cross_entropy(scores, y)
            self.log("loss", loss, on_step=True, sync_dist=True)
            return loss

    module, callback = fresh(Net, dropout=0.0), SparseSelectionCallback(quarantine_limit=0.5)
    trainer = quiet_trainer(
        devices=2,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60)),
        callbacks=[callback, TwoStageScheduler(warmup_epochs=1), Ends(tmp_path, callback)],
        max_epochs=2,
    )
    trainer.fit(module, Alternating(marked(digits, [64, 66, 130])))
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in (0, 1)]
    for name, value in ranks[0]["weights"].items():
        assert "running" in name or torch.equal(value, ranks[1]["weights"][name]), name


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_batchnorm_with_one_sample_left(digits: Digits, mode: str, left: int) -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10)
            )

    module = fresh(Net)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.5)
    fit(module, loader(spoiled(digits, where=list(range(64, 128 - left)))), callback)
    assert finite(module)
    assert len(callback.quarantined) == 64 - left
