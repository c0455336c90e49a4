"""One figure everywhere: loggers, report, terminal, progress bar and callback agree, wherever and however a run ends."""

from __future__ import annotations

import math
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_ast import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.callbacks import QuarantineError
from lightning_ast.report import read_runs
from lightning_ast.report.page import summarize
from tests.helpers.data import Digits, loader
from tests.helpers.logs import Meter, Points, scalars, table
from tests.helpers.modules import Trained
from tests.helpers.training import MODES, gloo, quiet_trainer

NAMED = {"samples": "samples", "flops": "FLOPs", "seconds": "seconds", "joules": "joules"}


class Small(Trained):
    """One layer: a step takes a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.head(batch[0].flatten(1)), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.head(batch[0].flatten(1)), batch[1]))


@dataclass
class Ran:
    """A run that has ended, and what it left behind."""

    trainer: pl.Trainer
    selection: SparseSelectionCallback
    energy: EnergyMonitor
    folder: Path

    @property
    def logs(self) -> list[Points]:
        return [scalars(self.folder / "events"), table(self.folder / "table")]

    def check(self, last_step: int, *, within: bool = False) -> None:
        """Every surface says what the callback says, at the last step trained on, and no step was logged twice.

        Args:
            last_step: The last step that was trained on.
            within: Whether the run ended in the midst of a step, whose threshold is the callback's and is not logged.
        """
        known = {name: value for name, value in self.selection.savings.items() if value is not None}
        assert known.keys() >= {"samples", "flops"}
        unknown = NAMED.keys() - known.keys()
        rounded = {name: pytest.approx(value, rel=1e-6, abs=1e-7) for name, value in known.items()}
        for points in self.logs:
            assert {name: points[f"ast/savings_{name}"][-1][1] for name in known} == rounded
            assert all(math.isnan(points.get(f"ast/savings_{name}", [(0, math.nan)])[-1][1]) for name in unknown)
            assert points["ast/savings_flops"][-1][0] == last_step
            assert points["ast/activation_rate"][-1] == (last_step, pytest.approx(self.selection.activation_rate))
            if not within and self.selection.threshold is not None:
                assert points["ast/threshold"][-1][1] == pytest.approx(self.selection.threshold)
            for tag in (tag for tag in points if tag.startswith("ast/")):
                steps = [step for step, _ in points[tag]]
                assert steps == sorted(set(steps)), tag
        for run in read_runs([self.folder]):
            assert {name: summarize(run).savings[name] for name in known} == rounded
        shown, values = self.trainer.progress_bar_metrics, self.trainer.callback_metrics
        assert shown["flops_saved"] == rounded["flops"]
        assert {name: float(values[f"ast/savings_{name}"]) for name in known} == rounded


def train(
    digits: Digits,
    folder: Path,
    *extra: pl.Callback,
    mode: str = "partial",
    batches: int = 20,
    limit: float = 1.0,
    **options: Any,
) -> Ran:
    """Train four epochs unless the options say else: a warmup, two sparse ones, a cooldown."""
    torch.manual_seed(0)
    selection, energy = SparseSelectionCallback(mode=mode, quarantine_limit=limit), EnergyMonitor(meters=[Meter()])
    loggers = [TensorBoardLogger(folder, name="", version="events"), CSVLogger(folder, name="", version="table")]
    data = loader((digits[0][: 8 * batches], digits[1][: 8 * batches]), batch_size=8)
    trainer = quiet_trainer(
        **{"max_epochs": 4, "logger": loggers, "log_every_n_steps": 50, **options},
        callbacks=[selection, TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1), energy, *extra],
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(Small(), data, loader(digits, batch_size=512))
    except (StoppedError, SystemExit, QuarantineError):
        signal.signal(signal.SIGINT, interrupt)  # Lightning lets a second Ctrl-C pass
    return Ran(trainer, selection, energy, folder)


# ---------------------------------------------------------------------- a run that ends by itself


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("mode", ["partial", "prune"])
def test_a_finished_run_has_one_figure_for_each_saving(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, every: int
) -> None:
    run = train(digits, tmp_path, SparseTrainingMonitor(images=0), mode=mode, batches=47, log_every_n_steps=every)
    saved, skipped = re.search(r"saved +(.*?) \(mode.*\n +skipped +(.*)", capsys.readouterr().out).groups()
    shown = {name: f"{NAMED[name]} {value:.1%}" for name, value in run.selection.savings.items()}
    assert skipped == shown.pop("samples")
    assert saved == " | ".join(shown.values())
    batches = run.selection.ledger.stages
    run.check(sum(stage.steps for stage in batches.values()) - 1)
    logged = run.logs[0]["ast/savings_flops"][-1][1]
    print(f"{mode:<8} every {every:<3} terminal {saved.split(' | ')[0]:<12} logged {logged:.6f}")  # noqa: T201


# ---------------------------------------------------------------------- a run that is stopped


class StoppedError(Exception):
    """Raised in the midst of a run."""


class Stop(pl.Callback):
    """Ends the run in one of its hooks: at step 30, in the second epoch, unless said."""

    def __init__(self, hook: str, error: BaseException | None, step: int = 30) -> None:
        setattr(self, hook, self._stop)
        self.error, self.step = error, step

    def _stop(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step and not trainer.sanity_checking:
            if self.error is not None:
                raise self.error
            trainer.should_stop = True


STOPS = {
    "an error before the step": (Stop, ("on_train_batch_start", StoppedError()), {}, 29),
    "an error within the step": (Stop, ("on_before_zero_grad", StoppedError()), {}, 29),
    "an error behind the step": (Stop, ("on_train_batch_end", StoppedError()), {}, 29),
    "an error in validation": (Stop, ("on_validation_start", StoppedError()), {"val_check_interval": 8}, 35),
    "an error at an epoch's end": (Stop, ("on_train_epoch_end", StoppedError()), {}, 39),
    "an error at the run's end": (Stop, ("on_train_end", StoppedError()), {}, 79),
    "Ctrl-C": (Stop, ("on_train_batch_start", KeyboardInterrupt()), {}, 29),
    "a stop behind the step, as max_time's": (Stop, ("on_train_batch_end", None), {}, 29),
    "a stop in validation, as early stopping's": (Stop, ("on_validation_end", None), {"val_check_interval": 8}, 35),
    "max_steps in the midst of an epoch": (None, (), {"max_steps": 72}, 71),
    "an accumulated step, cut off": (
        Stop,
        ("on_before_optimizer_step", StoppedError(), 10),
        {"accumulate_grad_batches": 3},
        10,
    ),
}
"""What ends the run, options of the Trainer, and the last step that was trained on."""


@pytest.mark.parametrize("every", [10, 1000])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_run_that_is_stopped_has_one_figure_too(digits: Digits, tmp_path: Path, stop: str, every: int) -> None:
    kind, settings, options, last = STOPS[stop]
    run = train(digits, tmp_path, *([] if kind is None else [kind(*settings)]), log_every_n_steps=every, **options)
    run.check(last, within=stop in ("an error within the step", "an accumulated step, cut off"))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(digits: Digits, tmp_path: Path, mode: str) -> None:
    train(digits, tmp_path, Stop("on_train_batch_end", StoppedError()), mode=mode).check(29)


@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
@pytest.mark.parametrize("every", [1, 1000])
def test_a_run_that_the_quarantine_ends(digits: Digits, tmp_path: Path, every: int) -> None:
    broken = digits[0].clone()
    broken[100] = math.nan
    run = train((broken, digits[1]), tmp_path, limit=0.0, log_every_n_steps=every)
    run.check(100 // 8)
    assert [points["ast/quarantined"] for points in run.logs] == [[(12, 1.0)]] * 2


# ---------------------------------------------------------------------- what is not known


class Forget(pl.Callback):
    """Makes the FLOPs unknown in the midst of the run, as an op that cannot be counted does."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 30:
            next(c for c in trainer.callbacks if isinstance(c, SparseSelectionCallback)).ledger.flops = None


@pytest.mark.parametrize("every", [1, 1000])
def test_flops_that_are_not_known_any_more_are_not_shown_as_known(digits: Digits, tmp_path: Path, every: int) -> None:
    run = train(digits, tmp_path, Forget(), log_every_n_steps=every)
    assert run.selection.savings["flops"] is None
    assert all(math.isnan(points["ast/savings_flops"][-1][1]) for points in run.logs)
    shown = run.trainer.progress_bar_metrics
    assert "flops_saved" not in shown
    assert shown["samples_skipped"] == pytest.approx(run.selection.savings["samples"])


# ---------------------------------------------------------------------- joules and energy


def test_a_second_run_that_fails_early_logs_nothing_of_the_first(digits: Digits, tmp_path: Path) -> None:
    energy = train(digits, tmp_path / "first", max_epochs=3).energy
    logger = CSVLogger(tmp_path, name="", version="second")
    for hook in ("on_fit_start", "on_train_start"):
        trainer = quiet_trainer(callbacks=[energy, Stop(hook, StoppedError(), 0)], logger=logger)
        with pytest.raises(StoppedError):
            trainer.fit(Small(), loader(digits))
    assert logger.experiment.metrics == []


@pytest.mark.parametrize("stop", [None, Stop("on_train_batch_start", StoppedError(), 50)])
def test_saved_joules_are_the_callbacks(digits: Digits, tmp_path: Path, stop: Stop | None) -> None:
    run = train(digits, tmp_path, *([] if stop is None else [stop]))
    assert run.selection.savings["joules"] is not None
    run.check(79 if stop is None else 49)


# ---------------------------------------------------------------------- loggers


def test_a_logger_that_fails_too_does_not_hide_the_error(
    digits: Digits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(CSVLogger):
        full = False

        def log_metrics(self, *arguments: Any, **options: Any) -> None:
            if self.full:
                raise OSError("No space left on device")
            super().log_metrics(*arguments, **options)

    class Fill(Stop):
        def _stop(self, trainer: pl.Trainer, *arguments: Any) -> None:
            Full.full = trainer.global_step >= 30
            super()._stop(trainer, *arguments)

    logger = Full(tmp_path, name="", version="table")
    with pytest.raises(StoppedError):
        quiet_trainer(
            callbacks=[SparseSelectionCallback(), Fill("on_train_batch_start", StoppedError())], logger=logger
        ).fit(Small(), loader(digits, batch_size=8))
    assert "the last values were not logged: OSError: No space left on device" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_processes_log_the_first_ones_values(digits: Digits, tmp_path: Path) -> None:
    class Write(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
            torch.save(selection.savings["flops"], tmp_path / f"{trainer.global_rank}.pt")

    selection = SparseSelectionCallback()
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[selection, TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1), Write()],
        logger=CSVLogger(tmp_path, name="", version="table"),
        max_epochs=3,
    )
    trainer.fit(Small(), loader(digits, batch_size=32))
    points = table(tmp_path / "table")
    assert points["ast/savings_flops"] == [(23, torch.load(tmp_path / "0.pt"))]
