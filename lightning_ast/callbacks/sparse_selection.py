"""``SparseSelectionCallback``: reads the trainer, calls the core, writes the step's loss and the logs."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_ast.callbacks._books import Books
from lightning_ast.callbacks._decide import Decision
from lightning_ast.callbacks._faults import ConfigurationError, configuration_faults
from lightning_ast.callbacks._fit_loop import epochs_done
from lightning_ast.callbacks._logs import log_step, note_compiled
from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.callbacks._processes import Processes
from lightning_ast.callbacks._prune import PrunedEpochs
from lightning_ast.callbacks._scoring import ScoringPass
from lightning_ast.callbacks._step import StepInterceptor
from lightning_ast.callbacks.two_stage import Stage, TwoStageScheduler
from lightning_ast.core.controller import PIController
from lightning_ast.core.execution import Mode, mask_rows, resolve_weighting
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.core.ledger import Ledger
from lightning_ast.core.partial import BatchNormBackward, compiled_parts, keep_rows
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import SignificanceFn, SignificanceName
from lightning_ast.mixin import overrides

__all__ = ["SparseSelectionCallback"]

_LIVE = ("_score", "_decision", "_books", "_scheduler")


class SparseSelectionCallback(Callback):
    """Trains each batch on the samples that teach most; everything else stays the user's and Lightning's.

    Cost of a sparse step as a share of a dense one, counting forward 1 and backward 2, at activation rate r:
    ``partial`` (1 + 2r) / 3: the step runs once, on the full batch, and its backward computes over the selected rows;
    ``subset`` (1 + 3r) / 3: a scoring forward, then the step on the selected samples; ``prune`` r: the samples that a
    sparse epoch leaves out are not even loaded, and what they were worth is remembered from when they were last trained
    on; ``mask`` 1: it saves nothing and is here for comparison with the original scripts.
    But in ``prune``, whose batches are the selection, the loss that the training step returns and logs stays that of
    the full batch; only its gradient is the selection's. In ``subset`` other metrics of ``training_step`` see the
    selected samples alone. Under DDP the ranks' gradients are averaged so that every selected sample counts alike;
    under gradient accumulation each micro-batch keeps its own denominator.

    Args:
        target_activation_rate: share of the samples to train on, in (0, 1]; 1 is bitwise the plain run.
        mode: ``"partial"``, ``"subset"``, ``"prune"`` or ``"mask"``. ``partial`` suits eager models; the backward of a
            ``torch.compile``d region stays a full one there: use ``subset`` or ``prune`` with those. ``prune`` needs a
            map-style dataset in one DataLoader and several epochs, and the mixin's ``sample_indices`` where a
            ``collate_fn`` reorders.
        gate: ``"soft"`` (keep with probability ``clip(significance / threshold, floor, 1)``), ``"threshold"`` (the
            original's hard cut: trained from scratch it needs a warmup and a controller that holds its rate) or
            ``"topk"``.
        significance: ``"el2n"``, ``"loss"``, ``"loss_entropy"``, ``"loss_intensity"``, ``"confidence"`` or a callable
            ``(losses, logits, inputs, targets) -> (B,)``. A module's own ``significance`` method wins.
        weighting: importance weights p^0, p^-1/2, p^-1: ``"none"``, ``"sqrt"``, ``"unbiased"``. None is ``"sqrt"`` for
            the soft gate (``"none"`` in ``prune``); the hard gates have no probabilities and always use ``"none"``.
        controller: moves the threshold; None makes a default :class:`~lightning_ast.core.PIController`. ``prune`` needs
            none: its threshold is solved over the whole data set.
        min_selected: fewest samples kept of a batch (in ``prune``: of an epoch): a count, or a share in (0, 1) (0.1 is
            the original's).
        seed: of the gate's own draws; global generators are not touched.
        batchnorm: in ``partial``, the backward of BatchNorm in training mode: ``"selected"`` (over the selected rows,
            an approximation) or ``"exact"`` (full from there on); see :func:`lightning_ast.core.select_rows`.

    Attributes:
        stage: ``"warmup"``, ``"sparse"`` or ``"cooldown"``: that of the last training batch.
        ledger: samples, FLOPs and seconds of the run.
        dense_ops: in ``partial``, backward ops that ran over the whole batch for want of a row rule, and their calls.

    Raises:
        ConfigurationError: at setup, every fault of the configuration together.
        LossCaptureError: at the first batch, where the module's losses cannot be had per sample.

    Example:
        >>> callback = SparseSelectionCallback(target_activation_rate=0.4)
        >>> callback.activation_rate is None  # before the first batch
        True
    """

    def __init__(
        self,
        *,
        target_activation_rate: float = 0.4,
        mode: Mode = "partial",
        gate: GateName = "soft",
        significance: SignificanceName | SignificanceFn = "el2n",
        weighting: Weighting | None = None,
        controller: PIController | None = None,
        min_selected: int | float = 2,
        seed: int = 0,
        batchnorm: BatchNormBackward = "selected",
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
        self.dense_ops: Counter[str] = Counter()
        self.stage: Stage = "warmup"
        self.ledger = Ledger()
        self._selector: SampleSelector | None = None
        self._step: StepInterceptor | None = None
        self._rate: float | None = None
        self._epochs: PrunedEpochs | None = None

    # ------------------------------------------------------------------ readable while it runs

    @property
    def activation_rate(self) -> float | None:
        """Selected / offered of the last training batch, in [0, 1]; None before the first."""
        return self._rate

    @property
    def threshold(self) -> float | None:
        """Significance at which the gate was fully open for the last sparse batch; None before it. Reads the device."""
        last = None if self._selector is None else self._selector.last_threshold
        return None if last is None else float(last)

    @property
    def savings(self) -> dict[str, float | None]:
        """Shares saved over the run so far, by what was saved; see :meth:`lightning_ast.core.Ledger.savings`."""
        return self.ledger.savings()

    def planned_steps(self, trainer: pl.Trainer) -> float:
        """Optimizer steps of the whole run (infinite without a limit), for schedules that are stepped with it.

        In a fit, ``configure_optimizers`` included, it is what ``trainer.estimated_stepping_batches`` gives: for
        ``prune``, whose epochs differ in length, that is made right.

        Raises:
            RuntimeError: in ``prune``, before a fit.
        """
        if self.mode != "prune":
            return float(trainer.estimated_stepping_batches)
        if self._epochs is None:
            raise RuntimeError("planned_steps is known once fit has begun: ask for it in configure_optimizers.")
        return self._epochs.planned_steps()

    # ------------------------------------------------------------------ setup

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be known before the first batch, then wrap the training step."""
        if stage != "fit":
            return
        explicit = overrides(pl_module, "per_sample_loss")
        schedulers = [c for c in trainer.callbacks if isinstance(c, TwoStageScheduler)]  # type: ignore[attr-defined]
        if faults := configuration_faults(self, trainer, pl_module, schedulers, explicit=explicit):
            raise ConfigurationError(faults)
        self._scheduler = next(iter(schedulers), None)
        target = getattr(self._scheduler, "target_activation_rate", None) or self.target_activation_rate
        before = self.state_dict() if epochs_done(trainer) else {}  # a second fit of one trainer goes on
        if self.controller is not None:
            self.controller.reset()
        self._selector = SampleSelector(
            target_activation_rate=target,
            gate=self.gate,
            weighting=resolve_weighting(self.weighting, mode=self.mode, gate=self.gate),
            controller=self.controller,
            min_selected=self.min_selected,
            seed=self.seed,
            rank=0 if self.mode == "prune" else trainer.global_rank,
        )
        processes = Processes(trainer)
        self._decision = Decision(
            pl_module, significance=self.significance, selector=self._selector, processes=processes
        )
        self.ledger = Ledger()
        self.dense_ops.clear()
        self.stage, self._rate = "warmup", None
        self._books = Books(self.mode, self.ledger, self.dense_ops)
        self._step = self._interceptor(pl_module, self._selector.weighting, processes, explicit=explicit)
        self._step.install()
        self._epochs = None
        if self.mode == "prune":
            self._epochs = PrunedEpochs(self, trainer, self._selector, self._scheduler, processes)
            self._epochs.attach()
        self.load_state_dict(before)

    def _interceptor(
        self, module: pl.LightningModule, weighting: Weighting, processes: Processes, *, explicit: bool
    ) -> StepInterceptor:
        keep = functools.partial(keep_rows, batchnorm=self.batchnorm, dense_ops=self.dense_ops)
        return StepInterceptor(
            module,
            explicit=explicit,
            scored=self.mode == "subset",
            weighting=weighting,
            keep=keep if self.mode == "partial" else mask_rows,
            decide=self._decision.select,
            score=self._decision.scores,
            average=processes.mean,
            forward_context=self._books.forward,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask the schedule again (the length of an epoch is known now), and list the layers (all exist now)."""
        assert self._step is not None
        self._books.open(pl_module)
        if self.mode == "partial" and compiled_parts(pl_module):
            note_compiled()
        self._score = ScoringPass(
            pl_module, training_step=self._step.training_step, per_sample_loss=self._step.per_sample_loss
        )
        if self._epochs is not None:
            self._epochs.ensure_installed()
        elif self._scheduler is not None and (faults := self._scheduler.faults(trainer, batches_known=True)):
            raise ConfigurationError(faults)

    # ------------------------------------------------------------------ a batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide what is done with this batch; in ``subset`` score it and take the selected samples."""
        assert self._step is not None
        assert self._selector is not None
        stage: Stage = "sparse" if self._scheduler is None else self._scheduler.stage(trainer, batch_idx)
        if self._epochs is not None:
            stage = self._epochs.epoch.stage
        if stage != self.stage:
            self._books.interrupt()
        self.stage = stage
        if self._epochs is not None:
            samples = self._decision.count(batch), self._decision.indices(batch)
            self._step.plan = self._epochs.batch_plan(*samples, pl_module.device)
            return
        sparse = stage == "sparse" and self._selector.target_activation_rate < 1
        self._step.plan = plan = BatchPlan(self._decision.count(batch), sparse, self.mode == "partial")
        if sparse and self.mode == "subset":
            scored = self._score(batch, batch_idx, plan.batch_size)
            self._decision.take_subset(plan, batch, scored, explicit=self._step.per_sample_loss is not None)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Count the backward's FLOPs, once."""
        self._books.start_backward(None if self._step is None else self._step.plan)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting."""
        self._books.stop_backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the books, write the logs, let go of the batch."""
        assert self._step is not None
        assert self._selector is not None
        plan = self._step.plan
        if plan is None:  # Lightning calls this hook alone where the loader gave None
            if self._epochs is not None:
                self._epochs.epoch.batch += 1
            return
        self._step.plan = None
        self._books.finish_batch(plan, self.stage)
        self._rate = plan.selected / plan.batch_size if self._epochs is None else self._epochs.epoch.activation_rate
        if batch_idx == 0 or trainer.is_last_batch or trainer._logger_connector.should_update_logs:
            log_step(pl_module, self.ledger, self._selector, stage=self.stage, activation_rate=self._rate)

    # ------------------------------------------------------------------ interruptions and the end

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation inside an epoch is not training time."""
        if self._step is not None:
            self._books.interrupt()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What happens between epochs is not training time."""
        self._books.interrupt()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._leave()

    def _leave(self) -> None:
        if self._step is not None:
            self._step.remove()
            self._step = None
            self._books.close()
            if self._epochs is not None:
                self._epochs.detach()
            for name in ("_score", "_decision"):
                self.__dict__.pop(name, None)

    # ------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        """A copy is this callback with its books, outside the fit that runs."""
        return {**{k: v for k, v in vars(self).items() if k not in _LIVE}, "_step": None, "_epochs": None}

    def state_dict(self) -> dict[str, Any]:
        """Controller, draws and books; in ``prune`` scores, plan and random state too. Primitives and tensors alone."""
        if self._selector is None:
            return {}
        state = {"selector": self._selector.state_dict(), "ledger": self.ledger.state_dict()}
        return state if self._epochs is None else {**state, "epochs": self._epochs.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        if self._selector is not None and state_dict:
            self._selector.load_state_dict(state_dict["selector"])
            self.ledger.load_state_dict(state_dict["ledger"])
            if self._epochs is not None and "epochs" in state_dict:
                self._epochs.load_state_dict(state_dict["epochs"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A pruned loader must know that the run is resumed, also from a checkpoint without this callback."""
        if self._epochs is not None:
            self._epochs.expect_resume()
