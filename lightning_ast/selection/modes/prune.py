"""Mode ``prune``: remembered significance decides, before an epoch, which samples are loaded at all.

:mod:`lightning_ast.pruning` plans the epochs and keeps the loader, Lightning's counters and checkpoints in step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_ast.core.gate import Selection
from lightning_ast.pruning.epochs import PrunedEpochs
from lightning_ast.pruning.followed_steps import following_faults
from lightning_ast.pruning.own_parts import DataParts
from lightning_ast.pruning.planner import EpochPlanner
from lightning_ast.pruning.run_plan import rounded_stages
from lightning_ast.pruning.several_loaders import SeveralEpochs
from lightning_ast.pruning.streamed import StreamedEpochs
from lightning_ast.schedule import Stage
from lightning_ast.selection.decision import check_labels
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.modes.base import SelectionMode
from lightning_ast.selection.step_state import BatchFacts, StepState, Treatment

__all__ = ["PruneMode"]


class PruneMode(SelectionMode):
    """Trains on whole batches of the samples that the epoch's plan has selected, and remembers their significance."""

    name = "prune"

    def __init__(self, parts: FitParts, gating: Gating) -> None:
        super().__init__(parts, gating)
        settings = parts.settings
        self._data_parts = DataParts(parts.processes, own=settings.samples.own_parts)
        planner = EpochPlanner(
            parts.trainer,
            parts.selector,
            settings.schedule_of(parts.trainer),
            self._data_parts,
            settings.steps_of_pruned_epochs,
            samples=settings.samples,
            begin_target=None if parts.target is None else parts.target.begin,
        )
        planned: Callable[..., PrunedEpochs] = SeveralEpochs
        if settings.sample_filter is not None:
            planned = partial(StreamedEpochs, sample_filter=settings.sample_filter)
        self.epochs = planned(parts.owner, parts.trainer, planner)

    def attach(self) -> None:
        """Let Lightning's fit loop load the planned samples alone."""
        self.epochs.attach()

    def detach(self) -> None:
        """Leave the fit loop as it was. Safe to call twice."""
        self.epochs.detach()

    def start_training(self) -> list[str]:
        """Ensure that the loader is pruned; inform where stages were rounded to whole epochs."""
        self.epochs.ensure_installed()
        if rounded := rounded_stages(self.epochs.run):
            rank_zero_info(f"lightning-ast: {rounded}")
        if self._parts.settings.samples.initial_scores is not None and self.epochs.run.stage(0) == "warmup":
            rank_zero_warn(
                "lightning-ast: initial_scores has no effect, because the warmup scores every sample anew before an "
                "epoch is planned: use TwoStageScheduler(warmup_epochs=0)."
            )
        follows = self._parts.settings.steps_of_pruned_epochs == "follow"
        faults = following_faults(self._parts.trainer) if follows else []
        if self.epochs.batches_are_samples and self._parts.settings.samples.class_floor > 0:
            faults.append(
                "class_floor counts samples, and with batch_size=None whole batches are chosen: leave it out."
            )
        return faults

    def stage(self, batch_idx: int) -> Stage:
        """Return the stage of the running epoch."""
        return self.epochs.epoch.stage

    def open_batch(self, stage: Stage, size: int, indices: Tensor | None) -> StepState:
        """Return what the epoch's plan says of the batch: train on all of it, with the weights of the plan."""
        epoch = self.epochs.epoch
        planned = self.epochs.next_batch(size, indices)
        observe = self.epochs.observer_of(planned)
        facts = BatchFacts(
            size=size,
            sizes=self.epochs.sizes,
            indices=planned.indices,
            stands_for=planned.stands_for,
            observe=observe,
            is_planned=epoch.sparse,
            is_of_whole_epoch=epoch.stage == "sparse" and not epoch.sparse and self._parts.selector.selects,
        )
        if planned.weights is not None:
            step = StepState(facts, Treatment.SELECTED, Selection(torch.arange(size), planned.weights))
        else:
            step = StepState(facts, Treatment.DENSE if observe is None else Treatment.OBSERVED)
        self._record(step, planned.indices)
        return step

    def _record(self, step: StepState, indices: Tensor) -> None:
        """Count the samples of a batch, and give weight 0 to those that must never be trained on."""
        history = self.epochs.history
        assert history is not None
        assert history.record is not None
        loaded = indices[:1] if self.epochs.batches_are_samples else indices
        history.record.count(loaded, epoch=self.epochs.epoch.number)
        if history.rules.never is not None:
            step.weigh((~history.rules.never[indices]).double())

    def close_batch(self, step: StepState | None) -> None:
        """Go on in the plan and in the schedules."""
        if step is None:  # it was not trained on
            self.epochs.epoch.batch += 1
        else:
            self._tell_labels(step)
        self.epochs.finish_batch()

    def _tell_labels(self, step: StepState) -> None:
        history = self.epochs.history
        assert history is not None
        assert history.record is not None
        assert step.indices is not None
        if self.epochs.batches_are_samples:  # of several classes
            return
        history.record.tell(step.indices, step.labels)
        if step.labels is None and step.significance is not None:
            check_labels(history.rules.class_floor, None)

    def activation_rate(self, step: StepState) -> float:
        """Return planned / offered of the running epoch, in (0, 1]."""
        epoch = self.epochs.epoch
        return epoch.plan.activation_rate if epoch.plan is not None and epoch.sparse else 1.0

    def stages_ahead(self, epoch: int) -> list[Stage] | None:
        """List the stages of the epochs from this one on."""
        return self.epochs.run.stages_from(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return scores, plan and random state of all processes."""
        epochs = self.epochs.state_dict()
        return {"epochs": epochs, **self._data_parts.state_dict(epochs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the plan that a state holds; that of another mode is passed over."""
        if "epochs" not in state:
            return
        epochs = self._data_parts.part_of(state)
        if state["rule"]["significance"] != self._parts.settings.rule["significance"]:
            epochs = {**epochs, "history": None}  # scores of two kinds cannot be compared
        self.epochs.load_state_dict(epochs)

    def expect_resume(self) -> None:
        """Prepare for a checkpoint that is going to be loaded: the loader yields nothing until the epoch is known."""
        self.epochs.expect_resume()
