"""The sections of a step by a clock that the test moves."""

from __future__ import annotations

import math

import pytest

from lightning_ast.energy.step_sections import StepSections


class FakeClock:
    """Moved by the test; like a device, it may be behind."""

    def __init__(self) -> None:
        self.now, self.known = 0.0, math.inf

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float | None:
        return end - start if end <= self.known else None

    def wait(self) -> None:
        self.known = math.inf


def step(sections: StepSections, clock: FakeClock, *, scoring: float = 0.0, scored_first: bool = False) -> None:
    clock.now += 1.0  # loading
    if not scored_first:
        sections.start_batch()
    if scoring:
        with sections.scoring():
            clock.now += scoring
    sections.start_batch()
    clock.now += 10.0
    sections.finish_backward()
    clock.now += 5.0
    sections.finish_backward()  # the optimizer evaluates twice
    clock.now += 100.0  # the optimizer
    sections.finish_batch()


@pytest.mark.parametrize("scored_first", [True, False])
def test_sections_of_a_step(scored_first: bool) -> None:
    clock = FakeClock()
    sections = StepSections(clock)
    sections.restart()
    step(sections, clock)
    step(sections, clock, scoring=3.0, scored_first=scored_first)
    clock.now += 1000.0  # validation
    sections.restart()
    step(sections, clock)
    assert sections.take() == {"loading": 3.0, "scoring": 3.0, "forward_backward": 45.0}
    assert sections.take() == {}


def test_a_batch_that_was_skipped_leaves_nothing_behind() -> None:
    clock = FakeClock()
    sections = StepSections(clock)
    sections.restart()
    sections.start_batch()  # on_train_batch_start gave -1: there is no end
    clock.now += 50.0
    sections.restart()
    step(sections, clock)
    assert sections.take() == {"loading": 1.0, "forward_backward": 15.0}


def test_a_step_without_a_backward_is_neither() -> None:
    clock = FakeClock()
    sections = StepSections(clock)
    sections.restart()
    sections.start_batch()
    clock.now += 7.0
    sections.finish_batch()
    step(sections, clock)
    assert sections.take() == {"loading": 1.0, "forward_backward": 15.0}


def test_a_device_that_is_behind_is_not_waited_for() -> None:
    clock = FakeClock()
    sections = StepSections(clock)
    sections.restart()
    clock.known = 2.0
    step(sections, clock)
    step(sections, clock)
    assert sections.seconds == {"loading": 1.0}, "what the device has reached"
    assert sections.take() == {"loading": 2.0, "forward_backward": 30.0}
