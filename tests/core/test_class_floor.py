"""A floor for each class, and samples that a plan holds for certain, against plain loops over samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ast.core import SampleSelector, Selection
from lightning_ast.core.gate import with_class_floor
from lightning_ast.core.plan_rules import plan_by_rules, rate_to_cover


def floor_by_hand(kept: set[int], s: list[float], classes: list[int], floor: float) -> set[int]:
    result = set(kept)
    for kind in {c for c in classes if c >= 0}:
        members = [i for i, c in enumerate(classes) if c == kind]
        needed = math.ceil(floor * len(members) - 1e-9)
        others = sorted((i for i in members if i not in kept), key=lambda i: (-s[i], i))
        missing = needed - len(kept & set(members))
        result |= set(others[: max(0, missing)])
    return result


cases = st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(-1, 3)), min_size=1, max_size=40).filter(
    lambda rows: any(kept for kept, _, _ in rows)
)


@settings(max_examples=150, deadline=None)
@given(cases, st.sampled_from([0.1, 0.25, 0.5, 2 / 3, 1.0]))
def test_what_is_added(rows: Any, floor: float) -> None:
    kept = {i for i, row in enumerate(rows) if row[0]}
    s, classes = [float(row[1]) for row in rows], [row[2] for row in rows]
    selection = Selection(torch.tensor(sorted(kept)), torch.full((len(kept),), 2.0))
    found = with_class_floor(selection, torch.tensor(s), torch.tensor(classes), floor)
    assert found.indices.tolist() == sorted(floor_by_hand(kept, s, classes, floor))
    assert found.weights is not None
    assert [w == 2 for w in found.weights.tolist()] == [i in kept for i in found.indices.tolist()]


@settings(max_examples=150, deadline=None)
@given(cases, st.sampled_from([0.1, 0.25, 0.5]), st.randoms())
def test_an_exchange_keeps_the_number_and_what_is_fixed(rows: Any, floor: float, random: Any) -> None:
    kept = [i for i, row in enumerate(rows) if row[0]]
    fixed = torch.zeros(len(rows), dtype=torch.bool)
    fixed[[i for i in kept if random.random() < 0.3]] = True
    s, classes = torch.tensor([float(row[1]) for row in rows]), torch.tensor([row[2] for row in rows])
    found = with_class_floor(Selection(torch.tensor(kept)), s, classes, floor, fixed=fixed).indices
    assert found.numel() == len(kept) == found.unique().numel()
    assert set(fixed.nonzero().flatten().tolist()) <= set(found.tolist())
    for kind in classes.unique().tolist():
        members = (classes == kind).nonzero().flatten().tolist()
        needed = math.ceil(floor * len(members) - 1e-9)
        before, after = len(set(kept) & set(members)), len(set(found.tolist()) & set(members))
        if kind >= 0:
            assert after >= min(before, needed), "no class falls below its floor for another one's"
            assert before < needed or after >= needed
            assert after <= max(before, needed)


def test_a_batch_keeps_its_share_of_each_class() -> None:
    torch.manual_seed(0)
    s, classes = torch.rand(100), torch.arange(100) % 5
    s[classes == 4] *= 1e-3
    eligible = torch.ones(100, dtype=torch.bool)
    eligible[4] = False
    selector = SampleSelector(target_activation_rate=0.3, gate="topk", class_floor=0.2)
    kept = selector.select(s, classes=classes, eligible=eligible)
    counts = classes[kept.indices].bincount(minlength=5)
    assert counts[4] == 4, "20 samples, of which 0.2 are kept"
    assert 4 not in kept.indices
    assert kept.indices.numel() == 34
    assert selector.activation_rate == 0.34, "what was added counts"


@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_a_plan_holds_what_it_must(gate: Any) -> None:
    torch.manual_seed(1)
    s, classes = torch.rand(200), torch.arange(200) % 4
    s[classes == 3] *= 1e-4
    always = torch.zeros(200, dtype=torch.bool)
    always[[3, 50, 51]] = True
    selector = SampleSelector(target_activation_rate=0.3, gate=gate, weighting="none")
    kept = plan_by_rules(selector, s, count=60, epoch=2, always=always, classes=classes, class_floor=0.2)
    assert kept.indices.numel() == 60
    assert {3, 50, 51} <= set(kept.indices.tolist())
    assert (classes[kept.indices].bincount() >= 10).all()
    assert selector.activation_rate == 0.3
    assert selector.coverage == pytest.approx(float(s[kept.indices].sum() / s.sum()))
    again = plan_by_rules(selector, s, count=60, epoch=2, always=always, classes=classes, class_floor=0.2)
    assert torch.equal(kept.indices, again.indices)


def test_a_plan_without_rules_is_the_selectors_own() -> None:
    s = torch.rand(50, generator=torch.Generator().manual_seed(0))
    one, other = SampleSelector(), SampleSelector()
    kept, plain = plan_by_rules(one, s, count=20, epoch=1), other.plan(s, count=20, epoch=1)
    assert torch.equal(kept.indices, plain.indices)
    assert kept.weights is not None
    assert plain.weights is not None
    assert torch.equal(kept.weights, plain.weights)
    assert (one.coverage, one.activation_rate) == (other.coverage, other.activation_rate)


def test_more_than_the_count_leaves_the_most_significant() -> None:
    s = torch.tensor([0.1, 0.9, 0.5, 0.7])
    kept = plan_by_rules(SampleSelector(), s, count=2, epoch=0, always=torch.ones(4, dtype=torch.bool))
    assert kept.indices.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("coverage", "always", "rate"),
    [(0.7, [], 0.5), (0.7, [3], 0.75), (0.05, [0], 0.25), (0.5, [0, 1, 2, 3], 1.0), (1.0, [3], 1.0)],
)
def test_the_rate_that_covers(coverage: float, always: list[int], rate: float) -> None:
    certain = torch.zeros(4, dtype=torch.bool)
    certain[always] = True
    assert rate_to_cover(torch.tensor([5.0, 2.0, 2.0, 1.0]), coverage, "topk", always=certain) == rate
