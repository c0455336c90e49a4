"""``EnergyMonitor``: what each epoch cost, in joules and in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_ast.callbacks.ownership import begin_use, duplicate_faults, end_use
from lightning_ast.callbacks.sparse_selection import running_session
from lightning_ast.core.state import known_fields, reading, stamped
from lightning_ast.energy.energy_ledger import EnergyBook
from lightning_ast.energy.epoch_costs import EpochCosts, OpenEpoch
from lightning_ast.energy.meters import EnergyMeter
from lightning_ast.energy.step_sections import clock_of
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.lightning_internals.logger_connector import log_of_rank_zero

__all__ = ["EnergyMonitor", "EpochCosts"]


class EnergyMonitor(Callback):
    """Measures the joules and seconds of each epoch and of the run, with or without adaptive sparse training.

    Joules come from counters: NVML's of the GPU that each process trains on (``pip install 'lightning-ast[energy]'``),
    RAPL's of the CPU where the kernel lets this user read them. They are read where epochs, validations and stages
    begin and end, never in every step (RAPL's, which come round, every few minutes besides). Where there is no counter
    they are None, which is said once. With a :class:`~lightning_ast.SparseSelectionCallback` the warmup of the same run
    is the dense baseline of ``ast/savings_joules``: joules of a sample by stage, the first steps of each left out.

    Logged at the end of each epoch: ``energy/epoch_seconds`` and its parts ``energy/loading_seconds``,
    ``energy/scoring_seconds``, ``energy/forward_backward_seconds``, ``energy/validation_seconds`` and
    ``energy/other_seconds`` (rank 0's); ``energy/gpu_joules``, ``energy/cpu_joules`` and ``energy/epoch_joules``;
    of the run so far ``energy/total_seconds`` and ``energy/total_joules``.

    Args:
        meters: The meters of this process's hardware; None takes those that the machine has.

    Attributes:
        epochs: The costs of each finished epoch.
        names: The names of what this process measures.

    Example:
        >>> EnergyMonitor().joules is None  # nothing was measured yet
        True
    """

    def __init__(self, *, meters: Sequence[EnergyMeter] | None = None) -> None:
        super().__init__()
        self.meters = meters
        self.epochs: list[EpochCosts] = []
        self.names: list[str] = []
        self._epoch: OpenEpoch | None = None
        self._carried: dict[str, Any] = {}

    @property
    def joules(self) -> float | None:
        """Return the joules of the finished epochs, over all processes; None where those of one are not known."""
        each = [costs.epoch_joules for costs in self.epochs]
        return sum(j for j in each if j is not None) if each and None not in each else None

    @property
    def seconds(self) -> float:
        """Return the seconds of the finished epochs."""
        return sum(costs.epoch_seconds for costs in self.epochs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second monitor, and a second fit at the same time."""
        if stage != "fit":
            return
        faults = duplicate_faults(trainer, EnergyMonitor)
        meters: object = self.meters
        listed = meters if isinstance(meters, (list, tuple)) else [meters]
        if meters is not None and not all(isinstance(meter, EnergyMeter) for meter in listed):
            faults.append(f"meters: expected a list of EnergyMeter objects or None, got {meters!r}.")
        if faults:
            raise ConfigurationError(faults)
        begin_use(trainer, self)
        self._epoch = None  # of a fit that was interrupted: what it cost could be saved until now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the meters; a run that is resumed in mid-epoch goes on from here."""
        # A checkpoint of an earlier epoch was loaded: the later ones are trained again.
        self.epochs = [costs for costs in self.epochs if costs.epoch < trainer.current_epoch]
        book = EnergyBook(self.meters, trainer.strategy.root_device, Processes(trainer))
        self.names = book.names
        self._epoch = OpenEpoch(trainer, book, clock_of(trainer.strategy.root_device), running_session(trainer))
        self._epoch.begin(self._carried)
        if self._epoch.number < trainer.current_epoch:  # the checkpoint was written behind an epoch's last batch
            self.epochs.append(self._epoch.close())
        self._carried = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a section anew: nothing but logging lies between two epochs."""
        assert self._epoch is not None
        self._epoch.sections.restart()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the section of loading."""
        assert self._epoch is not None
        self._epoch.start_batch()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the section of the backward."""
        if self._epoch is not None:
            self._epoch.sections.finish_backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the section of the step."""
        assert self._epoch is not None
        self._epoch.sections.finish_batch()
        self._epoch.read_if_due()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the sections: training stands still."""
        if self._epoch is not None:
            self._epoch.start_validation()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Read counters that come round, in a long validation too."""
        if self._epoch is not None:
            self._epoch.read_if_due()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the sections again: training goes on."""
        if self._epoch is not None:
            self._epoch.end_validation()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch up and log it."""
        self.finish_epoch(trainer, pl_module)

    def finish_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the running epoch up, once: callbacks that show it need not be listed after this one.

        Every process must call it.
        """
        if self._epoch is None or self._epoch.number > trainer.current_epoch:  # another callback asked for it before
            return
        costs = self._epoch.close()
        self.epochs.append(costs)
        values = {name: value for name, value in asdict(costs).items() if name != "epoch"}
        values |= {"epoch_joules": costs.epoch_joules, "total_seconds": self.seconds, "total_joules": self.joules}
        logged = {f"energy/{name}": value for name, value in values.items() if value is not None}
        if (saved := self._epoch.savings) is not None:
            logged["ast/savings_joules"] = saved
        log_of_rank_zero(pl_module, logged)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let another fit use this object; what the running epoch cost so far can still be saved."""
        end_use(self, trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the trainer and the counters."""
        if stage == "fit" and end_use(self, trainer):
            self._epoch = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which measures nothing yet."""
        # An open epoch holds the counters' handles and the trainer.
        return {**vars(self), "_epoch": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the finished epochs, and what the running one cost so far; empty before the first."""
        if not self.epochs and not self._carried and self._epoch is None:
            return {}
        running = self._carried if self._epoch is None else self._epoch.state_dict()
        return stamped({"epochs": [asdict(costs) for costs in self.epochs], "running": running})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add to what an interrupted run had cost.

        Raises:
            CheckpointError: The state is damaged, or a later release's.
        """
        if state_dict == {}:  # it was saved before the first epoch
            return
        with reading(state_dict, owner=self.state_key):
            self.epochs = [known_fields(EpochCosts, costs) for costs in state_dict["epochs"]]
            self._carried = state_dict["running"]
