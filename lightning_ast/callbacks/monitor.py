"""``SparseTrainingMonitor``: what a person looks at, in the terminal and in TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from tqdm.auto import tqdm

from lightning_ast.callbacks.energy_monitor import EnergyMonitor
from lightning_ast.callbacks.ownership import begin_use, duplicate_faults, end_use
from lightning_ast.callbacks.sparse_selection import SparseSelectionCallback, running_session
from lightning_ast.core.ledger import Ledger
from lightning_ast.core.state import known_fields, reading, stamped
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.fit_loop import first_callback, logged_step
from lightning_ast.lightning_internals.logger_connector import log_of_rank_zero
from lightning_ast.mode_facts import MODE_FACTS
from lightning_ast.monitoring.guard import Guard
from lightning_ast.monitoring.index_recorder import DrawnIndices
from lightning_ast.monitoring.progress import RunProgress, epoch_details, names_accuracy, selection_summary
from lightning_ast.monitoring.samples import EpochSamples, SampleHistory, SampleWatcher
from lightning_ast.monitoring.tensorboard import Writers
from lightning_ast.monitoring.text import RunSummary, format_epoch, format_summary
from lightning_ast.selection.step_log import BAR_NAMES

__all__ = ["SparseTrainingMonitor"]

_SHARE = 0.01  # of the run's time, for pictures while it goes on
_FIRST_PICTURE_SECONDS = 1.0
_PERCENTILES = (10, 50, 90)
_OWN = ("ast/", "energy/")


class SparseTrainingMonitor(Callback):
    """Shows a run: a line an epoch and a closing summary in the terminal, a page and pictures in TensorBoard.

    The line, ``Epoch 0/39 | Loss: 1.7234 | Val Acc: 36.50% | Act: 8.1% | Skipped: 91.9% | ETA: 5m 12s``, counts epochs
    from 0, as Lightning's progress bars do. It has the mean of what ``training_step`` returned (full batches' loss);
    ``Act`` and ``Skipped`` count samples; the share of FLOPs saved and, with an :class:`~lightning_ast.EnergyMonitor`,
    the joules stand behind them. It goes through the progress bar where there is one, tqdm's or Rich's, and is plain
    text in a log file. The summary has accuracy, activation, the savings, what the mode could have saved at best, and
    where the time went, this callback's own share included.

    A logger that takes histograms, images, text or custom scalars (TensorBoard's) is given: a page "AST" of the
    ``ast/`` and ``energy/`` scalars; at the end of each sparse epoch histograms of the significance, of that of the
    selected samples and, where the dataset indices are known, of how often each sample was selected; heatmaps of the
    activation by class and of the threshold; the samples selected most and least; the quarantined ones. Pictures need
    matplotlib; while the run goes on they are drawn as often as 1 % of its time allows, and at its end. Percentiles of
    the significance (``ast/significance_p10``, ``_p50``, ``_p90``) go to every logger. Under DDP it is rank 0's part.

    Dataset indices are known in mode ``prune``, from the mixin's ``sample_indices``, and for one torch DataLoader over
    a map-style dataset whose ``collate_fn`` is torch's own, or gives back what it gets. Of an epoch that was resumed in
    its midst, what came before is not in the histograms. The samples that are shown are loaded once more, in this
    process, with random states put back.

    Args:
        accuracy: The name of the logged validation accuracy, in [0, 1] or (where it is above 1) in percent; None takes
            the first logged name that has the words ``val`` (``valid``, ``validation``) and ``acc`` (``accuracy``) in
            it, and leaves the field out where there is none.
        images: The samples shown in each row of the grid; 0 loads none.
        metrics: The names of further logged metrics that the line shows, such as ``"val_top5"`` or ``"ast/threshold"``.
        details: Whether the line also has the wall time of the epoch and the highest memory of the GPU so far. The
            summary has them once more, with the epochs in which 90, 95 and 99 % of the best accuracy were reached.
    """

    def __init__(
        self, *, accuracy: str | None = None, images: int = 8, metrics: Sequence[str] = (), details: bool = False
    ) -> None:
        super().__init__()
        self.accuracy = accuracy
        self.images = images
        self.metrics = metrics
        self.details = details
        self._progress = RunProgress()
        self._history = SampleHistory()
        self._drawn: DrawnIndices | None = None
        self._writers: Writers | None = None
        self._watcher: SampleWatcher | None = None
        self._selection: SparseSelectionCallback | None = None
        self._picture_seconds = _FIRST_PICTURE_SECONDS
        self._pictured = -1
        self._resumed = False
        self._guard = Guard("SparseTrainingMonitor")
        self._checked = False
        self._last_details: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to what is drawn, before the loader is started."""
        if stage != "fit":
            return
        faults = duplicate_faults(trainer, SparseTrainingMonitor)
        accuracy: object = self.accuracy
        if accuracy is not None and not isinstance(accuracy, str):
            faults.append(f"accuracy: expected the name of a logged metric or None, got {accuracy!r}.")
        if isinstance(self.metrics, str) or not all(isinstance(name, str) for name in self.metrics):
            faults.append(f"metrics: expected a list of names of logged metrics, got {self.metrics!r}.")
        if faults:
            raise ConfigurationError(faults)
        begin_use(trainer, self)
        self._checked = False
        selection = first_callback(trainer, SparseSelectionCallback)
        self._writers = Writers(trainer, images=self.images)
        if self._writers and selection is not None and not MODE_FACTS[selection.mode].plans_epochs:
            self._drawn = DrawnIndices(self, trainer)
            self._drawn.attach()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the selection; lay out the page."""
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._progress = RunProgress()
            self._history = SampleHistory()
        self._selection = selection = first_callback(trainer, SparseSelectionCallback)
        if selection is not None and trainer.loggers and trainer.is_global_zero:
            drawn = (lambda size: None) if self._drawn is None else self._drawn.take
            assert selection.session is not None
            self._watcher = SampleWatcher(selection.session, drawn, size=_dataset_size(trainer))
            selection.session.watchers.append(self._watcher)
        if self._writers:
            self._writers.lay_out()
        if not self._resumed:
            self._progress.start_epoch(self._ledger)
        self._resumed = False
        self._progress.begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start adding up with an epoch's first batch."""
        if batch_idx == 0:
            self._progress.start_epoch(self._ledger)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's loss, without waiting for the device."""
        with self._own_time():
            self._progress.add_loss(outputs)
            self._progress.stage = "warmup" if self._selection is None else self._selection.stage

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that there is an accuracy to show."""
        self._progress.validated = self._progress.validated or not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line; show the epoch's samples."""
        energy = first_callback(trainer, EnergyMonitor)
        if energy is not None:  # ahead of the next line: all processes add joules up together
            energy.finish_epoch(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        self._check_accuracy(trainer)
        with self._own_time():
            samples = None if self._watcher is None else self._watcher.take()
            if samples is not None:
                self._show(samples, trainer, pl_module)
        with self._own_time():
            line = self._progress.finish_epoch(trainer, running_session(trainer), self._accuracy(trainer))
            joules = energy.epochs[-1].epoch_joules if energy is not None and energy.epochs else None
            seconds = self._progress.last_seconds if self.details else None
            device = trainer.strategy.root_device
            details = epoch_details(self.metrics, trainer.callback_metrics, seconds=seconds, device=device)
            self._last_details = details if self.details else []
            _say(trainer, format_epoch(**line, joules=joules, details=details))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what has not been drawn, and sum up."""
        if not trainer.is_global_zero or not self._progress.epochs:
            return
        began = time.perf_counter()
        selection = self._selection
        step = logged_step(trainer.fit_loop)
        if self._writers:
            with self._guard():
                if self._history.thresholds and self._pictured < step:
                    self._writers.pictures(self._history, step)
            if selection is not None and selection.quarantined:
                self._writers.quarantined(selection.quarantined, step)
        with self._guard():
            _say(trainer, format_summary(self._summary(trainer, closing_seconds=time.perf_counter() - began)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage != "fit" or not end_use(self, trainer):
            return
        if self._drawn is not None:
            self._drawn.detach()
        self._drawn = self._writers = self._watcher = self._selection = None

    @property
    def seconds(self) -> float:
        """Return the wall seconds of the finished epochs, validation included, as the closing summary shows them."""
        return self._progress.finished_seconds

    @property
    def _ledger(self) -> Ledger | None:
        return None if self._selection is None else self._selection.ledger

    def _show(self, samples: EpochSamples, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._history.add(trainer.current_epoch, samples)
        points = torch.tensor([percentile / 100 for percentile in _PERCENTILES])
        values = samples.significance.float().sort().values  # torch.quantile takes no more than 16 million
        values = values[((len(values) - 1) * points).round().long()]
        logged = {f"ast/significance_p{p}": value for p, value in zip(_PERCENTILES, values, strict=True)}
        log_of_rank_zero(module, logged)
        if not self._writers:
            return
        step = logged_step(trainer.fit_loop)
        self._writers.histograms(samples, self._history, step)
        if self._progress.monitoring_seconds + self._picture_seconds <= _SHARE * self._progress.elapsed:
            began = time.perf_counter()
            self._writers.pictures(self._history, step)
            self._picture_seconds = time.perf_counter() - began  # they grow with the epochs: the last ones tell
            self._pictured = step

    def _check_accuracy(self, trainer: pl.Trainer) -> None:
        """Warn of an accuracy and of metrics that are not logged, behind the first validation."""
        if self._checked or not self._progress.validated:
            return
        self._checked = True
        logged = trainer.callback_metrics.keys() - BAR_NAMES
        for name in self.metrics if self.accuracy is None else (self.accuracy, *self.metrics):
            # the threshold is logged once steps are sparse
            if name not in logged and (name == self.accuracy or not name.startswith(_OWN)):
                rank_zero_warn(f"lightning-ast: SparseTrainingMonitor shows less: {_not_logged(name, logged)}")

    def _accuracy(self, trainer: pl.Trainer) -> float | None:
        if not self._progress.validated:
            return None
        metrics = trainer.callback_metrics
        name = next(filter(names_accuracy, metrics), None) if self.accuracy is None else self.accuracy
        value = None if name is None or name not in metrics else float(torch.as_tensor(metrics[name]))
        if value is None or not math.isfinite(value):
            return None
        return value / 100 if value > 1 else value  # torchmetrics gives shares, some modules log percent

    def _summary(self, trainer: pl.Trainer, *, closing_seconds: float) -> RunSummary:
        progress = self._progress
        energy = first_callback(trainer, EnergyMonitor)
        costs = [] if energy is None else energy.epochs
        sections = ("loading", "scoring", "forward_backward", "validation", "other")
        return RunSummary(
            epochs=progress.epochs,
            seconds=self.seconds,
            accuracies=progress.accuracies,
            converges=self.details,
            last_details=self._last_details,
            sections={name: sum(getattr(c, f"{name}_seconds") for c in costs) for name in sections if costs},
            joules=None if energy is None else energy.joules,
            measured=() if energy is None else energy.names,
            monitoring_seconds=progress.monitoring_seconds + (0.0 if self._watcher is None else self._watcher.seconds),
            closing_seconds=closing_seconds,
            **selection_summary(running_session(trainer), measures_joules=energy is not None),
        )

    @contextmanager
    def _own_time(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._guard():
            yield
        self._progress.monitoring_seconds += time.perf_counter() - began

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which watches nothing yet."""
        return {**vars(self), "_drawn": None, "_writers": None, "_watcher": None, "_selection": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the run so far, primitives and tensors alone; empty before it begins."""
        if not self._progress.begun:
            return {}
        return stamped({"progress": self._progress.state_dict(), "history": self._history.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the epoch the checkpoint was written in.

        Raises:
            CheckpointError: The state is damaged, or a later release's.
        """
        if isinstance(state_dict, dict) and not {"progress", "history", "version"} & state_dict.keys():
            return  # an older release's: it only sums up an epoch
        with reading(state_dict, owner=self.state_key):
            self._progress = RunProgress.from_state_dict(state_dict["progress"])
            self._history = known_fields(SampleHistory, state_dict["history"])
        self._resumed = True


def _dataset_size(trainer: pl.Trainer) -> int | None:
    """Count the samples of the training data set, where it is one and has a length."""
    try:
        return len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
    except Exception:  # the user's code: NotImplementedError is common
        return None


def _not_logged(name: str, logged: Collection[str]) -> str:
    """Describe a metric that is not logged, with the names that are: similar ones first."""
    others = sorted(other for other in logged if not other.startswith(_OWN))
    similar = get_close_matches(name, others, n=3, cutoff=0.5)
    ordered = [*similar, *(other for other in others if other not in similar)]
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    return f"{name!r} is not logged.{hint} Logged are: {', '.join(map(repr, ordered)) or 'no metrics'}."


def _say(trainer: pl.Trainer, text: str) -> None:
    """Print a text above the progress bar, or as it is where there is none."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        bar.progress.console.print(text, soft_wrap=True, markup=False, highlight=False)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        tqdm.write(text)  # works behind the bars' end too
    else:
        print(text)  # noqa: T201 - the terminal is what this callback is for
