"""``advise`` on ordinary modules and data: it takes what ``trainer.fit`` takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ast import SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.advice import Advice, advise
from lightning_ast.demo import ImageData
from lightning_ast.errors import AdviceError
from tests.helpers.data import loader
from tests.helpers.modules import Manual, PlainNet
from tests.helpers.training import quiet_trainer

QUICK = 0.2
"""Seconds: two rounds of a small network."""


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_batches_of_every_kind(digits: tuple[Tensor, Tensor], kind: str) -> None:
    advice = advise(quiet_trainer(max_epochs=2), PlainNet(), loader(digits, kind=kind), budget_seconds=QUICK)
    assert advice.facts.step.refused == {}
    assert advice.facts.run.batch_size == 64
    assert advice.facts.step.batchnorm_layers == 1
    rates = [point.rate for point in advice.facts.step.curves["partial"]]
    assert rates[0] == pytest.approx(0.1, abs=0.08)
    assert rates[-1] == pytest.approx(0.6, abs=0.08)


def test_loaders_of_the_module_and_its_callbacks(digits: tuple[Tensor, Tensor], tmp_path: Any) -> None:
    class Whole(PlainNet):
        def train_dataloader(self) -> Any:
            return loader(digits)

        def configure_callbacks(self) -> Any:
            return [ModelCheckpoint(tmp_path / "own", save_top_k=-1, every_n_train_steps=1)]

        def on_train_batch_end(self, *_: Any) -> None:
            self.logger.experiment.add_scalar("x", 1)  # type: ignore[union-attr]

    logger = CSVLogger(tmp_path / "logs")
    trainer = quiet_trainer(max_epochs=2, logger=logger, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=1)],
                            enable_checkpointing=True)  # fmt: skip
    advise(trainer, Whole(), budget_seconds=QUICK)
    assert list(tmp_path.iterdir()) == []
    assert trainer.logger is logger


def test_collections_of_loaders_cannot_be_pruned(digits: tuple[Tensor, Tensor]) -> None:
    class Two(PlainNet):
        def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
            return batch["a"]

    given = CombinedLoader({"a": loader(digits), "b": loader(digits, batch_size=32)}, "min_size")
    advice = advise(quiet_trainer(max_epochs=2), Two(), given, budget_seconds=QUICK)
    assert advice.facts.run.batches_per_epoch == 8
    assert advice.facts.step.refused.keys() >= {"prune"}
    assert "one training dataloader, got 2" in advice.facts.step.refused["prune"]
    assert given._iterator is None
    assert given.limits is None


class Stream(IterableDataset[Any]):
    """Continues where it stopped."""

    def __init__(self, digits: tuple[Tensor, Tensor]) -> None:
        self.digits, self.position = digits, 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.digits[0]):
            yield self.digits[0][self.position], self.digits[1][self.position]
            self.position += 1


def test_a_stream_is_not_consumed_and_cannot_be_pruned(digits: tuple[Tensor, Tensor]) -> None:
    stream = Stream(digits)
    trainer = quiet_trainer(max_epochs=1, max_steps=40)
    advice = advise(trainer, PlainNet(), DataLoader(stream, 64), budget_seconds=QUICK)
    assert stream.position == 0
    assert "has to skip a sample" in advice.facts.step.refused["prune"]
    assert advice.facts.run.batches_per_epoch == 40
    assert "has no length" in advice.facts.notes[1]
    assert {p.mode for p in advice.table} == {"mask", "subset", "partial"}


def test_manual_optimization_is_measured(digits: tuple[Tensor, Tensor]) -> None:
    advice = advise(quiet_trainer(max_epochs=2), Manual(), loader(digits), budget_seconds=QUICK)
    assert advice.facts.step.refused == {}
    assert advice.facts.step.host_share is not None, "subset, too"
    assert advice.facts.step.phases is not None
    assert advice.at("partial", 0.4) is not None


def test_a_loss_without_samples_leaves_the_dense_step(digits: tuple[Tensor, Tensor]) -> None:
    class OfTheMean(PlainNet):
        def __init__(self) -> None:
            super().__init__(batchnorm=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0].mean(0, keepdim=True)).square().mean()

    advice = advise(quiet_trainer(max_epochs=2), OfTheMean(), loader(digits, batch_size=50), budget_seconds=1.0)
    assert advice.facts.step.refused.keys() == {"mask", "partial", "subset", "prune"}
    assert advice.table == ()
    assert advice.dense.run_seconds > 0
    assert advice.verdict.headline == "AST cannot run here: every mode is refused."


def test_prune_needs_an_epoch_to_prune(digits: tuple[Tensor, Tensor]) -> None:
    callbacks = [SparseSelectionCallback(), TwoStageScheduler(warmup_epochs=0.6)]
    advice = advise(quiet_trainer(max_epochs=1, callbacks=callbacks), PlainNet(), loader(digits), budget_seconds=QUICK)
    assert "no epoch would be pruned" in advice.facts.step.refused["prune"]


def test_explicit_losses_and_a_schedule_of_the_rate(digits: tuple[Tensor, Tensor]) -> None:
    class Explicit(SparseLossMixin, PlainNet):  # type: ignore[misc]
        def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = self.unpack(batch)
            return F.cross_entropy(self(x), y, reduction="none")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.per_sample_loss(batch, batch_idx).mean()

    callbacks = [SparseSelectionCallback(mode="subset"), TwoStageScheduler(target_activation_rate=0.15)]
    advice = advise(quiet_trainer(max_epochs=2, callbacks=callbacks), Explicit(), loader(digits), budget_seconds=QUICK)
    assert advice.facts.step.refused == {}
    assert advice.verdict.rate == 0.15
    assert advice.at("subset", 0.15) is not None


def test_one_cycle_schedules_and_bf16(digits: tuple[Tensor, Tensor]) -> None:
    class OneCycle(PlainNet):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            steps = int(self.trainer.estimated_stepping_batches)
            assert steps == 10, "the length of the user's run"
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer = quiet_trainer(max_epochs=5, precision="bf16-mixed")
    advice = advise(trainer, OneCycle(), ImageData("digits", batch_size=512), budget_seconds=QUICK)
    assert advice.facts.run.drop_last
    assert advice.facts.run.samples_per_epoch == 2 * 512
    assert advice.facts.step.cycles >= 2
    assert advice.facts.step.memory is not None
    parameters = sum(p.numel() for p in PlainNet().parameters())
    assert advice.facts.step.memory.static_bytes == 4 * (4 * parameters) + 6 * 4, "with Adam's moments and counts"
    assert isinstance(advice, Advice)


class AsksForItsSchedule(PlainNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        every = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": every}


class WritesBesideItsLogs(PlainNet):
    def on_train_start(self) -> None:
        (Path(str(self.trainer.log_dir)) / "notes.txt").write_text("begun")
        os.path.join(self.trainer.log_dir, "notes.txt")  # type: ignore[arg-type]  # noqa: PTH118


class UsesItsSecondLogger(PlainNet):
    def on_train_batch_end(self, *_: Any) -> None:
        self.loggers[1].experiment.add_scalar("x", 1)  # type: ignore[attr-defined]


class LooksItsStepsUp(PlainNet):
    def on_train_start(self) -> None:
        assert self.trainer.num_training_batches == 8
        self.table = torch.zeros(int(self.trainer.num_training_batches))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.table[batch_idx] += 1


class Lazy(PlainNet):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [AsksForItsSchedule, WritesBesideItsLogs, UsesItsSecondLogger, LooksItsStepsUp, Lazy])
def test_ordinary_modules_are_measured(kind: type[PlainNet], digits: tuple[Tensor, Tensor], tmp_path: Any) -> None:
    loggers = [CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")]
    advice = advise(quiet_trainer(max_epochs=2, logger=loggers), kind(), loader(digits), budget_seconds=QUICK)
    assert advice.facts.step.refused == {}
    assert list(tmp_path.iterdir()) == []
    assert advice.facts.step.memory is not None
    if kind is Lazy:
        parameters = advice.facts.step.memory.static_bytes
        assert parameters == 4 * 3 * 650, "parameters, gradients and momentum"
        assert advice.facts.step.memory.activation_bytes < parameters + 64 * 64 * 4, "its weights are not counted again"


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.from_numpy(gradient.numpy() * 2)


def test_a_backward_that_partial_cannot_run_is_no_reason_against_the_others(digits: tuple[Tensor, Tensor]) -> None:
    class Custom(PlainNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.net[-1](_Doubled.apply(self.net[:-1](x)))  # type: ignore[no-any-return]

    advice = advise(quiet_trainer(max_epochs=2), Custom(), loader(digits), budget_seconds=QUICK)
    assert advice.facts.step.refused.keys() == {"partial"}
    assert {p.mode for p in advice.table} == {"mask", "subset", "prune"}


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"devices": 2, "strategy": "ddp"}, "2 processes.*devices=1"),
        ({"strategy": "ddp_spawn"}, "strategy='auto'"),
        ({"fast_dev_run": True}, "leave it out"),
        ({"max_epochs": 0}, "before its first batch"),
    ],
)
def test_what_cannot_be_measured(digits: tuple[Tensor, Tensor], options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(AdviceError, match=remedy):
        advise(quiet_trainer(**options), PlainNet(), loader(digits), budget_seconds=QUICK)


def test_a_validation_that_fails_is_left_out_and_said(digits: tuple[Tensor, Tensor]) -> None:
    class Broken(PlainNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ValueError("five is not six")

    advice = advise(
        quiet_trainer(max_epochs=2), Broken(), loader(digits), val_data=loader(digits), budget_seconds=QUICK
    )
    assert advice.facts.validation is None
    said = "Validation could not be measured, and is left out: ValueError: five is not six"
    assert said in advice.facts.notes


@pytest.mark.parametrize(("budget", "batches"), [(30.0, 8), (QUICK, None)])
def test_a_validation_without_a_length(digits: tuple[Tensor, Tensor], budget: float, batches: int | None) -> None:
    class Slow(PlainNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.02)

    val = DataLoader(Stream(digits), 64)
    trainer = quiet_trainer(max_epochs=2)
    advice = advise(trainer, Slow(), loader(digits, num_workers=0), val_data=val, budget_seconds=budget / 10)
    found = advice.facts.validation
    assert (None if found is None else found.batches) == batches
    said = "The validation loader has no length, and did not end by itself: it is left out."
    assert (said in advice.facts.notes) == (batches is None)


def test_compiled_networks_are_measured_and_not_counted(digits: tuple[Tensor, Tensor]) -> None:
    module = PlainNet()
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    advice = advise(quiet_trainer(max_epochs=2), module, loader(digits), budget_seconds=QUICK)
    assert advice.facts.step.compiled
    assert advice.facts.step.memory is None
    assert any("compiled" in reason for reason in advice.verdict.reasons)
