"""One fit: the parts that live from its setup to its end, and what each hook does with them."""

from __future__ import annotations

import uuid
from collections import Counter
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_ast.core.execution import Mode
from lightning_ast.core.gate import Selection
from lightning_ast.core.ledger import Ledger
from lightning_ast.core.partial import compiled_parts
from lightning_ast.errors import ConfigurationError, EmptyBatchError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.lightning_internals.run_limits import run_length
from lightning_ast.mixin import overrides
from lightning_ast.pruning.epochs import PrunedEpochs
from lightning_ast.pruning.run_plan import rounded_stages
from lightning_ast.schedule import Stage
from lightning_ast.selection.accounting import Books
from lightning_ast.selection.accumulation import AccumulationWindow
from lightning_ast.selection.checks import check_indices
from lightning_ast.selection.decision import Decision
from lightning_ast.selection.faults import training_faults
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.modes.subset import SubsetStep
from lightning_ast.selection.notices import note_compiled, note_unused_methods
from lightning_ast.selection.observer import Watcher
from lightning_ast.selection.quarantine import Quarantine
from lightning_ast.selection.resume import Resumption
from lightning_ast.selection.sample_count import SampleCount
from lightning_ast.selection.scoring_pass import ScoringPass
from lightning_ast.selection.session_state import FitState
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.selection.stages import stage_of_batch, stages_from
from lightning_ast.selection.step_state import BatchPlan

__all__ = ["Session"]

_FLOPS = "flops_per_batch"


class Session:
    """What a :class:`~lightning_ast.SparseSelectionCallback` does in one fit.

    Args:
        settings: What the fit selects by.
        trainer: of the fit.
        module: that is trained.
        owner: The selection callback.
        ledger: The books of the run.
        dense_ops: The backward ops that ran over all rows, and their calls; added to.

    Attributes:
        state: Saves and restores its parts.
        stage: of the last batch.
        activation_rate: selected / offered of the last batch (in ``prune`` of its epoch), or None before the first.
        watchers: other callbacks', told of what is done.
        plan: Of the running batch, or None.
    """

    def __init__(
        self,
        settings: SelectionSettings,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        *,
        owner: Callback,
        ledger: Ledger,
        dense_ops: Counter[str],
    ) -> None:
        self.mode: Mode = settings.mode
        self.ledger = ledger
        self.stage: Stage = "warmup"
        self.activation_rate: float | None = None
        self.watchers: list[Watcher] = []
        self._trainer = trainer
        self._module = module
        self._schedule = settings.schedule
        self.selector = settings.selector(trainer.global_rank)
        self._processes = processes = Processes(trainer)
        self.quarantine = Quarantine(settings.quarantine_limit, processes)
        self._window = AccumulationWindow()
        self._decision = Decision(
            module,
            settings.significance,
            self.selector,
            processes,
            self.quarantine,
            divisor=lambda own, offered: self._window.divisor(*processes.mean_of(own, offered)),
        )
        self._books = Books(settings.mode, ledger, dense_ops, count_flops=settings.count_flops)
        self.gating = self._gating_of(settings, dense_ops)
        self._samples_in = SampleCount(trainer, module)
        self.plan: BatchPlan | None = None
        self._last: tuple[Selection | None, int] | None = None
        self._subset = SubsetStep(module) if settings.mode == "subset" else None
        self._score: ScoringPass | None = None
        self._resumption, self._tells_flops = Resumption(trainer, processes), not hasattr(module, _FLOPS)
        self.epochs: PrunedEpochs | None = None
        if settings.mode == "prune":
            self.epochs = PrunedEpochs(owner, trainer, self.selector, settings.schedule, processes)
        self.state = self._state_of(settings)

    def _gating_of(self, settings: SelectionSettings, dense_ops: Counter[str]) -> Gating:
        return Gating(
            self._module,
            self._decision,
            execution="partial" if settings.mode == "partial" else "mask",
            batchnorm=settings.batchnorm,
            dense_ops=dense_ops,
            take=getattr(self._module, "select_batch", None) if overrides(self._module, "select_batch") else None,
            lost=self.quarantine.lost,
            enabled=settings.mode == "prune" or self.selector.target_activation_rate < 1,
        )

    def _state_of(self, settings: SelectionSettings) -> FitState:
        return FitState(
            trainer=self._trainer,
            token=self._trainer.strategy.broadcast(uuid.uuid4().hex),
            rule=settings.rule,
            owner=settings.state_key,
            selector=self.selector,
            ledger=self.ledger,
            quarantine=self.quarantine,
            resumption=self._resumption,
            epochs=self.epochs,
        )

    @property
    def last_selection(self) -> Selection | None:
        """The samples that the last batch was trained on; None before it, or where there were none."""
        if self._last is None:
            return None
        selection, size = self._last
        return Selection(torch.arange(size)) if selection is None else selection

    def attach(self) -> None:
        """In ``subset`` wrap the training step; in ``prune`` lead the fit loop."""
        note_unused_methods(self._module)
        self.wrap()
        if self.epochs is not None:
            self.epochs.attach()

    def detach(self) -> None:
        """Leave module and trainer as they were; state can still be asked for. Safe to call twice."""
        self.abandon_batch()
        self.unwrap()
        if self._tells_flops:
            self._module.__dict__.pop(_FLOPS, None)
        self._resumption.detach()
        if self.epochs is not None:
            self.epochs.detach()

    def wrap(self) -> None:
        """In ``subset`` wrap the training step."""
        if self._subset is not None:
            self._subset.install()

    def unwrap(self) -> None:
        """Take the wrapper off. Safe to call twice."""
        if self._subset is not None:
            self._subset.remove()

    def start_training(self) -> None:
        """Ask the schedule again (the length of an epoch is known now), and list the layers (all exist now)."""
        self._books.open(self._module)
        self._resumption.start_training()
        if self.mode == "partial" and compiled_parts(self._module):
            note_compiled()
        if self._subset is not None:
            self._score = ScoringPass(
                self._module,
                training_step=self._subset.training_step,
                gating=self.gating,
                needs_losses=self._decision.needs_losses,
            )
        faults = training_faults(self._trainer, mode=self.mode)
        if self.epochs is not None:
            self.epochs.ensure_installed()
            if rounded := rounded_stages(self.epochs.run):
                rank_zero_info(f"lightning-ast: {rounded}")
        else:
            faults += self._schedule.length_faults(run_length(self._trainer), batches_known=True)
        if faults:
            raise ConfigurationError(faults)

    # ------------------------------------------------------------------ a batch

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        """Decide what is done with this batch; in ``subset`` score it and take the selected samples."""
        if self.plan is not None:
            self.abandon_batch()
        self._window.start_batch(self._trainer, batch_idx)
        self._books.start_batch(batch_idx)
        stage = self._stage_of(batch_idx)
        if stage != self.stage:
            self._books.interrupt()
            for watcher in self.watchers:
                watcher.start_stage(stage)
        self.stage = stage
        size = self._size(batch)
        self.plan = None  # of an empty batch: the step is the user's own, as in a plain run
        if size == 0:
            return
        indices = self._indices(batch, size)
        check_indices(indices, size)
        if self.epochs is not None:
            plan = self._planned(self.epochs, size, indices)
        else:
            sparse = stage == "sparse" and self.selector.target_activation_rate < 1
            plan = BatchPlan(size, sparse, self.mode == "partial", indices=indices)
        self.plan = plan
        self.quarantine.examine(plan, batch)
        plan.leave_out = not plan.sparse and plan.known_bad
        if self._subset is not None and (plan.sparse or self.gating.scoring_traces.wanted(size)):
            self._take_subset(self._subset, plan, batch, batch_idx)
        self.gating.labels_wanted = any(watcher.wants_labels for watcher in self.watchers)
        self.gating.start_batch(plan, batch)
        self._books.start_forward()

    @staticmethod
    def _planned(epochs: PrunedEpochs, size: int, indices: Tensor | None) -> BatchPlan:
        planned = epochs.next_batch(size, indices)
        plan = BatchPlan(size, sparse=False, stands_for=planned.stands_for, indices=planned.indices)
        plan.observe = epochs.observer_of(planned)
        if planned.weights is not None:
            plan.sparse = True
            plan.selection = Selection(torch.arange(size), planned.weights)
        return plan

    def _size(self, batch: Any) -> int:
        """Count the samples of a batch, which may be none.

        Raises:
            EmptyBatchError: There are none, and the other processes wait for this one in a sparse step.
        """
        size = self._samples_in(batch)
        if size == 0 and self.stage == "sparse" and self._processes.count > 1:
            raise EmptyBatchError(
                "expected at least one sample in every batch of the sparse stage, where the processes weigh their "
                "selections together; got an empty batch. Let the collate_fn keep a sample, or filter the dataset."
            )
        return size

    def _take_subset(self, step: SubsetStep, plan: BatchPlan, batch: Any, batch_idx: int) -> None:
        assert self._score is not None
        step.plan = plan
        with ExitStack() as sections:
            for watcher in self.watchers:
                sections.enter_context(watcher.scoring())
            scored = self._score(batch, batch_idx, plan.batch_size)
        if scored is None and plan.sparse:
            self.gating.tell_ungated(plan)
        elif scored is not None and plan.sparse:
            self._decision.take_subset(plan, batch, scored)

    def _indices(self, batch: Any, size: int) -> Any:
        indices = self._decision.indices(batch)
        for watcher in self.watchers:
            drawn = watcher.indices(size)
            indices = drawn if indices is None else indices
        return indices

    def _stage_of(self, batch_idx: int) -> Stage:
        if self.epochs is not None:
            return self.epochs.epoch.stage
        if not self._schedule.dense:
            return "sparse"
        first = self._window.first_batch(self._trainer, batch_idx)  # a stage begins with an optimizer step
        return stage_of_batch(self._schedule, self._trainer, first)

    def stages_ahead(self) -> list[Stage] | None:
        """List the stages of the epochs that follow the running one; None in a run without an end that is known."""
        following = self._trainer.current_epoch + 1
        if self.epochs is not None:
            return self.epochs.run.stages_from(following)
        return stages_from(following, self._schedule, self._trainer)

    def start_backward(self, loss: Tensor) -> None:
        """Put the gate at the entries of the loss; count its backward, if that is wanted."""
        automatic = self._module.automatic_optimization
        if automatic:
            self._books.stop_forward()
        self.gating.start_backward(loss)
        self._books.start_backward(self.plan, loss)

    def stop_backward(self) -> None:
        """End what began with the backward."""
        self._tell_flops(self._books.stop_backward(self.plan))
        self.gating.resume_forward()

    def start_optimizer_step(self, optimizer: Optimizer) -> None:
        """Weigh accumulated micro-batches as one large batch."""
        self._window.rescale(optimizer)

    def finish_batch(self, batch_idx: int) -> bool:
        """Keep the books, let go of the batch.

        Returns:
            Whether it was trained on.
        """
        plan = self.plan
        self.plan = None
        if plan is None:  # an empty batch; or the loader gave None, where Lightning calls this hook alone
            if self.epochs is not None:
                self.epochs.epoch.batch += 1
            return False
        self._books.stop_forward()
        self.gating.finish_batch(plan)
        self.quarantine.restore()
        if self._subset is not None:
            self._subset.plan = None
        self._books.finish_batch(plan, self.stage, target_rate=self.selector.target_activation_rate)
        planned = None if self.epochs is None else self.epochs.epoch.activation_rate
        self._last = None if plan.void else (plan.selection, plan.batch_size)
        self.activation_rate = plan.selected / plan.batch_size if planned is None else planned
        self.quarantine.finish_batch(plan, self._trainer, batch_idx)
        for watcher in self.watchers:
            watcher.finish_batch(plan)
        return True

    def abandon_batch(self) -> None:
        """Leave a batch that has no end: a step that failed, or was skipped by a hook. Safe where there is none."""
        self._books.close()
        self.gating.close()
        self.quarantine.restore()
        self.plan = None

    def finish_epoch(self) -> None:
        """Compare what was left out with what is allowed, over all processes."""
        self.abandon_batch()
        self.quarantine.finish_epoch()

    def interrupt(self) -> None:
        """Something else than training happens now: it is not training time."""
        self._books.interrupt()
        self._tell_flops(None)

    def _tell_flops(self, flops: float | None) -> None:
        """What Lightning's ThroughputMonitor asks the module for, unless the module has an answer of its own."""
        if self._tells_flops:
            self._module.__dict__[_FLOPS] = flops
