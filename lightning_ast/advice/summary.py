"""The facts of a step from the times of the probed blocks: medians over the cycles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lightning_ast.advice.measured import Curve, Phases, StepAt, StepFacts
from lightning_ast.advice.script import FEW_SAMPLES, Sample
from lightning_ast.core.execution import Mode
from lightning_ast.errors import ConfigurationError

__all__ = ["curve_of", "reason_of", "summarize"]


def summarize(samples: list[Sample], refused: dict[Mode, str], *, batch_size: int) -> StepFacts:
    """Take the medians over the cycles.

    Args:
        samples: The measured blocks.
        refused: The modes that cannot run, and why.
        batch_size: The samples of a batch.
    """
    (dense,) = curve_of(samples, None)
    curves: dict[Mode, Curve] = {
        mode: curve for mode in ("partial", "subset") if mode not in refused and (curve := curve_of(samples, mode))
    }
    whole = [t for b, t in samples if b.mode is None and b.phases]
    phases = [t.phases for t in whole if t.phases is not None]
    few = [t for b, t in samples if b.few]
    host = None
    if few and phases:
        least = statistics.median(t.seconds - t.scoring_seconds for t in few)
        host = min(1.0, least / statistics.median(t.seconds for t in whole))
    everything = curve_of(samples, "mask")  # scores and selects, and computes all the rest too
    partial = [(b.target, t.dense_share) for b, t in samples if b.mode == "partial"]
    lowest = min((target for target, _ in partial), default=None)
    shares = [share for target, share in partial if target == lowest]
    return StepFacts(
        dense=dense,
        curves=curves,
        refused=dict(refused),
        phases=Phases(*map(statistics.median, zip(*phases, strict=True))) if phases else None,
        host_share=host,
        few_samples=min(FEW_SAMPLES, batch_size) if few else None,
        selection_seconds=max(0.0, everything[0].seconds - dense.seconds) if everything else None,
        dense_ops_share=None if not shares or None in shares else statistics.median(s for s in shares if s is not None),
    )


def curve_of(samples: Sequence[Sample], mode: Mode | None) -> Curve:
    """Collect one mode's steps by rising rate.

    A mode is compared with the dense step of the same cycle, and the median of the quotients is taken: what slows the
    machine for longer than a cycle then falls out. Blocks that waited for the device at every phase are left out where
    there are others.

    Args:
        samples: The measured blocks.
        mode: The mode; None is the dense step.
    """
    plain = [(b, t) for b, t in samples if b.mode is None and not b.phases]
    dense = {b.cycle: t.seconds for b, t in plain or samples if b.mode is None}
    typical = statistics.median(dense.values())
    points = []
    for target in sorted({b.target for b, _ in samples if b.mode == mode}):
        own = [(b, t) for b, t in samples if (b.mode, b.target) == (mode, target)]
        own = [(b, t) for b, t in own if not b.phases] or own
        peaks = [t.peak_bytes for _, t in own if t.peak_bytes is not None]
        share = statistics.median(t.seconds / dense[b.cycle] for b, t in own)
        points.append(StepAt(statistics.fmean(t.rate for _, t in own), share * typical, max(peaks, default=None)))
    return tuple(sorted(points, key=lambda p: p.rate))


def reason_of(error: Exception) -> str:
    """Describe an error in one line."""
    if isinstance(error, ConfigurationError):
        return error.faults[0]
    lines = str(error).splitlines() or [""]
    known = type(error).__module__.startswith("lightning_ast")
    return lines[0] if known else f"{type(error).__name__}: {lines[0]}"
