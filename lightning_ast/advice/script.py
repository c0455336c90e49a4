"""The probed steps: their order, in which rates and modes take turns so that drift falls on all; and what they tell."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from lightning_ast.advice.measured import Curve, DenseBackward, Phases, StepAt, StepFacts
from lightning_ast.mode_facts import Mode, cost_share

__all__ = ["Block", "Sample", "Timing", "curve_of", "script", "summarize"]

LEAST_CYCLES = 2
MOST_CYCLES = 15
FEW_SAMPLES = 2

_RATES = (0.1, 0.35, 0.6)
_LONG_SECONDS = 1.0
_BLOCK_SECONDS = 0.15
_STEP = 0.05


@dataclass(frozen=True)
class Block:
    """A block of steps that are timed as one.

    Attributes:
        mode: The mode; None is a plain dense step.
        target: The activation rate asked for, in (0, 1].
        steps: The number of training steps.
        phases: True where the device is waited for at every phase of a step, which slows it down.
        few: True where the fewest samples are asked for.
        settles: True where nothing is measured: caches fill, FLOPs are counted, regions are compiled.
        cycle: The number of the round; all its blocks train on the same batches.
    """

    mode: Mode | None = None
    target: float = 1.0
    steps: int = 1
    phases: bool = False
    few: bool = False
    settles: bool = False
    cycle: int = 0


@dataclass(frozen=True)
class Timing:
    """The times of a block.

    Attributes:
        seconds: The time of a step.
        rate: The observed activation rate, in (0, 1].
        phases: The parts of a step, or None where no backward was seen.
        scoring_seconds: The time of a step between its start and the user's code.
        peak_bytes: The peak of device memory, or None.
        dense_share: The share of the backward's FLOPs that ran over all samples, or None.
        dense_ops: The backward ops that ran over all samples, and their calls.
    """

    seconds: float
    rate: float = 1.0
    phases: Phases | None = None
    scoring_seconds: float = 0.0
    peak_bytes: int | None = None
    dense_share: float | None = None
    dense_ops: Mapping[str, int] = field(default_factory=dict)


Sample = tuple[Block, Timing]


def script(
    modes: Sequence[Mode],
    *,
    batch_size: int,
    asynchronous: bool,
    wanted: Sequence[float],
    remaining_seconds: Callable[[], float],
) -> Generator[Block, Timing, int]:
    """Yield blocks to run, one after the other; each is answered with its times.

    Args:
        modes: The modes to measure, of ``partial``, ``subset`` and ``mask``, which takes the same at every rate.
        batch_size: The samples of a batch.
        asynchronous: True where the device runs behind the host: blocks are then longer, and phases blocks of their
            own.
        wanted: The rates that will be predicted. Those between two measured ones are measured too where ``partial``
            falls back to all samples at the one and not at the other: there is a step between them, and no line.
        remaining_seconds: Returns what is left of the budget. Two cycles are run in any case.

    Returns:
        The number of cycles that were measured.
    """
    yield Block(settles=True)
    dense = (yield Block(settles=True)).seconds
    for mode in modes:
        yield Block(mode, _RATES[1], settles=True)
    steps = min(8, max(3, math.ceil(_BLOCK_SECONDS / max(dense, 1e-6)))) if asynchronous else 1
    few = FEW_SAMPLES / batch_size
    blocks = _cycle(modes, few, steps, asynchronous, reduced=False)
    settle = asynchronous or dense < _LONG_SECONDS
    shares = [1.0 if b.mode is None else cost_share(b.mode, b.target) for b in blocks]  # of a dense step, as counted
    cost = sum(b.steps * dense * share for b, share in zip(blocks, shares, strict=True))
    if cost * (LEAST_CYCLES + settle) > remaining_seconds():
        blocks = _cycle(modes, few, steps, asynchronous, reduced=True)
    answers: list[Sample] = []
    for block in blocks if settle else ():
        answers.append((block, (yield replace(block, settles=True))))
    cycle = 0
    last = 0.0
    while cycle < LEAST_CYCLES or (cycle < MOST_CYCLES and last < remaining_seconds()):
        if cycle == 0 or not settle:
            blocks += [block for block in _between(answers, wanted) if block not in blocks]
        before = remaining_seconds()
        # forwards and backwards in turn: a machine that slows down while it heats up slows all blocks alike
        for block in blocks[:: 1 if cycle % 2 == 0 else -1]:
            answers.append((block, (yield replace(block, cycle=cycle))))
        cycle += 1
        last = before - remaining_seconds()
    return cycle


def _between(answers: Sequence[Sample], wanted: Sequence[float]) -> list[Block]:
    """Make blocks at wanted rates between neighbours of which one fell back to all samples."""
    partial = {block: timing.dense_share or 0.0 for block, timing in answers if block.mode == "partial"}
    found = []
    for low, high in pairwise(sorted(partial, key=lambda block: block.target)):
        if abs(partial[low] - partial[high]) > _STEP:
            found += [replace(low, target=rate) for rate in wanted if low.target < rate < high.target]
    return found


def _cycle(modes: Sequence[Mode], few: float, steps: int, asynchronous: bool, *, reduced: bool) -> list[Block]:
    """List the blocks of a round.

    Args:
        modes: The modes to measure.
        few: The activation rate of the fewest samples.
        steps: The number of steps of a block.
        asynchronous: True where the device runs behind the host.
        reduced: True where only the ends of each mode's curve are measured.
    """
    blocks = [Block(steps=steps, phases=not asynchronous)]
    if asynchronous:
        blocks.append(Block(steps=steps, phases=True))
    for mode in modes:
        rates = _RATES[:: len(_RATES) - 1] if reduced else _RATES
        if mode == "subset":
            blocks.append(Block(mode, min(1.0, few), steps, phases=True, few=True))
            rates = tuple(rate for rate in (rates[1:] if reduced else rates) if rate > 1.25 * few)
        rates = _RATES[1:2] if mode == "mask" else rates
        blocks += [Block(mode, rate, steps, phases=not asynchronous) for rate in rates]
    return blocks


# ---------------------------------------------------------------------- what the times tell


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
    phases = [t.phases for b, t in samples if b.mode is None and b.phases and t.phases is not None]
    parts = _parts(samples, dense.seconds)
    everything = curve_of(samples, "mask")  # scores and selects, and computes all the rest too
    return StepFacts(
        dense=dense,
        curves=curves,
        parts=parts,
        refused=dict(refused),
        phases=Phases(*map(statistics.median, zip(*phases, strict=True))) if phases else None,
        host_share=None if parts is None else min(1.0, parts[0].seconds / dense.seconds),
        few_samples=None if parts is None else min(FEW_SAMPLES, batch_size),
        selection_seconds=max(0.0, everything[0].seconds - dense.seconds) if everything else None,
        dense_backwards=_dense_backwards(samples),
    )


def _dense_backwards(samples: Sequence[Sample]) -> tuple[DenseBackward, ...]:
    """Collect what ``partial`` spent on every sample, by rising rate."""
    by_rate: dict[float, list[Timing]] = {}
    for block, timing in samples:
        if block.mode == "partial":
            by_rate.setdefault(block.target, []).append(timing)
    found = []
    for rate, timings in sorted(by_rate.items()):
        shares = [timing.dense_share for timing in timings if timing.dense_share is not None]
        share = statistics.median(shares) if len(shares) == len(timings) else None
        ops = sum((Counter(timing.dense_ops) for timing in timings), Counter[str]())
        found.append(DenseBackward(rate, share, dict(ops)))
    return tuple(found)


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


def _parts(samples: Sequence[Sample], dense_seconds: float) -> Curve | None:
    """Collect the steps of ``subset`` without their scoring; None where no such step was cut up.

    Args:
        samples: The measured blocks.
        dense_seconds: The time of a dense step, not cut up, which the times are made comparable with.
    """
    cut_up = [(b, replace(t, seconds=t.seconds - t.scoring_seconds)) for b, t in samples if b.phases]
    parts = curve_of(cut_up, "subset") if cut_up else ()
    if not parts:
        return None
    (dense,) = curve_of(cut_up, None)
    return tuple(StepAt(part.rate, part.seconds / dense.seconds * dense_seconds) for part in parts)
