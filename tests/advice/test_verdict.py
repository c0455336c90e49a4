"""Each verdict, from hand-made facts."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ast.advice.measured import DenseBackward, LoadingFacts, StepAt, ValidationFacts
from lightning_ast.advice.predict import Predictions
from lightning_ast.advice.report import Advice
from lightning_ast.advice.verdict import Verdict, decide
from lightning_ast.schedule import Schedule
from tests.advice.test_predict import facts

FLAT = {"partial": (StepAt(0.1, 2.95), StepAt(0.6, 3.0)), "subset": (StepAt(0.1, 3.1), StepAt(0.6, 3.3))}


def verdict(**changes: Any) -> Verdict:
    return decide(Predictions(facts(**changes)))


def test_prune_is_best_where_nothing_hinders_it() -> None:
    got = verdict()
    assert (got.mode, got.rate, got.reasons) == ("prune", 0.4, ())
    assert got.saving == pytest.approx(1 - 520 * 3.6 / 3500)
    assert got.baseline_epochs == pytest.approx(10 * 520 * 3.6 / 3500)
    assert got.headline == (
        "Use mode='prune', target_activation_rate=0.4: it saves 47% of the run's seconds (58.3 min to 31.2 min)."
    )


def test_partial_is_best_where_prune_is_refused() -> None:
    got = verdict(step={"refused": {"prune": "an IterableDataset"}, "batchnorm_layers": 2})
    assert got.mode == "partial"
    assert got.saving == pytest.approx(1 - (700 + 800 * 2.3) / 3500)
    assert got.reasons == (
        "2 BatchNorm layers in training mode: in 'partial' its backward is an approximation.",
        "'prune' cannot run here: an IterableDataset",
    )


def test_subset_is_best_where_partial_falls_back() -> None:
    curves = {"partial": (StepAt(0.1, 2.9), StepAt(0.6, 3.0)), "subset": (StepAt(0.1, 1.3), StepAt(0.6, 2.8))}
    dense = (DenseBackward(0.4, 0.8, {"aten.foo": 4, "aten.bar": 2}),)
    got = verdict(step={"refused": {"prune": "no"}, "curves": curves, "dense_backwards": dense})
    assert got.mode == "subset"
    assert got.reasons[0] == (
        "'partial' spends 80% of the backward on every sample at a rate of 0.4, for want of a rule: aten.bar, aten.foo."
    )


def test_the_users_rate_is_the_one_compared() -> None:
    got = verdict(run={"own_rate": 0.25, "own_mode": "partial"}, step={"refused": {"prune": "no"}})
    assert (got.mode, got.rate) == ("partial", 0.25)
    assert got.saving == pytest.approx(1 - (700 + 800 * 2.0) / 3500)


def test_bound_by_the_loader_only_prune_helps() -> None:
    got = verdict(loading=LoadingFacts(30.0))
    assert got.mode == "prune"
    assert got.reasons[0] == (
        "Loader-bound: a batch takes 30 s to load and 3 s to train on. Only 'prune' loads less; or load faster "
        "(num_workers is 0)."
    )
    without = verdict(loading=LoadingFacts(30.0), step={"refused": {"prune": "no"}})
    assert without.mode is None
    assert without.saving == pytest.approx(1 - (200 * 33 + 800 * 31.8) / 33_000)
    assert without.headline.startswith(
        "AST will not help here: the best mode, 'partial' at 0.4, would change the run by -3%"
    )
    hidden = verdict(loading=LoadingFacts(3.5, workers=2), step={"refused": {"prune": "no"}})
    assert (hidden.mode, hidden.saving) == (None, pytest.approx(0.0)), "workers set the pace, whatever the step takes"


def test_bound_by_the_host_larger_batches_help() -> None:
    bound = {"curves": FLAT, "host_share": 0.9, "few_samples": 2}
    got = verdict(step={**bound, "refused": {"prune": "no"}})
    assert got.mode is None
    assert got.reasons[0] == (
        "Host-bound at this batch size: a step on 2 of 50 samples takes 90% of a dense step, so 'partial' and 'subset' "
        "have little to save: use larger batches."
    )
    assert verdict(step=bound).mode == "prune", "which spares whole steps"
    assert verdict(step={**bound, "host_share": 0.3, "refused": {"prune": "no"}}).reasons == (
        "'prune' cannot run here: no",
    )


def test_bound_by_validation() -> None:
    due = ValidationFacts(1000, 31.5, every_epochs=1, share=1.0)
    got = verdict(validation=due)
    assert got.mode is None
    assert got.saving == pytest.approx((3500 - 520 * 3.6) / 318_500)
    assert got.reasons[0].startswith("99% of the run is validation: validate less often")
    counted = verdict(validation=ValidationFacts(1000, 31.5, every_batches=100))
    assert counted.mode == "prune"
    assert counted.reasons[0].startswith("99% of the run is validation: validate less often")


def test_compiled_parts_gain_nothing_from_partial() -> None:
    assert verdict(step={"compiled": True}).reasons == (
        "A part of the module is compiled: 'partial' runs its whole backward and gains nothing there.",
    )


def test_nothing_helps_and_nothing_can_run() -> None:
    got = verdict(step={"curves": FLAT, "refused": {"prune": "no"}})
    assert got.mode is None
    assert got.saving == pytest.approx(800 * 0.02 / 3500), "0.05 s of 3 s at 0.1, 0.02 s at 0.4"
    nothing = verdict(step={"curves": {}, "refused": dict.fromkeys(("mask", "subset", "partial", "prune"), "no loss")})
    assert (nothing.mode, nothing.saving, nothing.baseline_epochs) == (None, None, None)
    assert nothing.headline == "AST cannot run here: every mode is refused."
    assert len(nothing.reasons) == 4


def test_max_steps_and_prune() -> None:
    run = {"max_steps": 250, "max_epochs": None, "epochs": 2.5, "schedule": Schedule(warmup_epochs=1)}
    assert verdict(run=run).mode == "partial"
    fixed = "max_steps fixes the number of steps: 'prune' saves no seconds; set max_epochs."
    assert verdict(run=run).reasons == (fixed,)
    assert fixed not in verdict(run={**run, "max_epochs": 2, "max_steps": 1000, "epochs": 2.0}).reasons


def test_the_report_in_words() -> None:
    text = str(
        Advice(
            facts(
                run={"own_mode": "partial", "own_rate": 0.4},
                validation=ValidationFacts(4, 2.5, every_epochs=1, share=1.0),
                notes=("A note.",),
                seconds=40.0,
            )
        )
    ).splitlines()
    assert text[0] == "Measured on CPU in 40 s, 1 round: 10 epochs of 100 batches of 50."
    assert text[1:3] == ["  loading     500 ms a batch, 0 workers", "  dense step  3 s on batches in memory"]
    assert "  validation  10 s for 4 batches, 3% of the dense run" in text
    assert "A note." in text
    rows = [line.split() for line in text if line.strip().startswith(("mask", "partial"))]
    assert rows[0] == ["mask", "any", "3.6", "s", "1.03", "4.88", "KiB", "61.3", "min", "1.02"]
    assert ["partial", "0.4", "2.3", "s", "0.66", "4.88", "KiB", "44.0", "min", "0.73"] in rows
    assert text[-2] == "Yours, 'partial' at 0.4: 44.0 min, 73% of the dense run."
    assert text[-1] == (
        "These are seconds, not accuracy. What to beat: dense training for 5.5 epochs, which takes as long as 'prune' "
        "for 10."
    )
