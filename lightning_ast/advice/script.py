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
    """A block of steps that are timed as one."""

    mode: Mode | None = None  # None is a plain dense step
    target: float = 1.0  # the activation rate that is asked for, in (0, 1]
    steps: int = 1
    phases: bool = False  # whether the device is waited for at every phase of a step, which slows it down
    settles: bool = False  # whether nothing is measured: caches fill, FLOPs are counted, regions are compiled
    cycle: int = 0  # all blocks of a round train on the same batches


@dataclass(frozen=True)
class Timing:
    """The times of a block, each of one step."""

    seconds: float
    rate: float = 1.0  # as observed, in (0, 1]
    phases: Phases | None = None  # None where no backward was seen
    scoring_seconds: float = 0.0  # from the start of a step to the user's code
    peak_bytes: int | None = None
    # what ran over all samples: the share of the backward's FLOPs, None where not counted; the ops and their calls
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
    """Yield blocks to run, each answered with its times; return the number of cycles that were measured."""
    # the first step makes the optimizer's state, so that only the second tells what a step takes
    yield Block(settles=True)
    dense = (yield Block(settles=True)).seconds
    for mode in modes:
        yield Block(mode, _RATES[1], settles=True)
    # a block of a device that runs behind is waited for once: with more steps the wait weighs less
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
    # there is a step between these two, and no line on which the rates could be predicted
    partial = {block: timing.dense_share or 0.0 for block, timing in answers if block.mode == "partial"}
    found = []
    for low, high in pairwise(sorted(partial, key=lambda block: block.target)):
        if abs(partial[low] - partial[high]) > _STEP:
            found += [replace(low, target=rate) for rate in wanted if low.target < rate < high.target]
    return found


def _cycle(modes: Sequence[Mode], few: float, steps: int, asynchronous: bool, *, reduced: bool) -> list[Block]:
    """List the blocks of a round; a reduced one has only the ends of each mode's curve."""
    blocks = [Block(steps=steps, phases=not asynchronous)]
    if asynchronous:  # waiting within a step would slow it down, so that its phases need a block of their own
        blocks.append(Block(steps=steps, phases=True))
    for mode in modes:
        rates = _RATES[:: len(_RATES) - 1] if reduced else _RATES
        if mode == "subset":
            blocks.append(Block(mode, min(1.0, few), steps, phases=True))
            rates = tuple(rate for rate in (rates[1:] if reduced else rates) if rate > 1.25 * few)
        rates = _RATES[1:2] if mode == "mask" else rates  # it takes the same at every rate
        blocks += [Block(mode, rate, steps, phases=not asynchronous) for rate in rates]
    return blocks


def summarize(samples: list[Sample], refused: dict[Mode, str], *, batch_size: int) -> StepFacts:
    """Take the medians of the measured blocks over the cycles."""
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
    """Collect one mode's steps by rising rate, from the blocks that did not wait at every phase, if there are any."""
    plain = [(b, t) for b, t in samples if b.mode is None and not b.phases]
    dense = {b.cycle: t.seconds for b, t in plain or samples if b.mode is None}
    typical = statistics.median(dense.values())
    points = []
    for target in sorted({b.target for b, _ in samples if b.mode == mode}):
        own = [(b, t) for b, t in samples if (b.mode, b.target) == (mode, target)]
        own = [(b, t) for b, t in own if not b.phases] or own
        peaks = [t.peak_bytes for _, t in own if t.peak_bytes is not None]
        # quotients within a cycle: what slows the machine for longer than a cycle falls out
        share = statistics.median(t.seconds / dense[b.cycle] for b, t in own)
        points.append(StepAt(statistics.fmean(t.rate for _, t in own), share * typical, max(peaks, default=None)))
    return tuple(sorted(points, key=lambda p: p.rate))


def _parts(samples: Sequence[Sample], dense_seconds: float) -> Curve | None:
    """Collect the steps of ``subset`` without their scoring; None where no such step was cut up."""
    cut_up = [(b, replace(t, seconds=t.seconds - t.scoring_seconds)) for b, t in samples if b.phases]
    parts = curve_of(cut_up, "subset") if cut_up else ()
    if not parts:
        return None
    # cut-up steps are slower: they are held against a dense step that was cut up too, and brought back to its own time
    (dense,) = curve_of(cut_up, None)
    return tuple(StepAt(part.rate, part.seconds / dense.seconds * dense_seconds) for part in parts)
