"""The recipe for imbalanced tables: rare classes are kept whole where asked, and recalls are those of scikit-learn."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from sklearn.metrics import confusion_matrix

from lightning_ast.demo.data import load_images


@pytest.fixture
def recipe(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, small, on scikit-learn's digits."""
    script: ModuleType = benchmark("recipes").load_recipe("tables/imbalanced")
    monkeypatch.setattr(script, "load_images", lambda *_: load_images("digits"))
    for name, value in {"ROWS": 400, "EPOCHS": 6, "BATCH": 32}.items():
        monkeypatch.setattr(script, name, value)
    return script


def test_classes_become_rare(recipe: ModuleType) -> None:
    table, labels, test, test_labels = recipe.make_table(100, "")
    counts = labels.bincount().tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] > 50
    assert table.shape[1] == test.shape[1] == 64
    assert torch.allclose(table.std(0), torch.ones(64))
    assert min(test_labels.bincount()) > 20, "the test is not made rare"


def test_rare_classes_are_kept_whole(recipe: ModuleType) -> None:
    dense, ours, floor = (recipe.train(method) for method in ("dense", "ours", "floor"))
    assert dense["work"] == pytest.approx(1)
    assert ours["work"] < 0.99
    assert ours["trained_frequent"] < dense["trained_frequent"]
    assert floor["trained_rare"] > 0.9 * dense["trained_rare"]


@pytest.mark.parametrize("method", ["shortened", "random"])
def test_the_methods_beside_it_get_the_same_work(recipe: ModuleType, method: str) -> None:
    assert recipe.train(method)["work"] == pytest.approx(recipe.WORK, abs=0.03)


def test_recalls_are_those_of_the_confusion_matrix(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    recall_score = recipe.recall_score
    monkeypatch.setattr(
        recipe, "recall_score", lambda *given, **options: seen.append(given) or recall_score(*given, **options)
    )
    figures = recipe.train("dense_even", max_steps=3)
    matrix = confusion_matrix(*seen[0])
    recalls = matrix.diagonal() / matrix.sum(1)
    assert figures["recall_rare"] == pytest.approx(recalls[7:].mean())
    assert figures["accuracy_balanced"] == pytest.approx(recalls.mean())


def test_rare_rows_are_those_of_small_classes(recipe: ModuleType) -> None:
    labels = torch.tensor([0] * 100 + [2] * 9 + [1] * 60)
    assert recipe.rare_rows(labels).tolist() == list(range(100, 109))
