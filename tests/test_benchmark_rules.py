"""The rules of others that the benchmarks compare with, against what their papers and their authors' code say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECORDS = BENCHMARKS / "records"


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("rules")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_infobatch_drops_half_of_what_is_below_the_mean_and_doubles_the_rest(rules: Any) -> None:
    scores = torch.tensor([1.0, 5.0, 1.0, 1.0, 7.0, 1.0, 1.0])  # the mean is 17/7
    kept, weights = rules.infobatch_choice(scores, 0.5, generator())
    assert {1, 4} <= set(kept.tolist())
    assert len(kept) == 2 + 2  # int(0.5 * 5) of those below the mean
    easy = [index for index in kept.tolist() if index not in (1, 4)]
    assert weights[easy].tolist() == [2.0, 2.0]
    assert weights[[1, 4]].tolist() == [1.0, 1.0]


def test_infobatch_keeps_all_at_first_and_at_the_end(rules: Any) -> None:
    rule = rules.InfoBatch(100, epochs=16, seed=0)
    assert len(rule.choose(0).indices) == 100  # all losses are alike: none is below the mean
    rule.observe(torch.arange(100), torch.arange(100.0))
    assert len(rule.choose(13).indices) == 75
    last = rule.choose(14)  # 0.875 of 16 epochs are pruned
    assert sorted(last.indices.tolist()) == list(range(100))
    assert last.weights is None


def test_seta_groups_by_loss_the_easiest_first(rules: Any) -> None:
    scores = torch.tensor([9.0, 0.1, 5.0, 0.2, 9.1, 5.1, 0.15])
    assert [sorted(rows.tolist()) for rows in rules.seta_groups(scores, 3)] == [[1, 3, 6], [2, 5], [0, 4]]
    alike = rules.seta_groups(torch.full((6,), 3.0), 3)
    assert [rows.tolist() for rows in alike] == [[0, 1], [2, 3], [4, 5]]


def test_seta_slides_its_window_from_easy_to_hard(rules: Any) -> None:
    windows = [list(rules.seta_window(10, 0.5, visit)) for visit in range(8)]
    assert windows[0] == list(range(10))
    assert [window[0] for window in windows[1:]] == [1, 2, 3, 4, 5, 0, 1]
    assert all(len(window) == 5 for window in windows[1:])
    # with the settings of the CIFAR script: every other epoch leaves the easiest of five groups out
    assert [list(rules.seta_window(5, 0.9, visit)) for visit in (1, 2)] == [[1, 2, 3, 4], [0, 1, 2, 3]]


def test_seta_never_trains_on_more_than_its_random_share(rules: Any) -> None:
    rule = rules.SeTa(100, epochs=8, seed=0)
    rule.observe(torch.arange(100), torch.rand(100))
    counts = [len(set(rule.choose(epoch).indices.tolist())) for epoch in range(8)]
    assert counts[0] == counts[7] == 90  # the first epoch has all groups, the last is not pruned
    assert all(count < 90 for count in counts[1:7])


def test_orderdp_keeps_the_largest_losses_of_a_random_part(rules: Any) -> None:
    scores = torch.arange(100.0)
    kept = rules.orderdp_choice(scores, 0.75, 0.85, generator())
    assert len(set(kept.tolist())) == 63  # int(0.85 * int(0.75 * 100))
    drawn = torch.randperm(100, generator=generator())[:75]
    assert sorted(kept.tolist()) == drawn.sort(descending=True).values[:63].sort().values.tolist()
    assert sorted(rules.orderdp_choice(scores, 1.0, 0.1, generator()).tolist()) == list(range(90, 100))


def test_selective_backprop_draws_by_percentile(rules: Any) -> None:
    losses = torch.tensor([0.3, 4.0, 0.1, 2.0])
    expected = {0.5: [0.375, 0.875, 0.125, 0.625], 1 / 3: [0.375**2, 0.875**2, 0.125**2, 0.625**2]}
    for keep, powers in expected.items():
        want = torch.tensor(powers, dtype=torch.float64) / sum(powers)
        torch.testing.assert_close(rules.composer_probabilities(losses, keep), want)


def test_selective_backprop_is_that_of_composer(rules: Any) -> None:
    """The record was made with Composer itself: see `benchmarks/composer_reference.py`."""
    record = json.loads((RECORDS / "composer-selective-backprop.json").read_text())
    for draw in record["draws"]:
        losses = torch.tensor(draw["losses"])
        order = losses.argsort()
        probabilities = rules.composer_probabilities(losses, draw["keep"])[order].numpy()
        generator = np.random.RandomState(draw["seed"])
        chosen = generator.choice(len(losses), int(draw["keep"] * len(losses)), replace=False, p=probabilities)
        assert order[chosen].tolist() == draw["selected"]
    for case in record["batches"]:
        selects = rules.composer_selects(case["done"], case["batch"], interrupt=case["interrupt"])
        assert selects == case["selects"]
    assert len(record["draws"]) == 15
    assert {case["selects"] for case in record["batches"]} == {True, False}


@pytest.mark.parametrize(("keeps", "batches", "size"), [(True, 10, 4), (False, 4, 10)])
def test_a_random_share_has_the_steps_of_the_run_that_it_is_compared_with(
    rules: Any, keeps: bool, batches: int, size: int
) -> None:
    rule = rules.RandomShare(100, 10, [1.0, 0.4], keeps_steps=keeps, seed=0)
    assert len(set(rule.choose(0).indices.tolist())) == 100
    choice = rule.choose(1)
    assert choice.batch_size == size
    assert len(set(choice.indices.tolist())) == batches * size
    assert rule.choose(1).indices.tolist() != choice.indices.tolist()
