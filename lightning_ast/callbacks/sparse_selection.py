"""``SparseSelectionCallback``: hands Lightning's hooks on to the session of the running fit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_ast.callbacks.ownership import begin_use, duplicate_faults, end_use, serves
from lightning_ast.callbacks.selection_readings import SelectionReadings
from lightning_ast.callbacks.two_stage import TwoStageScheduler
from lightning_ast.core.controller import PIController
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.core.ledger import Ledger
from lightning_ast.core.partial.rows import BatchNormBackward
from lightning_ast.core.selector import DEFAULT_RATE
from lightning_ast.core.significance import SignificanceFn, SignificanceName
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.fit_loop import epochs_done, first_callback
from lightning_ast.mode_facts import MODE_FACTS, Mode, PruneSteps
from lightning_ast.pruning.sample_book import SampleOptions, SampleSettings
from lightning_ast.selection.faults import configuration_faults, doubtful_settings
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.moving_target import TargetFn
from lightning_ast.selection.session import Session
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.streams import SampleFilter

__all__ = ["SparseSelectionCallback", "running_session"]


class SparseSelectionCallback(SelectionReadings):
    """Trains each batch on the samples that teach most; everything else stays the user's and Lightning's.

    Cost of a sparse step as a share of a dense one at activation rate r, counting the forward as 1 and the backward as
    2, as where all parameters are trained: ``partial`` ``(1 + 2r) / 3``, ``subset`` ``(1 + 3r) / 3``, ``prune`` ``r``,
    ``mask`` 1. The first sparse batch warns where a frozen part makes a mode useless. In ``partial`` and ``mask`` the
    loss and the metrics of the training step are those of the full batch, and only the gradient is the selection's. In
    ``subset`` and ``prune`` the step sees the selected samples alone. Under DDP and under gradient accumulation every
    selected sample counts alike, whatever each rank and micro-batch keeps: the gradient is that of one large batch.

    Args:
        target_activation_rate: The share of the samples to train on, in (0, 1]; 1 is bitwise the plain run. Without it
            and ``target_coverage`` it is 0.4. Either target may be a function ``(epoch, metrics) -> float``, asked at
            the start of each epoch with the epoch's number and ``trainer.callback_metrics``.
        target_coverage: In place of a rate, the share of the summed significance that the samples trained on are to
            carry, in (0, 1]; 1 is bitwise the plain run. The fewest samples that carry it are trained on: nearly all
            while the model learns from all of them, few once few have anything left to teach. A batch of which 95 % or
            more would be needed is trained on whole, and so are batches in ``subset`` while scoring them costs more
            than it saves; the ledger counts them as ``dense_steps``.
        mode: ``"partial"``: the step runs once, on the full batch, and its backward computes over the selected rows;
            the backward of a ``torch.compile``d region stays a full one. ``"subset"``: a scoring forward, then the
            step on the selected samples. ``"prune"``: an epoch loads only the samples that it trains on, chosen by
            their remembered significance; it needs a map-style dataset in one DataLoader (or, for
            streams, a helper of :mod:`lightning_ast.streams`), several epochs, and the mixin's ``sample_indices`` where
            a ``collate_fn`` reorders. ``"mask"``: zeros in the gradient, as in the
            original scripts; it saves nothing and is here for comparison.
        gate: ``"soft"``: keep with probability ``clip(significance / threshold, floor, 1)``. ``"threshold"``: the
            original's hard cut; trained from scratch it needs a warmup and a controller that holds its rate.
            ``"topk"``: keep the largest.
        significance: ``"gradient"``: the norm of a sample's rows of the gradient where it enters the network. The
            others are made of losses: ``"el2n"``, ``"loss"``, ``"loss_entropy"``, ``"loss_intensity"``,
            ``"confidence"`` or a callable ``(losses, logits, inputs, targets) -> (B,)``. A module's own
            ``significance`` method wins.
        weighting: The importance weights p^0, p^-1/2, p^-1: ``"none"``, ``"sqrt"``, ``"unbiased"``. None is ``"sqrt"``
            for the soft gate (``"none"`` in ``prune``); the hard gates have no probabilities and always use ``"none"``.
            In ``prune`` the probabilities are made of old scores: there ``"unbiased"`` lost 5 to 8 points of accuracy.
        controller: The controller of the threshold; None makes a default :class:`~lightning_ast.core.PIController`.
            ``prune`` solves its threshold over the whole data set and needs none.
        min_selected: The fewest samples kept of a batch (in ``prune``: of an epoch): a count, or a share in (0, 1).
        trim: The share of the samples, in [0, 1), that is left out because its significance is the largest: a remedy
            for wrong labels, which keep a large gradient. Set it to about the share of labels that you expect to be
            wrong; right labels that are hard are left out with them.
        seed: The seed of the gate's own draws; global generators are not touched.
        batchnorm: In ``partial``, the backward of BatchNorm in training mode: ``"selected"`` (over the selected rows,
            an approximation) or ``"exact"`` (full from there on); see :func:`lightning_ast.core.select_rows`.
        quarantine_limit: The largest share of an epoch's samples, in [0, 1], whose input (the batch's first
            floating-point tensor) or loss may be NaN or infinite. They are not trained on; more of them stop the run.
            With None they are not looked for.
        count_flops: Whether the FLOPs of one batch are counted with torch's formulas, for ``savings["flops"]`` and
            ``ast/savings_flops``; training is the same either way.
        prune_steps: In ``prune``, the optimizer steps of a pruned epoch. ``"keep"``: as many as in a dense epoch, each
            on a batch of the activation rate's share (8 samples at least), so that every schedule is the dense run's;
            it needs a loss that is a mean over the samples of a batch (the scores of a sum would depend on the size of
            the batch), and ``torch.compile(dynamic=False)`` compiles anew for each size. ``"follow"``: fewer steps on
            full batches; learning-rate schedulers with ``interval="step"`` advance by the dense steps that each stands
            for (what counts ``trainer.global_step`` by itself does not). ``"replan"``: fewer steps on full batches,
            which ``trainer.estimated_stepping_batches`` counts. None is ``"keep"`` with ``target_coverage``, else
            ``"replan"``.
        sample_filter: In ``prune`` over a stream without an index, the
            :class:`~lightning_ast.streams.SampleFilter` that stands in it.
        **samples: Settings of single samples, each an argument of its own.
            ``initial_scores``: in ``prune``, the scores that a run without a checkpoint begins with: a number for each
            sample, or a CSV or Parquet file with the columns ``index`` and ``significance``. Without a warmup the first
            epoch is planned by them.
            ``keep_scores``: in ``prune``, the number of latest epochs whose significance is kept for
            :meth:`export_scores`, at 2 bytes a sample and epoch; and whether classes are kept for it.
            ``always``: in ``prune``, dataset indices (or a file with a column ``index``) that every pruned epoch loads.
            ``never``: in ``prune``, dataset indices (or a file) that are never trained on: pruned epochs do not load
            them, and in dense ones they have no gradient.
            ``own_parts``: in ``prune`` with several processes, whether the loader of each process holds a part of the
            data of its own, with indices of its own; each then remembers and plans its part alone.
            ``class_floor``: the share of each class, in [0, 1), of a batch (in ``prune``: of an epoch) that is always
            kept, by its most significant samples. Classes are those that a torch classification loss is told, or those
            of the mixin's ``sample_labels``.

    Attributes:
        dense_ops: In ``partial``, the backward ops that ran over the whole batch for want of a row rule, and their
            calls.

    Raises:
        ConfigurationError: At setup, every fault of the configuration together.
        EntryError: At the first batch, where it cannot be told which rows of the gradient belong to which sample.
        LossCaptureError: At the first batch, where the score is made of losses that cannot be had per sample.
        CheckpointError: Where a checkpoint is loaded whose state is damaged, or a later release's.
        QuarantineError: After a batch, when more samples are not finite than ``quarantine_limit`` allows.

    Example:
        >>> callback = SparseSelectionCallback(target_coverage=0.9)
        >>> callback.activation_rate is None  # before the first batch
        True
    """

    def __init__(  # noqa: PLR0913 - settings, given by name
        self,
        *,
        target_activation_rate: float | TargetFn | None = None,
        target_coverage: float | TargetFn | None = None,
        mode: Mode = "partial",
        gate: GateName = "soft",
        significance: SignificanceName | SignificanceFn = "gradient",
        weighting: Weighting | None = None,
        controller: PIController | None = None,
        min_selected: int | float = 2,
        trim: float = 0.0,
        seed: int = 0,
        batchnorm: BatchNormBackward = "selected",
        quarantine_limit: float | None = 0.01,
        count_flops: bool = True,
        prune_steps: PruneSteps | None = None,
        sample_filter: SampleFilter | None = None,
        **samples: Unpack[SampleOptions],
    ) -> None:
        super().__init__()
        is_given = target_activation_rate is not None or target_coverage is not None
        self.target_activation_rate = target_activation_rate if is_given else DEFAULT_RATE
        self.target_coverage = target_coverage
        self.mode: Mode = mode
        self.gate: GateName = gate
        self.significance = significance
        self.weighting: Weighting | None = weighting
        self.controller = controller
        self.min_selected = min_selected
        self.trim = trim
        self.seed = seed
        self.batchnorm: BatchNormBackward = batchnorm
        self.quarantine_limit = quarantine_limit
        self.count_flops = count_flops
        self.prune_steps: PruneSteps | None = prune_steps
        self.samples = SampleSettings.of(samples)
        self.sample_filter = sample_filter
        self.dense_ops: Counter[str] = Counter()
        self._loads_foreign = False

    def planned_steps(self, trainer: pl.Trainer) -> float:
        """Return the optimizer steps of the whole run (infinite without a limit), for schedules that step with it.

        In a fit, ``configure_optimizers`` included, it is what ``trainer.estimated_stepping_batches`` gives: for
        ``prune``, whose epochs differ in length, that is made right.

        Raises:
            RuntimeError: In ``prune``, before a fit.
        """
        if not MODE_FACTS[self.mode].plans_epochs:
            return float(trainer.estimated_stepping_batches)
        if self._session is None or self._session.epochs is None:
            raise RuntimeError("planned_steps is known once fit has begun: ask for it in configure_optimizers.")
        return self._session.epochs.planned_steps()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be known before the first batch; in ``subset`` wrap the training step."""
        if stage != "fit":
            return
        settings = SelectionSettings.of(self, first_callback(trainer, TwoStageScheduler))
        faults = duplicate_faults(trainer, SparseSelectionCallback) + duplicate_faults(trainer, TwoStageScheduler)
        if faults := [*faults, *configuration_faults(settings, trainer, pl_module)]:
            raise ConfigurationError(faults)
        begin_use(trainer, self, self.controller)
        self._loads_foreign = False
        if self._session is not None:
            self._session.detach()  # an interrupted fit may not have come to its end
        for doubt in doubtful_settings(settings, pl_module):
            rank_zero_warn(f"lightning-ast: {doubt}")
        goes_on = self._session is not None and self._session.mode.name == self.mode and epochs_done(trainer) > 0
        before = self.state_dict() if goes_on else {}  # a second fit of one trainer
        if self.controller is not None:  # the user's object: another fit may have moved it; `before` holds what counts
            self.controller.reset()
        self.ledger = Ledger()
        self.dense_ops.clear()
        parts = FitParts(self, trainer, pl_module, settings, ledger=self.ledger, dense_ops=self.dense_ops)
        self._session = Session(parts)
        self._session.attach()
        self.load_state_dict(before)  # Lightning restores a checkpoint behind this, which then counts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what is known only now."""
        self._running.start_training()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the timers until the next batch."""
        self._running.interrupt()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide what is done with this batch; in ``subset`` score it and take the selected samples."""
        self._running.start_batch(batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Put the gate where the gradient of the loss enters the network; count FLOPs in one batch."""
        self._running.start_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the count of FLOPs, and go on watching a step that runs its own backward."""
        self._running.stop_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Weigh accumulated micro-batches as one large batch."""
        self._running.start_optimizer_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the books, write the logs, let go of the batch."""
        self._running.finish_batch(batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare what was left out with what is allowed, over all processes."""
        self._running.finish_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the loggers the last values, which need not be those of the last step that was logged."""
        self._running.close_log()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the timers for the length of a validation."""
        if self._session is not None:
            self._session.interrupt()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the loggers the last values; leave the module as it was."""
        if self._session is not None and serves(self, trainer):
            try:
                self._session.close_log(exception)
            except Exception as error:  # raised, it would hide the one that the run fails with
                rank_zero_info(f"lightning-ast: the last values were not logged: {type(error).__name__}: {error}")
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was, where the fit that ends is the one that this callback serves."""
        if stage == "fit" and end_use(self, trainer):
            end_use(self.controller, trainer)
            if self._session is not None:
                self._session.detach()

    @property
    def _running(self) -> Session:
        assert self._session is not None  # Lightning calls no hook of a training before setup
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which has the ledger and is outside the fit that runs."""
        # Lightning's tuners and torch.save copy callbacks; a session holds the trainer, with all that it holds.
        return {**vars(self), "_session": None}

    def state_dict(self) -> dict[str, Any]:
        """Return controller, books, quarantine and random state, in ``prune`` scores and plan: primitives and tensors.

        With several processes every one of them must ask for it, as Lightning does when it writes a checkpoint.
        """
        return {} if self._session is None else self._session.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written.

        Raises:
            CheckpointError: The state is damaged, or a later release's.
        """
        foreign = self._loads_foreign
        self._loads_foreign = False
        if self._session is not None and state_dict != {} and not foreign:  # empty: it was saved outside a fit
            self._session.state.load_state_dict(state_dict)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Prepare for a resumed run, perhaps of one without this callback.

        What another Trainer loads while this fit goes on (to test, say) is not for this fit.
        """
        self._loads_foreign = not serves(self, trainer)
        if self._session is not None and not self._loads_foreign:
            self._session.state.expect_resume(checkpoint, checkpoint.get("callbacks", {}).get(self.state_key, {}))


def running_session(trainer: pl.Trainer) -> Session | None:
    """Return the session of a trainer's selection callback; None where nobody selects."""
    selection = first_callback(trainer, SparseSelectionCallback)
    return None if selection is None else selection.session
