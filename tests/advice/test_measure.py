"""The measurement on a clock that the model moves: the facts are known exactly."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.advice.measure import Measurement
from lightning_ast.advice.measured import Facts, Phases, RunFacts
from lightning_ast.advice.predict import Predictions
from lightning_ast.advice.script import script
from lightning_ast.schedule import Schedule
from tests.advice.clock import BACKWARD, FORWARD, OPTIMIZER, TRANSFER, Clock, TimedNet
from tests.helpers.data import loader
from tests.helpers.training import quiet_trainer

FIXED = TRANSFER + OPTIMIZER


def measured(digits: tuple[Tensor, Tensor], *callbacks: Any, budget: float = 200.0, **options: Any) -> Facts:
    clock = Clock()
    trainer = quiet_trainer(**{"max_epochs": 10, "callbacks": list(callbacks), **options})
    module, data = TimedNet(clock), loader(digits, shuffle=True)
    return Measurement(
        trainer, module, data, loader(digits, batch_size=128), budget_seconds=budget, clock=clock
    ).facts()


def test_known_seconds_give_known_facts(digits: tuple[Tensor, Tensor]) -> None:
    facts = measured(digits, SparseSelectionCallback(gate="topk", target_activation_rate=0.25))
    step, rows = facts.step, 64
    assert step.dense.seconds == pytest.approx(FIXED + (FORWARD + BACKWARD) * rows)
    kept = [(point.rate * rows, point.seconds) for point in step.curves["partial"]]
    assert [k for k, _ in kept] == [6, 22, 38]
    for k, seconds in kept:
        assert seconds == pytest.approx(FIXED + FORWARD * rows + BACKWARD * k)
    kept = [(point.rate * rows, point.seconds) for point in step.curves["subset"]]
    assert [k for k, _ in kept] == [2, 6, 22, 38]
    for k, seconds in kept:
        assert seconds == pytest.approx(FIXED + FORWARD * rows + (FORWARD + BACKWARD) * k)
    phases = Phases(TRANSFER, FORWARD * rows, BACKWARD * rows, OPTIMIZER)
    assert step.phases == pytest.approx(phases)
    assert step.host_share == pytest.approx((FIXED + 2 * (FORWARD + BACKWARD)) / step.dense.seconds)
    assert step.selection_seconds == pytest.approx(0.0)
    for found in step.dense_backwards:
        assert found.ops.keys() == {"aten.abs.default"}, "an op without a rule, on which no FLOPs are counted"
        assert found.share == 0
    assert 2 <= step.cycles < 15
    assert step.refused == {}


def test_a_device_that_runs_behind_gives_the_same_facts(
    digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def behind(modes: Any, **options: Any) -> Any:
        return script(modes, **{**options, "asynchronous": True})

    selection = SparseSelectionCallback(gate="topk")
    plain = measured(digits, selection, budget=300.0).step
    monkeypatch.setattr("lightning_ast.advice.measure.script", behind)
    step = measured(digits, selection, budget=300.0).step
    assert step.dense.seconds == pytest.approx(plain.dense.seconds)
    assert step.phases == pytest.approx(plain.phases)
    assert step.host_share == pytest.approx(plain.host_share)
    for mode in ("partial", "subset"):
        for got, expected in zip(step.curves[mode], plain.curves[mode], strict=True):
            assert (got.rate, got.seconds) == pytest.approx((expected.rate, expected.seconds))
    assert step.selection_seconds == pytest.approx(0.0), "known here too"


def test_the_run_its_loader_and_its_validation(digits: tuple[Tensor, Tensor]) -> None:
    schedule = TwoStageScheduler(warmup_epochs=2, cooldown_epochs=0.1, target_activation_rate=0.3)
    facts = measured(
        digits, SparseSelectionCallback(mode="prune"), schedule, Timer("00:01:00:00"), EarlyStopping("loss")
    )
    assert facts.run == RunFacts(
        epochs=10, batches_per_epoch=8, batch_size=64, samples_per_epoch=512, max_epochs=10,
        schedule=Schedule(warmup_epochs=2, cooldown_epochs=0.1), own_mode="prune", own_rate=0.3,
    )  # fmt: skip
    assert facts.loading.batches == 8
    assert facts.loading.seconds_per_batch == 0
    assert facts.validation is not None
    assert (facts.validation.batches, facts.validation.every_epochs, facts.validation.share) == (4, 1, 1.0)
    assert facts.validation.seconds_per_batch == pytest.approx(2.0 + TRANSFER)
    assert facts.notes == (
        "Trainer(max_time) is left out of account.",
        "EarlyStopping is left out of account: the run is taken to reach its limits.",
    )
    assert facts.device.startswith("CPU")
    assert facts.step.memory is not None
    assert facts.step.memory.static_bytes == 4 * 2 * 760, "parameters and gradients; SGD without momentum has no state"
    images, scores = 64 * 64 * 4, 64 * 10 * 4
    assert facts.step.memory.activation_bytes == images + 2 * scores + 64 * 8 + 4, (
        "input, input of the head, log-softmax, labels, total weight"
    )


@pytest.mark.parametrize("target", ["target_coverage", "target_activation_rate"])
def test_a_target_that_a_function_gives_is_not_known(digits: tuple[Tensor, Tensor], target: str) -> None:
    options: dict[str, Any] = {target: lambda epoch, metrics: 0.5}
    facts = measured(digits, SparseSelectionCallback(**options), budget=10.0)
    assert (facts.run.own_rate, facts.run.own_coverage) == (None, None)
    assert any("The target is a function of the metrics" in note for note in facts.notes)


def test_a_small_budget_measures_two_rounds_and_says_what_it_took(digits: tuple[Tensor, Tensor]) -> None:
    facts = measured(digits, budget=10.0)
    assert facts.step.cycles == 2
    assert [len(curve) for curve in facts.step.curves.values()] == [2, 2]
    assert facts.seconds > 11
    assert "The budget of 10 s was exceeded" in facts.notes[-1]
    assert facts.notes[0] == "Assumed: a dense warmup and a dense cooldown of 10% of the run each."
    assert facts.run.schedule == Schedule(warmup_epochs=0.1, cooldown_epochs=0.1)
    assert facts.run.own_rate is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3, "max_steps": 12}, {"epochs": 1.5, "max_steps": 12, "max_epochs": 3}),
        ({"max_epochs": -1, "max_steps": 20, "accumulate_grad_batches": 4}, {"epochs": 10.0, "accumulate": {0: 4}}),
        ({"limit_train_batches": 5}, {"batches_per_epoch": 5, "samples_per_epoch": 320, "epochs": 10.0}),
        ({"max_epochs": -1}, {"epochs": 10.0, "max_epochs": 10}),
        ({"limit_train_batches": 0.5, "overfit_batches": 3}, {"batches_per_epoch": 3}),
    ],
)
def test_limits_of_the_run(digits: tuple[Tensor, Tensor], options: dict[str, Any], expected: dict[str, Any]) -> None:
    run = measured(digits, budget=10.0, **options).run
    assert {name: getattr(run, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"check_val_every_n_epoch": 5}, {"every_epochs": 5, "share": 1.0}),
        ({"val_check_interval": 0.25}, {"every_epochs": 1, "share": 0.25}),
        ({"val_check_interval": 4}, {"every_epochs": 1, "every_batches_of_epoch": 4}),
        ({"val_check_interval": 40, "check_val_every_n_epoch": None}, {"every_batches": 40}),
        ({"limit_val_batches": 3}, {"batches": 3}),
    ],
)
def test_when_validations_are_due(
    digits: tuple[Tensor, Tensor], options: dict[str, Any], expected: dict[str, Any]
) -> None:
    validation = measured(digits, budget=10.0, **options).validation
    assert {name: getattr(validation, name) for name in expected} == expected


def test_no_validation_is_none(digits: tuple[Tensor, Tensor]) -> None:
    assert measured(digits, budget=10.0, limit_val_batches=0).validation is None


def test_a_batch_size_beyond_the_data_set_is_that_of_the_batch(digits: tuple[Tensor, Tensor]) -> None:
    clock = Clock()
    data = loader(digits, batch_size=4096)
    facts = Measurement(quiet_trainer(), TimedNet(clock), data, None, budget_seconds=100, clock=clock).facts()
    assert (facts.run.batch_size, facts.run.samples_per_epoch, facts.run.batches_per_epoch) == (512, 512, 1)
    dense = FIXED + (FORWARD + BACKWARD) * 512
    assert Predictions(facts).dense.run_seconds == pytest.approx(dense)


def test_accumulated_batches_share_their_optimizer_step(digits: tuple[Tensor, Tensor]) -> None:
    predictions = Predictions(measured(digits, accumulate_grad_batches=4))
    assert predictions.compute_seconds == pytest.approx(TRANSFER + (FORWARD + BACKWARD) * 64 + OPTIMIZER / 4)
