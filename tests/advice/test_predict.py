"""Predictions from hand-made facts, with exact numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_ast.advice.lengths import run_lengths, validations
from lightning_ast.advice.measured import (
    Facts,
    LoadingFacts,
    MemoryEstimate,
    Phases,
    RunFacts,
    StepAt,
    StepFacts,
    ValidationFacts,
)
from lightning_ast.advice.predict import RATES, Predictions, at_rate, with_loading
from lightning_ast.schedule import Schedule

RUN = RunFacts(
    epochs=10, batches_per_epoch=100, batch_size=50, samples_per_epoch=5000, max_epochs=10,
    schedule=Schedule(warmup_epochs=1, cooldown_epochs=1),
)  # fmt: skip
STEP = StepFacts(
    dense=StepAt(1.0, 3.0),
    curves={
        "partial": (StepAt(0.1, 1.2), StepAt(0.6, 2.2)),
        "subset": (StepAt(0.1, 1.3), StepAt(0.6, 2.8)),
    },
    selection_seconds=0.1,
    memory=MemoryEstimate(1000, 4000),
)
FACTS = Facts("CPU", RUN, LoadingFacts(0.5), STEP)


def facts(**changes: Any) -> Facts:
    """The facts above with other runs or steps."""
    run, step = replace(RUN, **changes.pop("run", {})), replace(STEP, **changes.pop("step", {}))
    return replace(FACTS, run=run, step=step, **changes)


def test_rates_between_and_beyond_those_measured() -> None:
    curve = (StepAt(0.1, 1.0, 100), StepAt(0.3, 2.0, 200), StepAt(0.6, 2.3, 500))
    assert at_rate(curve, 0.2) == StepAt(0.2, 1.5, 150)
    assert at_rate(curve, 0.3) == StepAt(0.3, 2.0, 200)
    assert at_rate(curve, 0.5).seconds == pytest.approx(2.2)
    assert at_rate(curve, 0.06) == StepAt(0.06, 1.0, 100), "no less than was measured"
    assert at_rate(curve, 0.8).seconds == pytest.approx(2.5)
    assert at_rate(curve, 0.8, StepAt(1.0, 4.3)).seconds == pytest.approx(3.3), "joined by the dense step"
    assert at_rate((StepAt(0.5, 1.0), StepAt(0.53, 0.9)), 0.6).seconds == 0.9, "noise does not become a slope"
    assert at_rate((StepAt(0.5, 7.0, 3),), 0.1) == StepAt(0.1, 7.0, 3)
    assert at_rate((StepAt(0.1, 1.0), StepAt(0.3, 2.0, 200)), 0.2).peak_bytes is None


def test_loading_comes_before_the_step_or_at_the_same_time() -> None:
    assert with_loading(2.0, LoadingFacts(0.5)) == 2.5
    assert with_loading(2.0, LoadingFacts(0.5, workers=1)) == 2.0
    assert with_loading(2.0, LoadingFacts(2.25, workers=4)) == 2.25


def test_every_mode_step_and_run() -> None:
    predictions = Predictions(FACTS)
    assert predictions.rate == 0.4
    assert {p.rate for p in predictions.table} == set(RATES)
    assert predictions.dense.step_seconds == 3.5
    assert predictions.dense.run_seconds == 1000 * 3.5
    assert predictions.dense.batches == 1000
    got = {p.mode: p for p in predictions.table if p.rate == 0.4}
    assert list(got) == ["mask", "subset", "partial", "prune"]
    steps = {"mask": 3.6, "subset": 2.7, "partial": 2.3, "prune": 3.6}
    for mode, step in steps.items():
        batches = 320 if mode == "prune" else 800
        assert got[mode].step_seconds == pytest.approx(step)
        dense = 3.6 if mode == "prune" else 3.5  # which scores its last warmup epoch and its cooldown too
        assert got[mode].run_seconds == pytest.approx(200 * dense + batches * step)
        assert got[mode].run_share == pytest.approx((200 * dense + batches * step) / 3500)
        assert got[mode].batches == 200 + batches
        assert got[mode].validation_seconds == 0
    assert {mode: p.memory_bytes for mode, p in got.items()} == {
        "mask": 5000,
        "subset": 2600,
        "partial": 5000,
        "prune": 5000,
    }


def test_partial_joins_a_dense_step_that_is_scored_and_subset_goes_on_straight() -> None:
    predictions = Predictions(facts(run={"own_rate": 0.8}))
    assert predictions.rate == 0.8
    assert predictions.at("partial", 0.8).step_seconds == pytest.approx(0.5 + 2.65)  # half of the scoring
    assert predictions.at("subset", 0.8).step_seconds == pytest.approx(0.5 + 3.4)


def test_measured_memory_takes_the_place_of_the_estimate() -> None:
    curves = {"subset": (StepAt(0.1, 1.3, 300), StepAt(0.6, 2.8, 800))}
    predictions = Predictions(facts(step={"dense": StepAt(1.0, 3.0, 900), "curves": curves, "memory": None}))
    assert predictions.at("subset", 0.4).memory_bytes == 600
    assert predictions.at("prune", 0.4).memory_bytes == 900
    nothing = Predictions(facts(step={"memory": None}))
    assert nothing.dense.memory_bytes is None


def test_refused_modes_are_left_out() -> None:
    predictions = Predictions(facts(step={"refused": {"subset": "why", "prune": "why"}}))
    assert {p.mode for p in predictions.table} == {"mask", "partial"}
    assert predictions.at("prune", 0.4) is None


def test_workers_that_start_anew_cost_each_epoch() -> None:
    again = Predictions(facts(loading=LoadingFacts(0.5, start_seconds=2.0, workers=2, restarts=True)))
    assert again.dense.run_seconds == 1000 * 3.0 + 10 * 2.0
    persistent = Predictions(facts(loading=LoadingFacts(0.5, start_seconds=2.0, workers=2)))
    assert persistent.dense.run_seconds == 1000 * 3.0 + 2.0


def test_accumulation_shares_the_optimizer_among_its_batches() -> None:
    phases = Phases(0.1, 0.9, 1.2, 0.8)
    predictions = Predictions(facts(run={"accumulate": {0: 4}}, step={"phases": phases}))
    assert predictions.compute_seconds == pytest.approx(3.0 - 0.6)
    assert predictions.at("partial", 0.6).step_seconds == pytest.approx(0.5 + 2.2 - 0.6)


def test_prune_scores_every_batch_but_those_of_the_earlier_warmup_epochs() -> None:
    predictions = Predictions(facts(run={"schedule": Schedule(warmup_epochs=3, cooldown_epochs=1)}))
    assert run_lengths(predictions.facts.run, "prune", 0.4).unscored_batches == 200
    got = predictions.at("prune", 0.4)
    assert got.run_seconds == pytest.approx(200 * 3.5 + (200 + 6 * 40) * 3.6)
    never = Predictions(facts(run={"schedule": Schedule()}))
    assert never.at("prune", 0.4).run_seconds == pytest.approx(10 * 40 * 3.6)


def test_a_pruned_epoch_is_rounded_and_its_short_batch_is_counted_whole() -> None:
    run = replace(RUN, samples_per_epoch=4980)  # the last batch holds 30
    assert run_lengths(run, None, 1.0).batches == 1000
    pruned = run_lengths(run, "prune", 0.25)
    assert pruned.sparse_batches == 8 * 25, "25 whole batches are within half a per cent"
    assert pruned.sparse_batches_per_epoch == 25
    assert pruned.dense_batches == 200
    assert run_lengths(run, "prune", 0.255).sparse_batches == 8 * 26, "1270 samples, 20 of them in the last batch"
    assert run_lengths(run, "prune", 0.01).sparse_batches == 8
    tiny = replace(RUN, batches_per_epoch=3, batch_size=512, samples_per_epoch=1437, schedule=Schedule())
    assert run_lengths(tiny, "prune", 0.1).batches == 10, "ten epochs of one batch"


def test_no_fewer_samples_than_the_fallback_keeps() -> None:
    curves = {"partial": (StepAt(0.5, 2.0), StepAt(0.75, 2.5)), "subset": (StepAt(0.5, 2.2), StepAt(0.75, 2.7))}
    got = Predictions(facts(run={"batch_size": 4, "samples_per_epoch": 400}, step={"curves": curves}))
    assert {got.at("partial", rate).step_seconds for rate in (0.1, 0.3, 0.5)} == {2.5}
    assert {got.at("subset", rate).step_seconds for rate in (0.1, 0.3, 0.5)} == {2.7}
    eight = Predictions(facts(run={"batch_size": 8, "samples_per_epoch": 800, "min_selected": 4}))
    assert eight.at("partial", 0.1).step_seconds == pytest.approx(0.5 + 2.0), "half of the samples"


def test_shares_of_the_run_are_whole_epochs_in_prune_alone() -> None:
    run = replace(RUN, schedule=Schedule(warmup_epochs=0.12, cooldown_epochs=0.1))
    assert run_lengths(run, "partial", 0.4).sparse_batches == pytest.approx(780)
    assert run_lengths(run, "prune", 0.4).sparse_epochs == 8
    assert run_lengths(replace(run, epochs=1, max_epochs=1), "subset", 0.4).sparse_batches == pytest.approx(78)


def test_max_steps_ends_the_run_and_prune_then_sees_more_epochs() -> None:
    run = replace(RUN, epochs=2.5, max_epochs=None, max_steps=250, schedule=Schedule(warmup_epochs=1))
    assert run_lengths(run, "partial", 0.4).sparse_batches == pytest.approx(150)
    pruned = run_lengths(run, "prune", 0.4)
    assert pruned.batches == 250
    assert pruned.epochs == 5, "100 + 4 * 40, the last of which is cut"
    accumulated = replace(run, accumulate={0: 2}, epochs=5.0)
    assert run_lengths(accumulated, "prune", 0.4).batches == 500


@pytest.mark.parametrize(
    ("when", "mode", "count"),
    [
        ({"every_epochs": 1, "share": 1.0}, None, 10),
        ({"every_epochs": 1, "share": 1.0}, "prune", 10),
        ({"every_epochs": 3, "share": 1.0}, None, 3),
        ({"every_epochs": 1, "share": 0.25}, None, 40),
        ({"every_epochs": 1, "share": 0.25}, "prune", 40),
        ({"every_epochs": 1, "every_batches_of_epoch": 30}, None, 30),
        ({"every_epochs": 1, "every_batches_of_epoch": 30}, "prune", 2 * 3 + 8 * 1),
        ({"every_batches": 300}, None, 3),
        ({"every_batches": 300}, "prune", 1),
        ({"every_seconds": 400.0}, None, 8),
    ],
)
def test_how_often_a_run_is_validated(when: dict[str, Any], mode: Any, count: float) -> None:
    due = ValidationFacts(4, 2.5, **when)
    assert due.seconds == 10
    assert validations(due, RUN, run_lengths(RUN, mode, 0.4), 3500.0) == pytest.approx(count)


def test_validation_is_part_of_the_run() -> None:
    predictions = Predictions(facts(validation=ValidationFacts(4, 2.5, every_epochs=1, share=1.0)))
    assert predictions.dense.validation_seconds == 100
    assert predictions.dense.run_seconds == 3600
    assert predictions.at("partial", 0.4).run_seconds == pytest.approx(700 + 800 * 2.3 + 100)
