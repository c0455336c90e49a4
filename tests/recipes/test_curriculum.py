"""Curriculum and active learning as significances: their values, and runs of equal work."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_ast import recipes

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, -9.0], [1.0, 1.0, -9.0], [0.0, 0.0, 0.0]])
TARGETS = torch.tensor([0, 0, 1, 2])
LOSSES = torch.nn.functional.cross_entropy(LOGITS, TARGETS, reduction="none")


def rows() -> list[list[float]]:
    exponents = [[math.exp(value) for value in row] for row in LOGITS.tolist()]
    return [[value / sum(row) for value in row] for row in exponents]


def test_uncertainty_is_that_of_a_plain_loop() -> None:
    entropy = [-sum(p * math.log(p) for p in row) for row in rows()]
    margin = [1 - (sorted(row)[-1] - sorted(row)[-2]) for row in rows()]
    assert recipes.entropy(LOSSES, LOGITS).tolist() == pytest.approx(entropy, abs=1e-6)
    assert recipes.margin(LOSSES, LOGITS).tolist() == pytest.approx(margin, abs=1e-6)


def test_easy_and_hard_are_opposite() -> None:
    true = [row[target] for row, target in zip(rows(), TARGETS.tolist(), strict=True)]
    assert recipes.easiest(LOSSES).tolist() == pytest.approx(true, abs=1e-6)
    assert recipes.hardest(LOSSES).argsort().tolist() == recipes.easiest(LOSSES).argsort(descending=True).tolist()


def test_copies_are_worth_nothing_to_diversity() -> None:
    distances = recipes.diversity(LOSSES, LOGITS)
    assert distances[1] == distances[2] == 0
    assert distances[0] == distances[3] == pytest.approx(2)
    assert recipes.diversity(LOSSES[:1], LOGITS[:1]).tolist() == [0], "a batch of one sample has no other"


@pytest.mark.parametrize("rule", [recipes.entropy, recipes.margin, recipes.diversity])
def test_rules_of_class_scores_refuse_others(rule: Any) -> None:
    with pytest.raises(ValueError, match="expected class scores"):
        rule(LOSSES, None)


@pytest.fixture
def recipe(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, small, on scikit-learn's digits."""
    script: ModuleType = benchmark("recipes").load_recipe("curriculum/methods")
    monkeypatch.setattr(script, "DATA", "digits")
    monkeypatch.setattr(script, "EPOCHS", 4)
    return script


@pytest.mark.parametrize("method", ["shortened", "random", "easiest", "hardest", "entropy", "margin", "diversity"])
def test_methods_get_the_same_work(recipe: ModuleType, method: str) -> None:
    figures = recipe.train(method)
    assert figures["work"] == pytest.approx(recipe.WORK, abs=0.03)
    assert 0 < figures["accuracy"] <= 1


def test_ours_and_dense(recipe: ModuleType) -> None:
    assert recipe.train("dense", max_steps=4)["work"] == 1
    assert recipe.train("ours")["work"] <= 1
