"""``SparseSelectionCallback``: reads the trainer, calls the core, writes the logs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_ast.callbacks.ownership import begin_use, duplicate_faults, end_use, serves, sole_key
from lightning_ast.callbacks.two_stage import TwoStageScheduler
from lightning_ast.core.controller import PIController
from lightning_ast.core.execution import Mode
from lightning_ast.core.gate import GateName, Selection, Weighting
from lightning_ast.core.ledger import Ledger
from lightning_ast.core.partial import BatchNormBackward
from lightning_ast.core.significance import SignificanceFn, SignificanceName
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.logger_connector import error_told, repaint
from lightning_ast.lightning_internals.run_limits import epochs_done, first_callback
from lightning_ast.schedule import Schedule, Stage
from lightning_ast.selection.faults import configuration_faults, doubtful_settings
from lightning_ast.selection.quarantine import QuarantinedSample
from lightning_ast.selection.session import Session
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.selection.step_log import StepLog

__all__ = ["SparseSelectionCallback", "running_session"]

_WHY_ONE = "each would select from the other's"


class SparseSelectionCallback(Callback):
    """Trains each batch on the samples that teach most; everything else stays the user's and Lightning's.

    Cost of a sparse step as a share of a dense one, counting forward 1 and backward 2 (as where all parameters are
    trained; the first sparse batch warns where a frozen part makes a mode useless), at activation rate r:
    ``partial`` (1 + 2r) / 3: the step runs once, on the full batch, and its backward computes over the selected rows;
    ``subset`` (1 + 3r) / 3: a scoring forward, then the step on the selected samples; ``prune`` r: the samples that a
    sparse epoch leaves out are not even loaded, and what they were worth is remembered from when they were last trained
    on; ``mask`` 1: it saves nothing and is here for comparison with the original scripts.
    In ``partial`` and ``mask`` the loss and the metrics of the training step are those of the full batch; only the
    gradient is the selection's. In ``subset`` and ``prune`` the step sees the selected samples alone. Under DDP and
    under gradient accumulation every selected sample counts alike, whatever each rank and each micro-batch keeps: the
    gradient is that of one large batch.

    Args:
        target_activation_rate: share of the samples to train on, in (0, 1]; 1 is bitwise the plain run.
        mode: ``"partial"``, ``"subset"``, ``"prune"`` or ``"mask"``. ``partial`` suits eager models; the backward of a
            ``torch.compile``d region stays a full one there: use ``subset`` or ``prune`` with those. ``prune`` needs a
            map-style dataset in one DataLoader and several epochs, and the mixin's ``sample_indices`` where a
            ``collate_fn`` reorders.
        gate: ``"soft"`` (keep with probability ``clip(significance / threshold, floor, 1)``), ``"threshold"`` (the
            original's hard cut: trained from scratch it needs a warmup and a controller that holds its rate) or
            ``"topk"``.
        significance: ``"gradient"`` (the norm of a sample's rows of the gradient where it enters the network; it needs
            no torch loss function), or a score that is made of losses: ``"el2n"``, ``"loss"``, ``"loss_entropy"``,
            ``"loss_intensity"``, ``"confidence"`` or a callable ``(losses, logits, inputs, targets) -> (B,)``. A
            module's own ``significance`` method wins.
        weighting: importance weights p^0, p^-1/2, p^-1: ``"none"``, ``"sqrt"``, ``"unbiased"``. None is ``"sqrt"`` for
            the soft gate (``"none"`` in ``prune``); the hard gates have no probabilities and always use ``"none"``.
        controller: moves the threshold; None makes a default :class:`~lightning_ast.core.PIController`. ``prune`` needs
            none: its threshold is solved over the whole data set.
        min_selected: fewest samples kept of a batch (in ``prune``: of an epoch): a count, or a share in (0, 1) (0.1 is
            the original's).
        seed: of the gate's own draws; global generators are not touched.
        batchnorm: in ``partial``, the backward of BatchNorm in training mode: ``"selected"`` (over the selected rows,
            an approximation) or ``"exact"`` (full from there on); see :func:`lightning_ast.core.select_rows`.
        quarantine_limit: samples whose input (the batch's first floating-point tensor) or loss holds NaN or infinity
            are not trained on; more of them than this share of an epoch's samples, in [0, 1], stop the run. None: they
            are not looked for.
        count_flops: Whether the FLOPs of one batch are counted with torch's formulas, for the savings; training is the
            same either way. False leaves ``savings["flops"]`` and ``ast/savings_flops`` out.

    Attributes:
        ledger: samples, FLOPs and seconds of the run.
        dense_ops: in ``partial``, backward ops that ran over the whole batch for want of a row rule, and their calls.

    Raises:
        ConfigurationError: at setup, every fault of the configuration together.
        EntryError: at the first batch, where it cannot be told which rows of the gradient belong to which sample.
        LossCaptureError: at the first batch, where the score is made of losses that cannot be had per sample.
        CheckpointError: where a checkpoint is loaded whose state is damaged, or a later release's.
        QuarantineError: after a batch, when more samples are not finite than ``quarantine_limit`` allows.

    Example:
        >>> callback = SparseSelectionCallback(target_activation_rate=0.4)
        >>> callback.activation_rate is None  # before the first batch
        True
    """

    def __init__(  # noqa: PLR0913 - settings, given by name
        self,
        *,
        target_activation_rate: float = 0.4,
        mode: Mode = "partial",
        gate: GateName = "soft",
        significance: SignificanceName | SignificanceFn = "gradient",
        weighting: Weighting | None = None,
        controller: PIController | None = None,
        min_selected: int | float = 2,
        seed: int = 0,
        batchnorm: BatchNormBackward = "selected",
        quarantine_limit: float | None = 0.01,
        count_flops: bool = True,
    ) -> None:
        super().__init__()
        self.target_activation_rate = target_activation_rate
        self.mode: Mode = mode
        self.gate: GateName = gate
        self.significance = significance
        self.weighting: Weighting | None = weighting
        self.controller = controller
        self.min_selected = min_selected
        self.seed = seed
        self.batchnorm: BatchNormBackward = batchnorm
        self.quarantine_limit = quarantine_limit
        self.count_flops = count_flops
        self.dense_ops: Counter[str] = Counter()
        self.ledger = Ledger()
        self._session: Session | None = None
        self._log: StepLog | None = None
        self._loads_foreign = False

    # ------------------------------------------------------------------ readable while it runs

    @property
    def session(self) -> Session | None:
        """What lives for the length of a fit, of the running or the last one; None before the first."""
        return self._session

    @property
    def stage(self) -> Stage:
        """``"warmup"``, ``"sparse"`` or ``"cooldown"``: that of the last training batch."""
        return "warmup" if self._session is None else self._session.stage

    @property
    def activation_rate(self) -> float | None:
        """Selected / offered of the last training batch, in [0, 1]; None before the first."""
        return None if self._session is None else self._session.activation_rate

    @property
    def last_selection(self) -> Selection | None:
        """Positions and weights of the samples that the last training batch was trained on.

        None before the first batch, and after one of which no sample could be trained on.
        """
        return None if self._session is None else self._session.last_selection

    @property
    def threshold(self) -> float | None:
        """Significance at which the gate was fully open for the last sparse batch; None before it. Reads the device."""
        last = None if self._session is None else self._session.selector.last_threshold
        return None if last is None else float(last)

    @property
    def savings(self) -> dict[str, float | None]:
        """Shares saved over the run so far, by what was saved; see :meth:`lightning_ast.core.Ledger.savings`."""
        return self.ledger.savings()

    @property
    def quarantined(self) -> list[QuarantinedSample]:
        """Samples that were left out because they are not finite, in this process, in the order they were found in."""
        return [] if self._session is None else list(self._session.quarantine.samples)

    def planned_steps(self, trainer: pl.Trainer) -> float:
        """Optimizer steps of the whole run (infinite without a limit), for schedules that are stepped with it.

        In a fit, ``configure_optimizers`` included, it is what ``trainer.estimated_stepping_batches`` gives: for
        ``prune``, whose epochs differ in length, that is made right.

        Raises:
            RuntimeError: in ``prune``, before a fit.
        """
        if self.mode != "prune":
            return float(trainer.estimated_stepping_batches)
        if self._session is None or self._session.epochs is None:
            raise RuntimeError("planned_steps is known once fit has begun: ask for it in configure_optimizers.")
        return self._session.epochs.planned_steps()

    # ------------------------------------------------------------------ the hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be known before the first batch; in ``subset`` wrap the training step."""
        if stage != "fit":
            return
        schedulers = [c for c in trainer.callbacks if isinstance(c, TwoStageScheduler)]  # type: ignore[attr-defined]
        faults = duplicate_faults(trainer, SparseSelectionCallback, _WHY_ONE)
        if faults := faults + configuration_faults(self, trainer, pl_module, schedulers):
            raise ConfigurationError(faults)
        self._begin_use(trainer)
        for scheduler in schedulers:
            scheduler.serve(self)
        for doubt in doubtful_settings(self, schedulers, pl_module):
            rank_zero_warn(f"lightning-ast: {doubt}")
        goes_on = self._session is not None and self._session.mode == self.mode and epochs_done(trainer) > 0
        before = self.state_dict() if goes_on else {}  # a second fit of one trainer
        if self.controller is not None:
            self.controller.reset()
        self.ledger = Ledger()
        self.dense_ops.clear()
        self._session = Session(
            self._settings(trainer, next(iter(schedulers), None)),
            trainer,
            pl_module,
            owner=self,
            ledger=self.ledger,
            dense_ops=self.dense_ops,
        )
        self._log = StepLog(self._session, trainer, pl_module)
        self._session.attach()
        self.load_state_dict(before)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what is known only now."""
        assert self._session is not None
        self._session.start_training()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the timers until the next batch."""
        assert self._session is not None
        self._session.interrupt()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide what is done with this batch; in ``subset`` score it and take the selected samples."""
        assert self._session is not None
        self._session.start_batch(batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Put the gate where the gradient of the loss enters the network; count FLOPs in one batch."""
        assert self._session is not None
        self._session.start_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the count of FLOPs, and go on watching a step that runs its own backward."""
        assert self._session is not None
        self._session.stop_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Weigh accumulated micro-batches as one large batch."""
        assert self._session is not None
        self._session.start_optimizer_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the books, write the logs, let go of the batch."""
        assert self._session is not None
        assert self._log is not None
        trained = True
        try:
            trained = self._session.finish_batch(batch_idx)
        finally:  # what the quarantine ends the run with stands behind a batch that is in the ledger
            self._log.finish_batch(batch_idx, trained=trained)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare what was left out with what is allowed, over all processes."""
        assert self._session is not None
        assert self._log is not None
        self._session.finish_epoch()
        self._log.finish_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the loggers the last values, which need not be those of the last step that was logged."""
        assert self._log is not None
        self._log.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the timers for the length of a validation."""
        if self._session is not None:
            self._session.interrupt()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the loggers the last values; leave the module as it was."""
        if self._log is not None and serves(self, trainer):
            with error_told():
                self._log.close()
                repaint(trainer, pl_module)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was, where the fit that ends is the one that this callback serves."""
        if stage == "fit" and end_use(self, trainer):
            if self.controller is not None:
                end_use(self.controller, trainer)
            if self._session is not None:
                self._session.detach()

    def _settings(self, trainer: pl.Trainer, scheduler: TwoStageScheduler | None) -> SelectionSettings:
        """Read the settings; a target of the scheduler's own counts."""
        own = self.target_activation_rate
        return SelectionSettings(
            target_activation_rate=own if scheduler is None else scheduler.target_activation_rate or own,
            mode=self.mode,
            gate=self.gate,
            significance=self.significance,
            weighting=self.weighting,
            controller=self.controller,
            min_selected=self.min_selected,
            seed=self.seed,
            batchnorm=self.batchnorm,
            quarantine_limit=self.quarantine_limit,
            count_flops=self.count_flops,
            schedule=Schedule() if scheduler is None else scheduler.schedule_of(trainer),
            state_key=super().state_key,
        )

    def _begin_use(self, trainer: pl.Trainer) -> None:
        begin_use(self, trainer)
        self._loads_foreign = False
        if self._session is not None:
            self._session.detach()  # an interrupted fit may not have come to its end
        if self.controller is not None:
            try:
                begin_use(self.controller, trainer)
            except ConfigurationError:
                end_use(self, trainer)
                raise

    # ------------------------------------------------------------------ state

    @property
    def state_key(self) -> str:
        """Return Lightning's key of the state; until there is a state, one that refuses a second callback."""
        key = super().state_key
        return sole_key(self, key, _WHY_ONE) if self._session is None else key

    def __getstate__(self) -> dict[str, Any]:
        """A copy is this callback with its ledger, outside the fit that runs."""
        return {**vars(self), "_session": None, "_log": None}

    def state_dict(self) -> dict[str, Any]:
        """Controller, books, quarantine and random state; in ``prune`` scores and plan. Primitives and tensors alone.

        With several processes every one of them must ask for it, as Lightning does when it writes a checkpoint.
        """
        return {} if self._session is None else self._session.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written.

        Raises:
            CheckpointError: The state is damaged, or a later release's; nothing of it was applied.
        """
        foreign, self._loads_foreign = self._loads_foreign, False
        if self._session is not None and state_dict != {} and not foreign:  # empty: it was saved outside a fit
            self._session.state.load_state_dict(state_dict)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The run is resumed, perhaps without this callback; but not where a tuner loads what it saved in this fit.

        What another Trainer loads while this fit goes on (to test, say) is not for this fit.
        """
        self._loads_foreign = not serves(self, trainer)
        if self._session is not None and not self._loads_foreign:
            self._session.state.expect_resume(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key, {}))


def running_session(trainer: pl.Trainer) -> Session | None:
    """Return the session of a trainer's selection callback; None where nobody selects."""
    selection = first_callback(trainer, SparseSelectionCallback)
    return None if selection is None else selection.session
