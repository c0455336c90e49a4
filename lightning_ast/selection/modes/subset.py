"""Mode ``subset``: a scoring pass on all samples, then the user's training step on the selected ones alone.

With a target coverage the rate follows what is left to learn. While it is so high that scoring costs more than it
spares, batches are not scored but trained on whole, and one of many shows whether the rate has fallen.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.batch.samples import select_batch
from lightning_ast.core.gate import Selection
from lightning_ast.errors import BatchError
from lightning_ast.lightning_internals.class_patch import method_of, put_on
from lightning_ast.mixin import overrides
from lightning_ast.mode_facts import cost_share
from lightning_ast.schedule import Stage
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.modes.base import SelectionMode
from lightning_ast.selection.scoring_pass import Scored, ScoringPass
from lightning_ast.selection.step_state import Part, StepState, Treatment
from lightning_ast.words import counted

__all__ = ["SubsetMode"]

_SCORED_EVERY = 16  # sparse batches of which one is scored while scoring does not pay


class SubsetMode(SelectionMode):
    """Trains on the selected samples by a step that sees no others; it is the one mode that wraps the training step."""

    name = "subset"

    def __init__(self, parts: FitParts, gating: Gating) -> None:
        super().__init__(parts, gating)
        self._module = parts.module
        self._training_step = parts.module.training_step
        self._wrapper = ExitStack()
        self._has_sliced = False
        self._part: Part | None = None
        self._score: ScoringPass | None = None
        self._decision = gating.decision

    def attach(self) -> None:
        """Wrap the training step."""
        method = method_of(self._module, "training_step", self._training_step, self._run)
        self._wrapper.callback(put_on(self._module, "training_step", method))

    def detach(self) -> None:
        """Take the wrapper off. Safe to call twice."""
        self._wrapper.close()
        self._part = None
        super().detach()

    def _run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        part = self._part
        if part is None:
            return self._training_step(batch, *args, **kwargs)
        try:
            output = self._training_step(part.batch, *args, **kwargs)
        except Exception as error:
            if self._has_sliced:  # an error of the user's own: slices have worked before
                raise
            raise BatchError(
                f"training_step failed on the {counted(part.norms.numel(), 'selected sample')} alone "
                f"({type(error).__name__}: {error}): perhaps it keeps a state of the full batch's size (the hidden "
                "state of a recurrent layer), or the batch is not sliced as a whole. Use mode='partial', or override "
                "SparseLossMixin.select_batch."
            ) from error
        self._has_sliced = True
        return output

    def start_training(self) -> list[str]:
        """Prepare the scoring pass: the layers all exist now."""
        self._score = ScoringPass(self._module, self._training_step, self._gating)
        return super().start_training()

    def open_batch(self, stage: Stage, size: int, indices: Tensor | None) -> StepState:
        """Return what is to be done with a batch: where scoring it does not pay, it is trained on whole."""
        step = super().open_batch(stage, size, indices)
        selector = self._parts.selector
        expected = selector.expected_rate  # known with a target coverage alone, and the same in all processes
        costs_more = expected is not None and cost_share("subset", expected) >= 1
        if costs_more and step.selects and selector.steps % _SCORED_EVERY:
            selector.pass_over()
            step.treatment = Treatment.WHOLE
            step.selection = Selection(torch.arange(size))
        return step

    def prepare_step(self, step: StepState, batch: Any, batch_idx: int) -> None:
        """Score the batch, and take the selected samples; a dense batch is scored where that proves the entries."""
        assert self._score is not None
        self._part = None  # an abandoned batch may have left its own
        if not step.selects and not self._gating.scoring_search.wants_trace(step.batch_size):
            return
        with ExitStack() as sections:
            for watcher in self._parts.watchers:
                sections.enter_context(watcher.scoring())
            scored = self._score(batch, batch_idx, step.batch_size)
        if not step.selects:
            return
        if scored is None:
            self._gating.count_ungated(step)
        else:
            step.is_scored_ahead = True
            self._take(step, batch, scored)
            self._part = step.part

    def _take(self, step: StepState, batch: Any, scored: Scored) -> None:
        scores = finite = scored.norms
        if scored.record is not None:
            finite = scored.record.losses
            scores = self._decision.scores(step, batch, scored.record)
        with torch.no_grad():
            self._decision.decide_ahead(step, scores, finite, scored.labels)
        if step.is_whole or step.is_void or (step.known_bad and step.selected == 1):
            return  # the step sees the whole batch: BatchNorm in training mode refuses a single sample
        assert step.selection is not None
        indices = step.selection.indices.to(scored.norms.device, non_blocking=True)
        # Among the selected samples, a tensor that is shared looks like their own where it has as many rows: so a part
        # of them is taken out of the whole batch
        take = partial(self._take_again, batch, step.batch_size, indices)
        step.part = Part(self._taken(batch, step.batch_size, indices), scored.norms.index_select(0, indices), take)

    def _take_again(self, batch: Any, size: int, indices: Tensor, _: Any, positions: Tensor) -> Any:
        return self._taken(batch, size, indices[positions.to(indices.device)])

    def _taken(self, batch: Any, size: int, indices: Tensor) -> Any:
        mixed: Any = self._module
        if overrides(self._module, "select_batch"):
            return mixed.select_batch(batch, indices)
        return select_batch(batch, indices, batch_size=size)

    def close_batch(self, step: StepState | None) -> None:
        """Let go of the selected samples."""
        self._part = None
