"""The order of the probed blocks, and the medians that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_ast.advice.measured import DenseBackward, Phases, StepAt
from lightning_ast.advice.script import Block, Timing, curve_of, script, summarize


def played(
    modes: Any,
    *,
    seconds: Callable[[Block], float],
    budget: float,
    batch_size: int = 100,
    asynchronous: bool = False,
    share: Callable[[Block], float | None] = lambda b: 0.0,
) -> tuple[list[Block], int]:
    """All blocks of a script whose clock is the sum of their seconds, and its number of cycles."""
    spent, blocks = 0.0, []
    blocks_of = script(
        modes,
        batch_size=batch_size,
        asynchronous=asynchronous,
        wanted=(0.1, 0.2, 0.3, 0.4),
        remaining_seconds=lambda: budget - spent,
    )
    block = next(blocks_of)
    while True:
        blocks.append(block)
        taken = seconds(block)
        spent += taken * block.steps
        try:
            block = blocks_of.send(Timing(taken, dense_share=share(block)))
        except StopIteration as end:
            return blocks, end.value


def test_a_short_step_settles_for_a_whole_cycle_and_takes_turns_both_ways() -> None:
    blocks, cycles = played(("partial", "subset"), seconds=lambda b: 0.01, budget=0.4)
    dense, cycle = blocks[:2], [(b.mode, b.target) for b in blocks[4:12]]
    assert [(b.mode, b.settles) for b in dense] == [(None, True)] * 2
    assert [(b.mode, b.target) for b in blocks[2:4]] == [("partial", 0.35), ("subset", 0.35)]
    assert cycle == [
        (None, 1.0), ("partial", 0.1), ("partial", 0.35), ("partial", 0.6),
        ("subset", 0.02), ("subset", 0.1), ("subset", 0.35), ("subset", 0.6),
    ]  # fmt: skip
    assert all(b.settles for b in blocks[:12])
    assert not any(b.settles for b in blocks[12:])
    assert [(b.mode, b.target) for b in blocks[12:28]] == cycle + cycle[::-1]
    assert cycles == 3, "0.12 s to settle, 0.08 s a cycle, while one more fits"
    assert [b.cycle for b in blocks[12:]] == [0] * 8 + [1] * 8 + [2] * 8


def test_no_more_cycles_than_the_medians_need() -> None:
    assert played(("partial",), seconds=lambda b: 0.001, budget=1e9)[1] == 15


def test_a_long_step_settles_for_no_cycle_and_measures_the_ends_alone_where_time_is_short() -> None:
    blocks, cycles = played(("partial", "subset"), seconds=lambda b: 4.0, budget=50.0)
    assert [(b.mode, b.target, b.settles) for b in blocks[4:9]] == [
        (None, 1.0, False), ("partial", 0.1, False), ("partial", 0.6, False),
        ("subset", 0.02, False), ("subset", 0.6, False),
    ]  # fmt: skip
    assert cycles == 2, "in any case"
    blocks, _ = played(("partial", "subset"), seconds=lambda b: 4.0, budget=100.0)
    assert [b.target for b in blocks[4:8]] == [1.0, 0.1, 0.35, 0.6]


def test_a_device_that_runs_behind_has_longer_blocks_and_phases_of_their_own() -> None:
    blocks, _ = played(("partial", "subset"), seconds=lambda b: 0.03, budget=20.0, asynchronous=True)
    cycle = blocks[4:13]
    assert {b.steps for b in cycle} == {5}, "at least 0.15 s"
    assert [b.phases for b in cycle] == [False, True, False, False, False, True, False, False, False]
    assert [b.phases for b in blocks[4:] if b.target < 0.1] == [True] * sum(b.target < 0.1 for b in blocks)


def test_small_batches_and_a_mode_alone() -> None:
    blocks, _ = played(("subset",), seconds=lambda b: 0.01, budget=1.0, batch_size=16)
    assert [b.target for b in blocks[3:7]] == [1.0, 0.125, 0.35, 0.6], "a tenth would be fewer than two samples"
    blocks, _ = played(("mask",), seconds=lambda b: 0.01, budget=1.0)
    assert [(b.mode, b.target) for b in blocks[3:5]] == [(None, 1.0), ("mask", 0.35)], "the same at every rate"
    blocks, cycles = played((), seconds=lambda b: 2.0, budget=1.0)
    assert len(blocks) == 2 + cycles
    assert cycles == 2


@pytest.mark.parametrize("seconds", [0.01, 4.0])
def test_between_rates_of_which_one_falls_back_more_are_measured(seconds: float) -> None:
    blocks, cycles = played(
        ("partial",),
        seconds=lambda b: seconds,
        budget=500 * seconds,
        share=lambda b: 1.0 if b.mode == "partial" and b.target < 0.15 else 0.02,
    )
    measured = [b for b in blocks if not b.settles]
    assert {b.target for b in measured} == {1.0, 0.1, 0.2, 0.3, 0.35, 0.6}
    assert sum(b.target == 0.3 for b in measured) == cycles - (seconds > 1)
    known, _ = played(("partial",), seconds=lambda b: 0.01, budget=9.0, share=lambda b: None)
    assert {b.target for b in known} == {1.0, 0.1, 0.35, 0.6}


def block(mode: Any, target: float, cycle: int, **options: Any) -> Block:
    return Block(mode, target, cycle=cycle, **{"phases": True, **options})


def test_modes_are_compared_with_the_dense_step_of_their_own_cycle() -> None:
    samples = []
    for cycle, slow in enumerate((1.0, 10.0, 2.0)):
        phases = Phases(0.1 * slow, 1.0 * slow, 2.0 * slow, 0.4 * slow)
        samples.append((block(None, 1.0, cycle), Timing(4.0 * slow, phases=phases)))
        selecting = Phases(0.1 * slow, 1.25 * slow, 0.2 * slow, 0.4 * slow)
        samples.append(
            (block("partial", 0.1, cycle), Timing(2.0 * slow, 0.1 + cycle / 100, selecting, dense_share=0.2 * cycle))
        )
        samples.append((block("mask", 0.35, cycle), Timing(5.0 * slow, 0.35)))
        samples.append((block("subset", 0.02, cycle), Timing(1.5 * slow, 0.02, scoring_seconds=0.9 * slow)))
    assert curve_of(samples, None) == (StepAt(1.0, 8.0),)
    (partial,) = curve_of(samples, "partial")
    assert partial.rate == pytest.approx(0.11)
    assert partial.seconds == pytest.approx(0.5 * 8.0)
    facts = summarize(samples, {"prune": "no"}, batch_size=100)
    assert facts.phases == Phases(0.2, 2.0, 4.0, 0.8)
    assert facts.host_share == pytest.approx(1.2 / 8.0), "the median of 0.6, 6 and 1.2 over that of the dense step"
    assert facts.few_samples == 2
    assert facts.selection_seconds == pytest.approx(0.25 * 8.0)
    assert summarize([s for s in samples if s[0].mode != "mask"], {}, batch_size=1).selection_seconds is None
    assert summarize(samples, {}, batch_size=1).few_samples == 1
    assert facts.dense_backwards == (DenseBackward(0.1, pytest.approx(0.2), {}),)
    assert facts.refused == {"prune": "no"}


def test_blocks_slowed_by_phases_stand_back_behind_plain_ones() -> None:
    samples = [
        (block(None, 1.0, 0, phases=False), Timing(1.0, peak_bytes=10)),
        (block(None, 1.0, 0), Timing(3.0, peak_bytes=99, phases=Phases(0.5, 1.0, 1.0, 0.5))),
        (block("partial", 0.1, 0, phases=False), Timing(0.5, 0.1, peak_bytes=7)),
        (block("subset", 0.02, 0), Timing(1.0, 0.02, scoring_seconds=0.4)),
    ]
    facts = summarize(samples, {}, batch_size=100)
    assert facts.dense == StepAt(1.0, 1.0, 10)
    assert facts.curves == {"partial": (StepAt(0.1, 0.5, 7),), "subset": (StepAt(0.02, 1.0),)}
    assert facts.host_share == pytest.approx(0.6 / 3.0), "both with phases"
    assert facts.selection_seconds is None
    assert facts.dense_backwards == (DenseBackward(0.1, None, {}),)
