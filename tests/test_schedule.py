"""The schedule of a run as a pure decision, against a walk through every step."""

from __future__ import annotations

import random
import re
import sys
from typing import Any

import pytest

from lightning_ast.schedule import STAGE_CODES, Point, RunLength, Schedule


def walk(schedule: Schedule, run: RunLength) -> list[str]:
    """Ask for the stage of every optimizer step of a run whose length is known."""
    assert run.steps is not None
    return [schedule.stage(Point(run.epochs_at(step) or 0.0, step), run) for step in range(run.steps)]


def drawn_part(draw: random.Random, stage: str) -> dict[str, Any]:
    lengths = {"epochs": draw.randint(0, 3), "share": draw.choice([0.0, 0.1, 0.3, 0.5, 0.7, 0.99])}
    kind = draw.choice(["epochs", "share", "steps"])
    return {f"{stage}_steps": draw.randint(0, 10)} if kind == "steps" else {f"{stage}_epochs": lengths[kind]}


def drawn_run(draw: random.Random) -> RunLength:
    accumulate = {0: draw.randint(1, 4), draw.randint(1, 4): draw.randint(1, 4)}
    limits = {"max_epochs": draw.randint(1, 6), "max_steps": draw.randint(1, 30)}
    if draw.random() < 0.5:
        limits.pop(draw.choice(["max_epochs", "max_steps"]))
    return RunLength(**limits, batches=draw.randint(1, 9), accumulate=accumulate)


@pytest.mark.parametrize(
    ("warmup", "cooldown", "total", "expected"),
    [
        (2, 0, 6, "wwssss"),
        (1, 2, 6, "wssscc"),
        (0, 0, 4, "ssss"),
        (0.5, 0.25, 4, "wwsc"),
        (0.0, 0, 3, "sss"),
        (3, 0, None, "wwwss"),
    ],
)
def test_stages_by_epoch(warmup: float, cooldown: float, total: float | None, expected: str) -> None:
    schedule = Schedule(warmup_epochs=warmup, cooldown_epochs=cooldown)
    got = [schedule.stage_at(epoch, total) for epoch in range(len(expected))]
    assert "".join(stage[0] for stage in got) == expected


def test_shares_end_within_an_epoch() -> None:
    schedule = Schedule(warmup_epochs=0.25, cooldown_epochs=0.125)
    stages = [schedule.stage_at(step / 8, 2) for step in range(16)]
    assert stages == ["warmup"] * 4 + ["sparse"] * 10 + ["cooldown"] * 2


def test_any_schedule_of_any_run() -> None:
    for seed in range(400):
        check_run(random.Random(seed))


def check_run(draw: random.Random) -> None:
    run, schedule = drawn_run(draw), Schedule(**drawn_part(draw, "warmup"), **drawn_part(draw, "cooldown"))
    stages = walk(schedule, run)
    codes = [STAGE_CODES[stage] for stage in stages]
    assert codes == sorted(codes), "the stages follow one another"
    assert schedule.never_sparse(run) == ("sparse" not in stages), "refused where no step is sparse, and only there"
    assert [run.steps_at(run.epochs_at(step) or 0.0) for step in range(len(stages))] == list(range(len(stages)))
    if schedule.warmup_steps is not None:
        assert stages.count("warmup") == min(schedule.warmup_steps, len(stages))
    if schedule.cooldown_steps is not None and "warmup" not in stages:
        assert stages.count("cooldown") == min(schedule.cooldown_steps, len(stages))


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ({"warmup_epochs": 0.25}, 8, "wwssssss"),
        ({"warmup_epochs": 0.25, "cooldown_epochs": 0.25}, 8, "wwsssscc"),
        ({"warmup_steps": 3, "cooldown_steps": 2}, 8, "wwwssscc"),
        ({"warmup_steps": 0}, 4, "ssss"),
        ({"warmup_epochs": 1}, 4, "wwww"),
    ],
)
def test_a_run_that_only_max_steps_limits(schedule: dict[str, Any], steps: int, expected: str) -> None:
    run = RunLength(max_steps=steps)  # an endless loader: no epoch ever ends
    assert "".join(Schedule(**schedule).stage(Point(0.0, step), run)[0] for step in range(steps)) == expected


def test_the_limit_that_comes_first_ends_the_run() -> None:
    schedule, sized = Schedule(warmup_epochs=0.5), {"batches": 4, "accumulate": {0: 1}}
    assert walk(schedule, RunLength(max_epochs=2, max_steps=100, **sized)) == ["warmup"] * 4 + ["sparse"] * 4
    assert walk(schedule, RunLength(max_epochs=100, max_steps=6, **sized)) == ["warmup"] * 3 + ["sparse"] * 3
    largest = RunLength(max_epochs=5, max_steps=sys.maxsize, batches=1, accumulate={0: 1})  # as good as no limit
    assert walk(Schedule(warmup_epochs=1, cooldown_epochs=1), largest) == ["warmup", *["sparse"] * 3, "cooldown"]


def faults(run: RunLength, *, batches_known: bool = True, whole_epochs: bool = False, **schedule: Any) -> str:
    found = Schedule(**schedule).length_faults(run, batches_known=batches_known, whole_epochs=whole_epochs)
    return " ".join(found)


ENDLESS = RunLength(max_steps=100, accumulate={0: 1})
UNSIZED = RunLength(max_epochs=3, accumulate={0: 1})
MANUAL = RunLength(max_steps=100, batches=10)


@pytest.mark.parametrize(
    ("run", "schedule", "says"),
    [
        (ENDLESS, {"warmup_epochs": 0.1, "cooldown_steps": 5}, ""),
        (ENDLESS, {"warmup_epochs": 1}, ""),  # not known: the first epoch may end
        (ENDLESS, {"warmup_steps": 100}, "leave no sparse step in a run of 100 optimizer steps"),
        (ENDLESS, {"warmup_steps": 60, "cooldown_epochs": 0.4}, "leave no sparse step"),
        (ENDLESS, {"cooldown_epochs": 1}, "not known in epochs, .*: give a share of the run, or cooldown_steps"),
        (UNSIZED, {"warmup_epochs": 0.1}, r"set Trainer\(max_steps=...\), or give whole epochs"),
        (UNSIZED, {"warmup_epochs": 1, "cooldown_epochs": 1}, ""),
        (UNSIZED, {"warmup_epochs": 1, "cooldown_epochs": 2}, "leave no sparse step in a run of 3 epochs"),
        (UNSIZED, {"cooldown_steps": 2}, "optimizer steps of the run are not known"),
        (MANUAL, {"warmup_epochs": 0.1, "cooldown_steps": 5}, ""),
        (MANUAL, {"cooldown_epochs": 1}, "not known in epochs, with manual optimization and max_steps"),
        (MANUAL, {"warmup_steps": 100}, "leave no sparse step"),
        (RunLength(accumulate={0: 1}, batches=10), {"warmup_epochs": 0.1}, "known length.*max_time"),
        (RunLength(accumulate={0: 1}, batches=10), {"warmup_steps": 10**9}, ""),
    ],
)
def test_faults_of_the_length(run: RunLength, schedule: dict[str, Any], says: str) -> None:
    found = faults(run, **schedule)
    assert re.search(says, found) if says else found == ""


def test_whole_epochs_cannot_count_manual_steps() -> None:
    assert "give epochs" in faults(MANUAL, warmup_steps=3, whole_epochs=True)
    assert "instead of max_steps" in faults(MANUAL, warmup_epochs=0.1, whole_epochs=True)
    assert not faults(MANUAL, warmup_epochs=1, whole_epochs=True)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"warmup_epochs": 1, "warmup_steps": 10}, "expected one, got both"),
        ({"cooldown_epochs": 0, "cooldown_steps": 10}, "expected one, got both"),
        ({"warmup_steps": -1}, "warmup_steps: expected an int >= 0"),
        ({"warmup_steps": 0.5}, "warmup_steps: expected an int >= 0"),
        ({"cooldown_steps": True}, "cooldown_steps: expected an int >= 0"),
        ({"warmup_epochs": 10.0}, "warmup_epochs: expected an int >= 0 or a float in .0, 1., got 10.0"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs: expected an int >= 0"),
        ({"warmup_epochs": "1"}, "warmup_epochs: expected an int >= 0"),
    ],
)
def test_faults_of_the_settings(schedule: dict[str, Any], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(Schedule(**schedule).setting_faults())


def test_steps_are_not_epochs() -> None:
    with pytest.raises(ValueError, match="not known in epochs"):
        Schedule(warmup_steps=3).stage_at(0.5, 3)
