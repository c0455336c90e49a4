"""The plan of batches that are drawn whole: what holds of it whatever the batches, the groups and the processes are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lightning_ast.core import SampleSelector, SignificanceHistory
from lightning_ast.core.history import plan_positions
from lightning_ast.pruning.epoch import mean_significance
from lightning_ast.pruning.own_batches import DrawnBatches, plan_batches

DATASET = 60


@pytest.mark.parametrize("refills", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("processes", [1, 3])
def test_planned_batches_are_drawn_batches_with_samples_left_out(processes: int, grouped: bool, refills: bool) -> None:
    for seed in range(40):
        source = torch.Generator().manual_seed(seed)
        batches = int(torch.randint(1, 9, (), generator=source))
        sizes = torch.randint(1, 7, (processes, batches), generator=source)
        drawn = DrawnBatches(torch.randint(DATASET, (int(sizes.sum()),), generator=source), sizes)
        groups = torch.randint(3, (DATASET,), generator=source) if grouped else None
        history = SignificanceHistory(DATASET)
        history.observe(torch.arange(DATASET), torch.rand(DATASET, generator=source))
        history.fold()
        count = max(1, len(drawn.indices) * seed // 40)
        selector = SampleSelector(weighting="sqrt" if seed % 2 else "none")
        plan, left = plan_batches(history, drawn, groups, epoch=seed, count=count, selector=selector, refills=refills)

        chosen, _ = plan_positions(history, drawn.indices, epoch=seed, count=count, selector=selector)
        planned, offered = Counter(plan.indices.tolist()), Counter(drawn.indices.tolist())
        assert not Counter(drawn.indices[chosen].tolist()) - planned, "every planned sample is loaded"
        assert not planned - offered, "and none that was not drawn, or more often"
        assert plan.offered == len(drawn.indices)
        assert left.shape == (processes, left.shape[1]), "as many batches in every process"
        assert int(left.sum()) == len(plan.indices)
        assert plan.weights is None or (len(plan.weights) == len(plan.indices) and bool((plan.weights > 0).all()))
        assert left.shape[1] == batches if not refills else left.shape[1] <= batches
        assert int(left.min()) >= min(2, int(sizes.min()))
        if not refills:
            assert bool((left <= sizes).all())
            assert bool((left >= sizes.clamp(max=2)).all())
        for rank, part in enumerate(plan.indices.split(left.sum(1).tolist())):
            own = drawn.indices.split(sizes.sum(1).tolist())[rank]
            assert not Counter(part.tolist()) - Counter(own.tolist()), "each process loads what it drew"


def test_a_group_fills_its_own_places_alone() -> None:
    """Batches of two kinds: what is loaded in each is of its kind, in the order in which it was drawn."""
    kinds = torch.tensor([0, 1]).repeat_interleave(20)
    drawn = DrawnBatches(torch.arange(40), torch.tensor([[5] * 8]))
    history = SignificanceHistory(40)
    history.observe(torch.arange(40), torch.where(kinds == 0, 0.9, 0.1) + torch.arange(40) / 1000)
    history.fold()
    selector = SampleSelector(gate="topk", weighting="none")
    plan, left = plan_batches(history, drawn, kinds, epoch=0, count=16, selector=selector, refills=True)
    assert plan.indices.tolist() == [*range(4, 20), 3], "the last batch had one, and got the next one of its kind"
    assert left.tolist() == [[5, 5, 5, 2]]
    plan, left = plan_batches(history, drawn, kinds, epoch=0, count=16, selector=selector, refills=False)
    assert left.tolist() == [[4, 4, 4, 4, 2, 2, 2, 2]]
    assert sorted(plan.indices.tolist()) == [*range(4, 20), *range(32, 40)], "the most significant come back"


def test_samples_that_are_withheld_keep_nobody_company() -> None:
    drawn = DrawnBatches(torch.arange(8), torch.tensor([[2, 2, 2, 2]]))
    history = SignificanceHistory(8)
    history.observe(torch.arange(8), torch.tensor([0.9, torch.inf, 0.8, 0.1, torch.inf, torch.inf, 0.2, 0.3]))
    history.fold()
    selector = SampleSelector(gate="topk", weighting="none")
    plan, left = plan_batches(history, drawn, None, epoch=0, count=2, selector=selector, refills=False)
    assert left.tolist() == [[1, 2, 1, 2]]
    assert plan.indices.tolist() == [0, 2, 3, 5, 6, 7]


def test_the_significance_of_a_ready_batch() -> None:
    assert mean_significance(torch.tensor([1.0, 3.0])).tolist() == [2.0]
    assert mean_significance(torch.tensor([1.0, torch.inf, 3.0])).tolist() == [2.0]
    assert mean_significance(torch.tensor([torch.inf, torch.inf])).tolist() == [torch.inf]
