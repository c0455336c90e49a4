"""One fit: the parts that live from its setup to its end, and what each hook does with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ast.core.gate import Selection
from lightning_ast.errors import ConfigurationError, EmptyBatchError, EntryError
from lightning_ast.lightning_internals.compiled_step import open_compiled_step
from lightning_ast.mixin import overrides
from lightning_ast.pruning.epochs import PrunedEpochs
from lightning_ast.schedule import Stage
from lightning_ast.selection.accounting import Books
from lightning_ast.selection.decision import Decision
from lightning_ast.selection.faults import training_faults
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.modes import MODE_CLASSES
from lightning_ast.selection.modes.prune import PruneMode
from lightning_ast.selection.sample_count import told_numbers, told_weights, warn_of_unused_methods
from lightning_ast.selection.session_state import SessionState
from lightning_ast.selection.step_log import StepLog
from lightning_ast.selection.step_state import StepState, Treatment

__all__ = ["Session"]

_FLOPS = "flops_per_batch"


class Session:
    """What a :class:`~lightning_ast.SparseSelectionCallback` does in one fit; what can be read is of the last batch."""

    def __init__(self, parts: FitParts) -> None:
        module = parts.module
        settings = parts.settings
        self._close_step = open_compiled_step(module)  # ahead of the parts that take the step from the module
        self.ledger = parts.ledger
        self.selector = parts.selector
        self.quarantine = parts.quarantine
        self.stage: Stage = "warmup"
        self.activation_rate: float | None = None
        self.coverage: float | None = None
        self.watchers = parts.watchers  # of other callbacks, which add theirs
        self.step: StepState | None = None
        self._parts = parts
        self._trainer = parts.trainer
        self._module = module
        self._gating = Gating(parts, Decision(parts))
        self.mode = MODE_CLASSES[settings.mode](parts, self._gating)
        self.state = SessionState(parts, self.mode)
        self._books = Books(parts)
        self._log = StepLog(parts)
        self._wants_labels = settings.samples.wants_labels
        self._weighs = overrides(module, "sample_weights")
        self._last: tuple[Selection | None, int] | None = None
        self._offers_flops = not hasattr(module, _FLOPS)

    @property
    def last_selection(self) -> Selection | None:
        """Return the samples that the last batch was trained on; None before it, or where there were none."""
        if self._last is None:
            return None
        selection, size = self._last
        return Selection(torch.arange(size)) if selection is None else selection

    @property
    def epochs(self) -> PrunedEpochs | None:
        """Return the planned epochs of ``prune``; None in the other modes."""
        return self.mode.epochs if isinstance(self.mode, PruneMode) else None

    def attach(self) -> None:
        """Let the mode change what it has to change of the module or the trainer."""
        warn_of_unused_methods(self._module)
        self.mode.attach()

    def detach(self) -> None:
        """Leave module and trainer as they were; state can still be asked for. Safe to call twice."""
        self.abandon_batch()
        self.mode.detach()
        self._close_step()
        if self._offers_flops:
            self._module.__dict__.pop(_FLOPS, None)

    def start_training(self) -> None:
        """Prepare for the first batch: the layers, the optimizers and the length of an epoch are known now."""
        self._books.open()
        if faults := [*training_faults(self._trainer, mode=self.mode.name), *self.mode.start_training()]:
            raise ConfigurationError(faults)

    def start_batch(self, batch: object, batch_idx: int) -> None:
        """Decide what is done with this batch; in ``subset`` score it and take the selected samples."""
        if self.step is not None:  # its step failed and was caught, or another callback skipped the batch
            self.abandon_batch()
        self._parts.window.start_batch(self._trainer, batch_idx)
        self._books.start_batch(batch_idx)
        if self._parts.target is not None:
            self._parts.target.begin(self._trainer.current_epoch)
        self._enter_stage(self.mode.stage(batch_idx))
        size = self._size(batch)
        if size == 0:  # the step is the user's own, as in a plain run
            return
        step = self.mode.open_batch(self.stage, size, self._indices(batch, size))
        self.step = step
        step.labels = told_numbers(self._module, "sample_labels", batch, size)
        if self._weighs:
            weights = told_weights(self._module, batch, size)
            # Without weights of its own a batch still takes part in the sums of all processes and micro-batches.
            step.weigh(torch.ones(size, dtype=torch.float64) if weights is None else weights)
        # Ahead of everything that runs the network: a NaN in one sample would reach the others through BatchNorm.
        self.quarantine.examine(step, batch)
        if step.known_bad and step.treatment in (Treatment.DENSE, Treatment.OBSERVED):
            step.treatment = Treatment.CLEANED
        self._gating.labels_wanted = self._wants_labels or any(watcher.wants_labels for watcher in self.watchers)
        self.mode.prepare_step(step, batch, batch_idx)
        self._gating.start_batch(step, batch)
        # Last: the scoring pass of subset is not a part of the forward that is counted.
        self._books.flops.start_forward()

    def _enter_stage(self, stage: Stage) -> None:
        if stage != self.stage:
            self._books.clock.interrupt()  # the step between two stages belongs to neither
            for watcher in self.watchers:
                watcher.start_stage(stage)
        self.stage = stage

    def _size(self, batch: object) -> int:
        of_several = 0 if self.epochs is None else sum(self.epochs.sizes_of(batch))
        size = of_several or self._parts.samples(batch)
        if size == 0 and (self.stage == "sparse" or self._weighs) and self._parts.processes.count > 1:
            raise EmptyBatchError(
                "expected at least one sample in every batch of the sparse stage, where the processes weigh their "
                "samples together; got an empty batch. Let the collate_fn keep a sample, or filter the dataset."
            )
        return size

    def _indices(self, batch: object, size: int) -> Tensor | None:
        """Return the dataset indices that the module tells, else those that another callback has recorded."""
        indices = told_numbers(self._module, "sample_indices", batch, size)
        for watcher in self.watchers:
            drawn = watcher.indices(size)  # asked in any case: it counts the batches
            indices = drawn if indices is None else indices
        return indices

    def start_backward(self, loss: Tensor) -> None:
        """Put the gate at the entries of the loss; count its backward, if that is wanted."""
        if self._module.automatic_optimization:  # else the forward goes on behind this backward
            self._books.flops.stop_forward()
        self._gating.start_backward(loss)
        self._books.flops.start_backward(self.step, loss)

    def stop_backward(self) -> None:
        """End the count of the backward, and go on watching a step that runs its own."""
        self._books.flops.stop_backward()
        if self._offers_flops and self.step is not None:
            self._offer_flops(self._books.flops_of(self.step))
        self._gating.resume_forward()

    def start_optimizer_step(self, optimizer: Optimizer) -> None:
        """Weigh accumulated micro-batches as one large batch."""
        self._parts.window.rescale(optimizer)

    def finish_batch(self, batch_idx: int) -> None:
        """Keep the books, let go of the batch, log it."""
        step = self.step
        self.step = None  # at once: what fails below must not be finished a second time
        if step is None:  # an empty batch; or the loader gave None, where Lightning calls this hook alone
            self.mode.close_batch(None)
            self._log.settle()
            return
        try:
            self._finish_step(step, batch_idx)
        finally:  # a batch is in the ledger before the quarantine ends the run with it
            self._log.finish_batch(batch_idx, self.stage, activation_rate=self.activation_rate, coverage=self.coverage)

    def _finish_step(self, step: StepState, batch_idx: int) -> None:
        self._books.flops.stop_forward()
        self._gating.finish_batch(step)
        self.quarantine.restore()  # ahead of watchers and of the module's own hook, which see what was loaded
        self.mode.close_batch(step)
        self._last = None if step.is_void else (step.selection, step.batch_size)
        self.activation_rate = self.mode.activation_rate(step)
        self.coverage = self.mode.coverage(step)
        held = self.selector.target_activation_rate if self._parts.target is None else None
        self._books.finish_batch(step, self.stage, rate=self.activation_rate, target_rate=held)
        self.quarantine.finish_batch(step, self._trainer, batch_idx)
        for watcher in self.watchers:
            watcher.finish_batch(step)

    def abandon_batch(self) -> None:
        """Discard a batch whose step failed or was skipped by a hook. Safe where there is none."""
        self._books.flops.close()
        self._gating.close()
        self.quarantine.restore()
        self.step = None

    def finish_epoch(self) -> None:
        """Compare what was left out with what is allowed, over all processes."""
        self.abandon_batch()
        self.quarantine.finish_epoch()
        self._log.finish_epoch()

    def close_log(self, error: BaseException | None = None) -> None:
        """Give the loggers the last values, which need not be those of the last step that was logged."""
        self._log.close()
        if not isinstance(error, EntryError):  # which tells itself why nothing was selected
            self._gating.finish_fit()

    def interrupt(self) -> None:
        """Pause the timers until the next batch."""
        self._books.clock.interrupt()
        self._offer_flops(None)

    def _offer_flops(self, flops: float | None) -> None:
        # Lightning's ThroughputMonitor asks the module for it; a module's own answer stands.
        if self._offers_flops:
            self._module.__dict__[_FLOPS] = flops
