"""``SparseSelectionCallback``: reads the trainer, calls the core, writes the step's loss and the logs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_ast.callbacks._faults import ConfigurationError, setting_faults, use_faults
from lightning_ast.callbacks._logs import log_step, note_compiled, note_dense_ops, note_first_selection
from lightning_ast.callbacks._measure import FlopCount, StepClock
from lightning_ast.callbacks._scoring import ScoringPass
from lightning_ast.callbacks._step import BatchPlan, StepInterceptor
from lightning_ast.callbacks.two_stage import Stage, TwoStageScheduler
from lightning_ast.core.batch import batch_size_of, first_input, select_batch
from lightning_ast.core.controller import PIController
from lightning_ast.core.execution import WEIGHTING_DEFAULTS, Mode, mask_rows
from lightning_ast.core.gate import GateName, Selection, Weighting
from lightning_ast.core.ledger import Ledger
from lightning_ast.core.losses import LossRecord
from lightning_ast.core.partial import BatchNormBackward, compiled_parts, keep_rows
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import SignificanceFn, SignificanceName, compute_significance
from lightning_ast.mixin import SparseLossMixin, overrides

__all__ = ["SparseSelectionCallback"]


class SparseSelectionCallback(Callback):
    """Trains each batch on the samples that teach most; everything else stays the user's and Lightning's.

    Cost of a sparse step as a share of a dense one, counting forward 1 and backward 2, at activation rate r:
    ``partial`` (1 + 2r) / 3: the step runs once, on the full batch, and its backward computes over the selected rows;
    ``subset`` (1 + 3r) / 3: a scoring forward, then the step on the selected samples; ``mask`` 1: it saves nothing and
    is here for comparison with the original scripts.
    The loss that the training step returns and logs stays that of the full batch; only its gradient is the selection's.
    In ``subset`` other metrics of ``training_step`` see the selected samples alone. Under DDP the ranks' gradients
    are averaged so that every selected sample counts alike; under gradient accumulation each micro-batch keeps its own
    denominator.

    Args:
        target_activation_rate: share of the samples to train on, in (0, 1]; 1 is bitwise the plain run.
        mode: ``"partial"``, ``"subset"`` or ``"mask"`` (``"prune"`` is not built yet). ``partial`` suits eager models;
            the backward of a ``torch.compile``d region stays a full one there, so use ``subset`` with those.
        gate: ``"soft"`` (keep with probability ``clip(significance / threshold, floor, 1)``), ``"threshold"`` (the
            original's hard cut: trained from scratch it needs a warmup and a controller that holds its rate) or
            ``"topk"``.
        significance: ``"el2n"``, ``"loss"``, ``"loss_entropy"``, ``"loss_intensity"``, ``"confidence"`` or a callable
            ``(losses, logits, inputs, targets) -> (B,)``. A module's own ``significance`` method wins.
        weighting: importance weights p^0, p^-1/2, p^-1: ``"none"``, ``"sqrt"``, ``"unbiased"``. None is ``"sqrt"`` for
            the soft gate; the hard gates have no probabilities and always use ``"none"``.
        controller: moves the threshold; None makes a default :class:`~lightning_ast.core.PIController`.
        min_selected: fewest samples kept of a batch: a count, or a share in (0, 1) (0.1 is the original's).
        seed: of the gate's own draws; global generators are not touched.
        batchnorm: in ``partial``, the backward of BatchNorm in training mode: ``"selected"`` (over the selected rows,
            an approximation) or ``"exact"`` (a full backward from there on). See
            :func:`lightning_ast.core.select_rows`.

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

    # ------------------------------------------------------------------ setup

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be known before the first batch, then wrap the training step."""
        if stage != "fit":
            return
        explicit = overrides(pl_module, "per_sample_loss")
        self._check(trainer, pl_module, explicit=explicit)
        self._scheduler = next(iter(_schedulers(trainer)), None)
        target = self.target_activation_rate
        if self._scheduler is not None and self._scheduler.target_activation_rate is not None:
            target = self._scheduler.target_activation_rate
        if self.controller is not None:
            self.controller.reset()
        self._selector = SampleSelector(
            target_activation_rate=target,
            gate=self.gate,
            weighting=self._resolved_weighting(),
            controller=self.controller,
            min_selected=self.min_selected,
            seed=self.seed,
            rank=trainer.global_rank,
        )
        self.ledger = Ledger()
        self.dense_ops.clear()
        self.stage, self._rate, self._told, self._told_ops = "warmup", None, False, set[str]()
        self._distributed = trainer.world_size > 1
        self._clock = StepClock()
        keep = functools.partial(keep_rows, batchnorm=self.batchnorm, dense_ops=self.dense_ops)
        self._step = StepInterceptor(
            pl_module,
            explicit=explicit,
            scored=self.mode == "subset",
            weighting=self._selector.weighting,
            keep=mask_rows if self.mode == "mask" else keep,
            decide=self._decide,
            rehearse=self._scores,
            average=self._average,
            forward_context=lambda: self._flops.forward(),  # noqa: PLW0108 - made at the start of training
        )
        self._trainer = trainer
        self._resolve_hooks(pl_module)
        self._step.install()

    def _resolve_hooks(self, module: Any) -> None:
        """The mixin's methods where the module uses it, the core's functions where not."""
        mixed = isinstance(module, SparseLossMixin)
        self._count: Callable[[Any], int] = module.count_samples if mixed else batch_size_of
        self._take: Callable[[Any, Tensor], Any] = module.select_batch if mixed else select_batch
        own = overrides(module, "significance")
        self._significance: SignificanceName | SignificanceFn = module.significance if own else self.significance

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, *, explicit: bool) -> None:
        faults = setting_faults(self)
        faults += use_faults(module, mode=self.mode, explicit=explicit)
        schedulers = _schedulers(trainer)
        if len(schedulers) > 1:
            faults.append(f"expected one TwoStageScheduler, got {len(schedulers)}: keep one.")
        for scheduler in schedulers[:1]:
            faults += scheduler.faults(trainer, batches_known=False)
        if faults:
            raise ConfigurationError(faults)

    def _resolved_weighting(self) -> Weighting:
        if self.gate != "soft":
            return "none"
        return WEIGHTING_DEFAULTS[self.mode] if self.weighting is None else self.weighting

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask the schedule again (the length of an epoch is known now), and list the layers (all exist now)."""
        assert self._step is not None
        self._flops = FlopCount(pl_module)
        if self.mode == "partial" and compiled_parts(pl_module):
            note_compiled()
        self._score = ScoringPass(
            pl_module, training_step=self._step.training_step, per_sample_loss=self._step.per_sample_loss
        )
        if self._scheduler is not None and (faults := self._scheduler.faults(trainer, batches_known=True)):
            raise ConfigurationError(faults)

    # ------------------------------------------------------------------ a batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide what is done with this batch; in ``subset`` score it and take the selected samples."""
        assert self._step is not None
        assert self._selector is not None
        stage: Stage = "sparse" if self._scheduler is None else self._scheduler.stage(trainer, batch_idx)
        if stage != self.stage:
            self._clock.interrupt()
        self.stage = stage
        sparse = stage == "sparse" and self._selector.target_activation_rate < 1
        self._step.plan = plan = BatchPlan(self._count(batch), sparse, self.mode == "partial")
        if sparse and self.mode == "subset":
            self._plan_subset(plan, batch, batch_idx)

    def _plan_subset(self, plan: BatchPlan, batch: Any, batch_idx: int) -> None:
        scored = self._score(batch, batch_idx, plan.batch_size)
        if scored is None:
            plan.sparse = False
            return
        losses, record = scored
        plan.selection = self._decide(batch, losses, record)
        plan.sub_batch = self._take(batch, plan.selection.indices)
        if record is None or self._step is None or self._step.per_sample_loss is not None:
            plan.full_loss = losses.mean()
        else:
            plan.full_loss, plan.total_count, plan.elements = record.total, record.counts.sum(), record.elements

    def _decide(self, batch: Any, losses: Tensor, record: LossRecord | None) -> Selection:
        assert self._selector is not None
        scores = self._scores(batch, losses, record)
        selection = self._selector.select(scores, average=self._average if self._distributed else None)
        if not self._told:
            self._told = True
            el2n = self._significance == "el2n"
            note_first_selection(self._selector, record, el2n=el2n, batch_size=losses.numel(), selection=selection)
        return selection

    def _scores(self, batch: Any, losses: Tensor, record: LossRecord | None) -> Tensor:
        return compute_significance(self._significance, record, losses, first_input(batch, losses.numel()))

    def _average(self, value: Tensor) -> Tensor:
        if not self._distributed:
            return value
        averaged = self._trainer.strategy.reduce(value.clone(), reduce_op="mean")
        return averaged if isinstance(averaged, Tensor) else value.new_tensor(averaged)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Count the backward's FLOPs, once."""
        self._flops.start_backward(None if self._step is None else self._step.plan)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop counting."""
        self._flops.stop_backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the books, write the logs, let go of the batch."""
        assert self._step is not None
        assert self._selector is not None
        plan = self._step.plan
        if plan is None:  # Lightning calls this hook alone where the loader gave None
            return
        self._step.plan = None
        dense_ops = self._flops.finish_batch(self.ledger, plan, self.dense_ops)
        note_dense_ops(dense_ops, self._told_ops)
        samples = {"offered": plan.batch_size, "selected": plan.selected}
        mode = self.mode if plan.sparse else None
        self.ledger.record(self.stage, mode=mode, **samples, dense_share=dense_ops.at_most)
        self._clock.finish_batch(self.ledger, self.stage, offered=plan.batch_size)
        self._rate = plan.selected / plan.batch_size
        if batch_idx == 0 or trainer.is_last_batch or trainer._logger_connector.should_update_logs:
            log_step(pl_module, self.ledger, self._selector, stage=self.stage, activation_rate=self._rate)

    # ------------------------------------------------------------------ interruptions and the end

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation inside an epoch is not training time."""
        if self._step is not None:
            self._clock.interrupt()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What happens between epochs is not training time."""
        self._clock.interrupt()

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
            if hasattr(self, "_flops"):
                self._flops.close()
            for name in ("_trainer", "_score", "_count", "_take", "_significance"):
                self.__dict__.pop(name, None)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Controller, draws and books: primitives and tensors alone. The stage follows from the step."""
        if self._selector is None:
            return {}
        return {"selector": self._selector.state_dict(), "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        if self._selector is not None and state_dict:
            self._selector.load_state_dict(state_dict["selector"])
            self.ledger.load_state_dict(state_dict["ledger"])


def _schedulers(trainer: pl.Trainer) -> list[TwoStageScheduler]:
    return [c for c in trainer.callbacks if isinstance(c, TwoStageScheduler)]  # type: ignore[attr-defined]
