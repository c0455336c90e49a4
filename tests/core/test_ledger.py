from __future__ import annotations

import pytest

from lightning_ast.core.ledger import FlopsPerSample, Ledger, estimated_energy_savings
from lightning_ast.mode_facts import cost_share


def filled() -> Ledger:
    ledger = Ledger(flops=FlopsPerSample(forward=2.0, backward=3.0))
    ledger.record("warmup", mode=None, offered=100, selected=100)
    ledger.record("sparse", mode="subset", offered=200, selected=50)
    ledger.record("sparse", mode="mask", offered=10, selected=1)
    ledger.record("cooldown", mode=None, offered=30, selected=30)
    return ledger


def test_samples_and_flops_are_added_up() -> None:
    ledger = filled()
    assert (ledger.offered, ledger.selected) == (340, 181)
    spent = 100 * 5 + (200 * 2 + 50 * 5) + 10 * 5 + 30 * 5
    assert ledger.spent_flops() == spent
    assert ledger.dense_flops() == 340 * 5
    assert ledger.savings()["flops"] == pytest.approx(1 - spent / 1700)
    assert ledger.savings()["samples"] == pytest.approx(1 - 181 / 340)
    assert ledger.activation_rate == pytest.approx(181 / 340)


def test_seconds_are_measured_against_the_warmup() -> None:
    ledger = filled()
    assert ledger.savings()["seconds"] is None, "nothing was timed"
    ledger.record_seconds("warmup", seconds=4.0, offered=40)  # 0.1 s a sample
    ledger.record_seconds("sparse", seconds=2.0, offered=40)  # 0.05 s a sample
    spent = 100 * 0.1 + 210 * 0.05 + 30 * 0.1  # the untimed cooldown counts as dense
    assert ledger.savings()["seconds"] == pytest.approx(1 - spent / 34)


def test_unknown_is_none_never_zero() -> None:
    ledger = Ledger()
    assert ledger.savings() == {"samples": None, "flops": None, "seconds": None, "joules": None}
    ledger.record("sparse", mode="subset", offered=4, selected=4)
    assert ledger.savings() == {"samples": 0.0, "flops": None, "seconds": None, "joules": None}


def test_a_scoring_forward_costs_more_than_it_saves_at_rate_one() -> None:
    ledger = Ledger(flops=FlopsPerSample(1.0, 2.0))
    ledger.record("sparse", mode="subset", offered=10, selected=10)
    assert ledger.savings()["flops"] == pytest.approx(-1 / 3)


def test_modes_of_unknown_cost_are_refused() -> None:
    with pytest.raises(
        ValueError, match="expected mode None or one of 'mask', 'subset', 'partial', 'prune', got 'skip'"
    ):
        Ledger().record("sparse", mode="skip", offered=1, selected=1)


def test_prune_costs_its_samples_alone() -> None:
    ledger = Ledger(flops=FlopsPerSample(forward=1.0, backward=2.0))
    ledger.record("sparse", mode="prune", offered=100, selected=40)
    assert ledger.spent_flops() == 3 * 40
    assert ledger.savings()["flops"] == ledger.savings()["samples"] == pytest.approx(0.6)


def test_partial_counts_what_ran_over_all_rows() -> None:
    ledger = Ledger(flops=FlopsPerSample(forward=1.0, backward=2.0))
    ledger.record("warmup", mode=None, offered=100, selected=100)
    ledger.record("sparse", mode="partial", offered=100, selected=40)
    assert ledger.spent_flops() == 300 + 100 + 2 * 40
    ledger.record("sparse", mode="partial", offered=100, selected=40, dense_share=0.25)
    assert ledger.spent_flops() == 300 + 100 + 2 * 40 + 100 + 2 * (40 + 0.25 * 60)
    ledger.record("sparse", mode="partial", offered=100, selected=40, dense_share=1.0)
    assert ledger.spent_flops() == 300 + 2 * 100 + 2 * (40 + 40 + 0.25 * 60) + 300


def test_state_round_trip() -> None:
    ledger, copy = filled(), Ledger()
    copy.load_state_dict(ledger.state_dict())
    assert copy == ledger


def test_original_energy_model_is_an_estimate() -> None:
    assert estimated_energy_savings(offered=100, selected=40) == pytest.approx(1 - (40 + 60 * 0.01) / 100)
    assert estimated_energy_savings(
        offered=10, selected=1, energy_per_activation=10.0, energy_per_skip=0.1
    ) == pytest.approx(1 - (10 + 0.9) / 100)
    with pytest.raises(ValueError, match="at least one"):
        estimated_energy_savings(offered=0, selected=0)


@pytest.mark.parametrize(("mode", "expected"), [("mask", 1.0), ("subset", 2.2 / 3), ("partial", 0.6), ("prune", 0.4)])
def test_cost_model(mode: str, expected: float) -> None:
    assert cost_share(mode, 0.4) == pytest.approx(expected)
