"""The ideas for pruning that the regime map tries: what each changes of the remembered significance."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lightning_ast.core import SignificanceHistory
from lightning_ast.demo.data import load_images


@pytest.fixture
def ideas(benchmark: Any) -> Any:
    return benchmark("regime_ideas")


def remembering(history: SignificanceHistory, scores: torch.Tensor) -> SignificanceHistory:
    history.observe(torch.arange(len(scores)), scores)
    history.fold()
    return history


def test_a_random_share_counts_as_the_most_significant_in_each_epoch(ideas: Any) -> None:
    scores = torch.arange(1.0, 101.0)
    history = remembering(ideas.RandomBeside(100, share=0.05, seed=0), scores)
    first = history.significance()
    second = history.significance()
    for found in (first, second):
        raised = (found != scores).nonzero().squeeze(1)
        assert 4 <= len(raised) <= 5  # the most significant itself may be drawn
        assert (found[raised] == 100).all()
    assert not torch.equal(first, second)
    assert torch.equal(SignificanceHistory.significance(history), scores)


def test_no_class_falls_below_its_floor(ideas: Any) -> None:
    labels = torch.tensor([0] * 8 + [1] * 4)
    scores = torch.cat([torch.arange(11.0, 19.0), torch.arange(1.0, 5.0)])  # the second class is easy
    found = remembering(ideas.ClassFloor(12, labels=labels, share=0.25), scores).significance()
    assert (found == 18).nonzero().squeeze(1).tolist() == [6, 7, 11]
    assert torch.equal(found[found < 18], scores[found < 18])


def test_what_is_remembered_is_smoothed_over_the_visits(ideas: Any) -> None:
    history = remembering(ideas.Smoothed(3), torch.tensor([4.0, 2.0]))
    assert history.significance().tolist() == [4, 2, 4]  # the third was never seen
    remembering(history, torch.tensor([2.0]))
    assert history.significance().tolist() == [3, 2, 3]
    history.observe(torch.tensor([0]), torch.tensor([float("inf")]))
    history.fold()
    assert history.quarantined.tolist() == [True, False, False]


@pytest.fixture
def train(benchmark: Any, tmp_path: Path) -> Any:
    runs = benchmark("regime_run")
    regime = runs.Regime(data="digits", images=256, width=2, epochs=4, batch_size=32)

    def go(*options: tuple[str, Any], gate: str = "topk", **target: float) -> dict[str, Any]:
        settings = (*(target or {"rate": 0.5}).items(), ("gate", gate), ("steps", "keep"), *options)
        run = runs.Run(regime, "prune", settings)
        found: dict[str, Any] = benchmark("regime_train").train(run, root="", records=tmp_path, precision="32-true")
        return found

    return go


def test_what_an_idea_costs_or_saves_is_in_the_work(train: Any) -> None:
    plain = train()
    averaged = train(("idea", "averaged-model"))
    assert averaged["samples_backwarded"] == plain["samples_backwarded"]
    assert averaged["samples_forwarded"] > plain["samples_forwarded"]
    inside = train(("idea", "partial-inside"))
    assert inside["samples_forwarded"] == plain["samples_forwarded"]
    sparse = 256 * 0.5 * 2
    assert inside["samples_backwarded"] == pytest.approx(plain["samples_backwarded"] - sparse / 3, rel=0.03)


@pytest.mark.parametrize("idea", ["random-beside", "class-floor", "progress", "smoothed"])
def test_a_history_is_used_by_the_fits_of_its_run_alone(idea: str, train: Any) -> None:
    plain = train()
    assert train(("idea", idea))["flops"] == plain["flops"]
    assert train(("idea", idea))["accuracy_by_validation"] != plain["accuracy_by_validation"]
    assert train()["accuracy_by_validation"] == plain["accuracy_by_validation"]


@pytest.mark.parametrize(
    "idea", ["class-balance", "some-easy", "progress", "relative", "rank", "mean-of-visits", "age"]
)
def test_the_older_ideas_change_what_a_fit_selects(idea: str, train: Any, ideas: Any, benchmark: Any) -> None:
    older = benchmark("prune_ideas")
    older.LABELS = load_images("digits").train_labels[:256].long()
    with patch.dict(ideas._HISTORIES, {"smoothed": lambda run, data: older.HISTORIES[idea]}):
        changed = train(("idea", "smoothed"), gate="soft")
    assert changed["accuracy_by_validation"] != train(gate="soft")["accuracy_by_validation"]


def test_a_higher_rate_changes_the_run_alone(train: Any) -> None:
    plain = train()
    higher = train(("idea", "higher-rate"))
    assert higher["samples_backwarded"] == plain["samples_backwarded"]
    assert higher["lr"] == plain["lr"]


@pytest.mark.parametrize("idea", ["scaled-gradient", "smaller-steps"])
def test_shorter_steps_change_the_run_and_not_its_size(idea: str, train: Any) -> None:
    plain = train()
    shorter = train(("idea", idea))
    assert shorter["flops"] == plain["flops"]
    assert shorter["lr"] == plain["lr"]
    # of four epochs the second and the third are pruned
    assert shorter["accuracy_by_validation"][0] == plain["accuracy_by_validation"][0]
    assert shorter["accuracy_by_validation"][1:] != plain["accuracy_by_validation"][1:]


def test_no_batch_is_smaller_than_32(train: Any, ideas: Any) -> None:
    assert train()["rate_by_epoch"][1] == 0.5
    with pytest.warns(UserWarning, match="leaves 32 samples in each batch of 32"):
        assert train(("idea", "least-batch-32"))["rate_by_epoch"] == [1.0] * 4


def test_no_sample_is_kept_with_less_than_half_a_chance(train: Any) -> None:
    plain = train(gate="soft", coverage=0.3)
    assert min(plain["rate_by_epoch"]) < 0.45
    bounded = train(("weighting", "unbiased"), ("idea", "bounded"), gate="soft", coverage=0.6)
    assert 0.49 < min(bounded["rate_by_epoch"]) < 1
    assert train(gate="soft", coverage=0.3)["rate_by_epoch"] == plain["rate_by_epoch"]


def test_an_unknown_idea_is_refused(train: Any) -> None:
    with pytest.raises(ValueError, match="expected an idea of plain"):
        train(("idea", "none"))
