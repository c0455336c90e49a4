"""The messages of the selection callback: each is given once."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_ast.core.gate import Selection
from lightning_ast.core.ledger import FlopsPerSample, saves_too_little
from lightning_ast.core.selector import SampleSelector
from lightning_ast.mode_facts import Mode, cost_share
from lightning_ast.selection.flop_count import DenseOps
from lightning_ast.words import counted

__all__ = ["WarnOnce", "poor_savings", "warn_of_dense_ops", "warn_of_minimum"]


_EXCESS = 0.02
"""Coverage above its target that one sample more or less does not explain."""


_FEW = 2
"""Samples that may well carry a coverage on their own, in one batch of many."""


class WarnOnce:
    """Warns of each kind of problem once; the first words of a message tell its kind."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def __call__(self, message: str) -> None:
        """Warn, unless there was a warning of this kind before; sizes behind its first words may differ."""
        kind = message[:20]
        if kind not in self._kinds:
            self._kinds.add(kind)
            rank_zero_warn(f"lightning-ast: {message}")


def warn_of_minimum(selector: SampleSelector, *, batch_size: int, selection: Selection) -> None:
    """Warn where the fewest samples allowed are more than the target."""
    least = selector.least(batch_size)
    if selector.is_whole or selection.indices.numel() != least:
        return
    target = selector.target
    held = "activation rate"
    exceeds = least > target * batch_size
    if selector.share_of == "significance":
        held = "coverage"
        exceeds = least > _FEW and selector.coverage is not None and selector.coverage > target + _EXCESS
    if exceeds:
        rank_zero_warn(
            f"lightning-ast: min_selected keeps {least} of {counted(batch_size, 'sample')}, so the {held} "
            f"cannot fall to its target of {target:g}: use larger batches or a smaller min_selected."
        )


def warn_of_dense_ops(dense_ops: DenseOps, warned: set[str], advice: str | None) -> None:
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


def poor_savings(mode: Mode, flops: FlopsPerSample, *, rate: float, dense_share: float) -> str | None:
    """Describe a mode that saves next to nothing with this module, and name the modes that would save; else None."""
    forward = flops.forward / flops.dense
    if not saves_too_little(mode, rate, forward=forward, dense_share=dense_share):
        return None
    own = cost_share(mode, rate, forward=forward, dense_share=dense_share)
    promised = cost_share(mode, rate)
    fresh: Mode = "partial" if mode == "subset" else "subset"
    costs = {other: cost_share(other, rate, forward=forward) for other in ("prune", fresh)}
    others = " and ".join(f"mode={other!r} would cost {cost:.0%}" for other, cost in costs.items() if cost < 0.95)
    passes = f"the forward is {forward:.0%} of a dense step, as with frozen layers or a teacher"
    reasons = {
        "scoring all samples takes more than it spares at so high a rate": promised > 1,
        f"{dense_share:.0%} of the backward runs over every sample": dense_share > 0.05,
        passes: forward > 0.45,
    }
    held = [reason for reason, holds in reasons.items() if holds] or [passes]
    return (
        f"mode={mode!r} at an activation rate of {rate:.0%} costs {own:.1%} of the FLOPs of dense training, as counted "
        f"in this run ({promised:.0%} where all parameters are trained): "
        f"{'; '.join(held)}. {others}."
    )
