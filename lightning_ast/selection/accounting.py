"""The books of a fit, kept from the callback's hooks: samples, FLOPs and seconds of each batch into the ledger."""

from __future__ import annotations

import time

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_ast.core.ledger import FlopsPerSample, Ledger, saves_too_little
from lightning_ast.mode_facts import Mode, cost_share
from lightning_ast.schedule import Stage
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.flop_count import DenseOps, FlopCount
from lightning_ast.selection.step_state import StepState

__all__ = ["SETTLE_STEPS", "Books", "StepClock"]

SETTLE_STEPS = 3  # first steps of each stage that are not timed: caches, compilation, the step whose FLOPs are counted


class Books:
    """Writes a fit's batches into its ledger; ``flops`` counts those of a step as it runs, ``clock`` its time."""

    def __init__(self, parts: FitParts) -> None:
        self._parts = parts
        self._mode = parts.settings.mode
        self._ledger = parts.ledger
        self.clock = StepClock()
        self._named_ops = set[str]()
        self.flops = FlopCount(nn.Module(), enabled=False)  # until the layers are all there
        self._dense_share = 0.0
        self._is_judged = False
        self._trained: list[bool] | None = None

    def open(self) -> None:
        """Prepare to count FLOPs: the layers are all there."""
        # A resumed run that did not know the cost of its earlier batches cannot learn it from a later one.
        lost = self._ledger.offered > 0 and self._ledger.flops is None
        self.flops = FlopCount(self._parts.module, enabled=self._parts.settings.count_flops and not lost)

    def start_batch(self, batch_idx: int) -> None:
        """Give the FLOPs up where an epoch begins to train other parameters than those that were counted."""
        if batch_idx > 0:  # parameters are frozen between epochs; asking in every batch would cost time
            return
        trained = [parameter.requires_grad for parameter in self._parts.module.parameters()]
        if self._trained not in (None, trained) and self._ledger.flops is not None:
            self._ledger.flops = None
            rank_zero_warn(
                "lightning-ast: FLOPs are not known any more, and there are no ast/savings_flops: they are counted "
                "once, and since then other parameters are trained (layers were frozen or unfrozen)."
            )
        self._trained = trained

    def flops_of(self, step: StepState) -> float | None:
        """Return the FLOPs of the running step, as far as they are known by now."""
        each = self._ledger.flops or self.flops.of_sample(step)
        if each is None:
            return None
        return each.of_batch(
            self._mode_of(step), offered=step.offered, selected=step.selected, dense_share=self._dense_share
        )

    def finish_batch(self, step: StepState, stage: Stage, *, rate: float, target_rate: float | None) -> None:
        """Count a batch that was trained on; warn once where sparse ones save next to nothing."""
        # There is no target rate where a coverage is held, or where a function gives it: the rate follows.
        mode = self._mode_of(step)
        dense_ops = self.flops.finish_batch(self._ledger, step, self._parts.dense_ops)
        self._dense_share = 1.0 if dense_ops.share is None else dense_ops.share
        advice = None
        # The measured share decides what a mode is worth, so the verdict waits until it is final.
        is_judged = self._is_judged or not dense_ops.settled or self._ledger.flops is None
        if target_rate is None:  # a rate at which the mode cannot pay is not the one that the run comes to
            is_judged = is_judged or mode is None or cost_share(mode, rate) >= 1
        if mode is not None and not is_judged:
            assert self._ledger.flops is not None
            self._is_judged = True
            held = rate if target_rate is None else target_rate
            advice = _poor_savings(mode, self._ledger.flops, rate=held, dense_share=self._dense_share)
        if dense_ops.calls:
            _warn_of_dense_ops(dense_ops, self._named_ops, advice)
        elif advice is not None:
            rank_zero_warn(f"lightning-ast: {advice}")
        self._ledger.record(
            stage,
            mode=mode,
            offered=step.offered,
            selected=step.selected,
            dense_share=self._dense_share,
            whole=step.is_whole or step.facts.is_of_whole_epoch,
        )
        self.clock.finish_batch(self._ledger, stage, offered=step.offered)

    def _mode_of(self, step: StepState) -> Mode | None:
        """Return the mode whose passes a batch had; None for a dense step."""
        # A batch that was scored and then trained on whole has paid for its scoring: its passes are those of the mode.
        has_passes = step.selects or step.facts.is_planned or (step.is_whole and step.is_scored_ahead)
        return self._mode if has_passes else None


def _warn_of_dense_ops(dense_ops: DenseOps, warned: set[str], advice: str | None) -> None:
    """Warn once of each backward op of ``partial`` that ran over the whole batch, with what that cost."""
    if not dense_ops.settled or dense_ops.calls.keys() <= warned:
        return
    warned.update(dense_ops.calls)
    names = ", ".join(f"{name} (x{calls})" for name, calls in dense_ops.calls.most_common())
    cost = "their cost was not counted"
    if dense_ops.share is not None:
        cost = f"{dense_ops.share:.0%} of the backward's FLOPs are spent on every sample"
    rank_zero_warn(
        "lightning-ast: in mode='partial' these backward operations ran over the whole batch, and so did all that "
        f"lies before them: {names}; {cost}. Gradients are exact"
        + (f", but {advice}" if advice else "; if the share is large, mode='subset' saves more.")
    )


def _poor_savings(mode: Mode, flops: FlopsPerSample, *, rate: float, dense_share: float) -> str | None:
    """Describe a mode that saves next to nothing with this module, and name the modes that would save; else None."""
    forward = flops.forward / flops.dense
    if not saves_too_little(mode, rate, forward=forward, dense_share=dense_share):
        return None
    own = cost_share(mode, rate, forward=forward, dense_share=dense_share)
    fresh: Mode = "partial" if mode == "subset" else "subset"
    costs = {other: cost_share(other, rate, forward=forward) for other in ("prune", fresh)}
    others = " and ".join(f"mode={other!r} would cost {cost:.0%}" for other, cost in costs.items() if cost < 0.95)
    measured = f"the forward is {forward:.0%} of a dense step (a third where all layers are trained)"
    if dense_share > 0.05:
        measured += f", and {dense_share:.0%} of the backward runs over every sample"
    return (
        f"mode={mode!r} at an activation rate of {rate:.0%} costs {own:.1%} of the FLOPs of dense training, as counted "
        f"in this run ({cost_share(mode, rate):.0%} where all parameters are trained): {measured}. {others}."
    )


class StepClock:
    """Wall time from the end of one training batch to the end of the next, loading included."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps: dict[str, int] = {}

    def interrupt(self) -> None:
        """Leave the running step out: something else than training happens now."""
        self._last = None

    def finish_batch(self, ledger: Ledger, stage: str, *, offered: int) -> None:
        """Add the step that ends now to the ledger, if it stands for its stage."""
        # Nothing waits for the device here: over many steps its queue is full, and the host is as slow as it is.
        now = time.perf_counter()
        self._steps[stage] = self._steps.get(stage, 0) + 1
        if self._last is not None and self._steps[stage] > SETTLE_STEPS:
            ledger.record_seconds(stage, seconds=now - self._last, offered=offered)
        self._last = now
