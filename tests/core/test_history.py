"""The plan of an epoch beside a loop over single samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_ast.core import EpochPlan, SampleSelector, SignificanceHistory, plan_epoch, planned_count
from lightning_ast.core.gate import generator_of


def remembered(scores: Tensor) -> SignificanceHistory:
    history = SignificanceHistory(len(scores))
    history.observe(torch.arange(len(scores)), scores)
    history.fold()
    return history


def learned(size: int = 1000) -> Tensor:
    """Significance late in a training: most samples near 0, a few large."""
    return torch.rand(size, generator=torch.Generator().manual_seed(1)).pow(4)


def by_hand(significance: list[float], count: int, noise: list[float]) -> list[int]:
    """Bisect the threshold, lay the samples end to end in random order, and pick those that a comb hits."""
    size, rate = len(significance), count / len(significance)
    floor = min(0.01, 0.1 * rate)
    lifted = [max(s, max(significance) * 1e-6 + 1e-30) for s in significance]
    low, high = 1e-40, 1e10
    for _ in range(300):
        threshold = math.sqrt(low * high)
        kept = sum(min(1.0, max(floor, s / threshold)) for s in lifted)
        low, high = (threshold, high) if kept > count else (low, threshold)
    position, hit = noise[-1], []
    for sample in sorted(range(size), key=lambda i: noise[i]):
        before, position = position, position + min(1.0, max(floor, lifted[sample] / threshold))
        if math.floor(position) > math.floor(before):
            hit.append(sample)
    return sorted(hit)


def test_plan_equals_a_loop_over_single_samples() -> None:
    scores = learned(200)
    selector = SampleSelector(weighting="none", seed=3)
    for epoch in (0, 7):
        noise = torch.rand(
            201, generator=generator_of(selector.seed, selector.rank, epoch), dtype=torch.float64
        ).tolist()
        plan = plan_epoch(remembered(scores), torch.arange(200), epoch=epoch, count=80, selector=selector)
        assert plan.indices.tolist() == by_hand(scores.double().tolist(), 80, noise)
        assert (plan.epoch, plan.offered, plan.weights) == (epoch, 200, None)


@pytest.mark.parametrize("gate", ["soft", "threshold", "topk"])
@pytest.mark.parametrize("count", [1, 10, 400, 999, 1000])
def test_exactly_the_planned_count(gate: str, count: int) -> None:
    for scores in (learned(), torch.zeros(1000), torch.ones(1000), torch.eye(1000)[0]):
        selector = SampleSelector(gate=gate, weighting="none")
        plan = plan_epoch(remembered(scores), torch.randperm(1000), epoch=1, count=count, selector=selector)
        assert len(plan.indices) == len(plan.indices.unique()) == count
        assert plan.activation_rate == count / 1000


@pytest.mark.parametrize("gate", ["threshold", "topk"])
def test_hard_gates_keep_the_most_significant(gate: str) -> None:
    scores = learned()
    selector = SampleSelector(gate=gate, weighting="none")
    plan = plan_epoch(remembered(scores), torch.randperm(1000), epoch=1, count=300, selector=selector)
    assert set(plan.indices.tolist()) == set(scores.topk(300).indices.tolist())


def test_samples_are_kept_in_proportion_to_their_significance_and_none_is_lost() -> None:
    scores = learned(300)
    history, selector = remembered(scores), SampleSelector(weighting="unbiased")
    times, weight = torch.zeros(300), torch.zeros(300)
    epochs = 4000
    for epoch in range(epochs):
        plan = plan_epoch(history, torch.arange(300), epoch=epoch, count=90, selector=selector)
        times[plan.indices] += 1
        weight[plan.indices] += plan.weights
    threshold = float(selector.last_threshold)
    expected = (scores / threshold).clamp(0.01, 1)
    error = (times / epochs - expected).abs() / (expected * (1 - expected) / epochs).sqrt().clamp_min(1e-6)
    assert error[expected < 1].max() < 5, "five standard deviations of a binomial"
    assert (times > 0).all(), "the floor: even what is learned comes back"
    torch.testing.assert_close(weight / epochs, torch.full((300,), 0.3), rtol=0.5, atol=0.0, msg="unbiased")
    assert float(weight.sum()) / epochs == pytest.approx(0.3 * 300, rel=0.01)


def test_the_plan_is_a_function_of_seed_and_epoch_not_of_the_order_of_the_draws() -> None:
    history, order = remembered(learned()), torch.randperm(1000)

    def plan(draws: Tensor, *, seed: int = 0, epoch: int = 2) -> EpochPlan:
        selector = SampleSelector(seed=seed, weighting="sqrt")
        return plan_epoch(history, draws, epoch=epoch, count=400, selector=selector)

    first, shuffled = plan(torch.arange(1000)), plan(order)
    assert shuffled.indices.tolist() == [i for i in order.tolist() if i in set(first.indices.tolist())], "their order"
    weights = dict(zip(first.indices.tolist(), first.weights.tolist()))
    assert [weights[i] for i in shuffled.indices.tolist()] == shuffled.weights.tolist()
    torch.rand(5)
    assert torch.equal(plan(order).indices, shuffled.indices), "the global generator has no part in it"
    assert not torch.equal(plan(order, seed=1).indices, shuffled.indices)
    assert not torch.equal(plan(order, epoch=3).indices, shuffled.indices)


def test_a_sample_that_was_drawn_twice_is_offered_twice() -> None:
    history = remembered(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    draws = torch.tensor([1, 0, 1, 3, 2, 0])
    plan = plan_epoch(history, draws, epoch=0, count=3, selector=SampleSelector(gate="topk", weighting="none"))
    assert plan.indices.tolist() == [1, 1, 2]
    assert plan.offered == 6


def test_unseen_samples_are_as_significant_as_the_most_significant() -> None:
    history = SignificanceHistory(5)
    assert history.significance().tolist() == [1.0] * 5
    history.observe(torch.tensor([1, 3]), torch.tensor([0.2, 3.0]))
    assert history.significance().tolist() == [1.0] * 5, "from the next fold on"
    history.fold()
    assert history.significance().tolist() == pytest.approx([3.0, 0.2, 3.0, 3.0, 3.0])
    assert history.seen.tolist() == [False, True, False, True, False]


def test_a_new_epoch_replaces_the_score_and_within_one_the_largest_counts() -> None:
    history = remembered(torch.tensor([5.0, 5.0]))
    history.observe(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    history.observe(torch.tensor([0]), torch.tensor([1.5]))
    history.fold()
    assert history.significance().tolist() == [2.0, 5.0]


def test_processes_agree_whatever_they_saw_and_whenever_they_saved() -> None:
    def maximum(mine: Tensor) -> Tensor:
        return torch.stack([mine, *(h.state_dict()["recent"] for h in histories)]).amax(0)

    histories = [SignificanceHistory(3) for _ in range(2)]
    histories[0].observe(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    histories[1].observe(torch.tensor([1]), torch.tensor([3.0]))
    saved = histories[0].state_dict(maximum)
    restored = [SignificanceHistory(3) for _ in range(2)]
    for history in restored:
        history.load_state_dict(saved)
    for group in (histories, restored):
        histories = group
        group[1].observe(torch.tensor([2]), torch.tensor([0.5]))
        for history, merged in zip(group, [maximum(group[0].state_dict()["recent"])] * 2):
            history.fold(merged.maximum)
            assert history.significance().tolist() == [1.0, 3.0, 0.5]


def test_state_survives_and_another_data_set_is_refused() -> None:
    history = remembered(learned(10))
    history.observe(torch.tensor([2]), torch.tensor([9.0]))
    other = SignificanceHistory(10)
    other.load_state_dict(history.state_dict())
    history.fold()
    other.fold()
    assert torch.equal(history.significance(), other.significance())
    with pytest.raises(ValueError, match="expected the remembered significance of 11 samples, got that of 10"):
        SignificanceHistory(11).load_state_dict(history.state_dict())


@pytest.mark.parametrize("maximum", [None, lambda mine: mine], ids=["none", "one process"])
def test_a_state_stays_as_it_was_taken(maximum: Callable[[Tensor], Tensor] | None) -> None:
    history = remembered(learned(10))
    history.observe(torch.tensor([2]), torch.tensor([9.0]))
    saved = history.state_dict(maximum)
    before = {name: torch.as_tensor(value).clone() for name, value in saved.items()}
    history.observe(torch.tensor([3]), torch.tensor([8.0]))
    history.fold()
    assert all(torch.equal(torch.as_tensor(saved[name]), value) for name, value in before.items())


def test_four_bytes_a_sample_and_four_for_the_running_epoch() -> None:
    history = SignificanceHistory(1000)
    held = [value for value in vars(history).values() if isinstance(value, Tensor)]
    assert sum(t.numel() * t.element_size() for t in held) == 8 * 1000
    plan = plan_epoch(history, torch.arange(1000), epoch=0, count=400, selector=SampleSelector(weighting="none"))
    assert plan.state_dict()["indices"].element_size() == 4
    assert torch.equal(EpochPlan.from_state_dict(plan.state_dict()).indices, plan.indices)


@settings(deadline=None, max_examples=500)
@given(
    batches=st.integers(1, 60),
    rest=st.integers(0, 63),
    rate=st.floats(0.01, 1),
    batch_size=st.sampled_from([1, 2, 7, 64]),
    processes=st.sampled_from([1, 2, 3]),
    drop_last=st.booleans(),
)
def test_planned_count(batches: int, rest: int, rate: float, batch_size: int, processes: int, drop_last: bool) -> None:
    each = batches * batch_size + (0 if drop_last else rest % batch_size)
    offered = each * processes
    count = planned_count(offered, rate, batch_size=batch_size, processes=processes, drop_last=drop_last)
    assert 1 <= count <= offered
    assert count % processes == 0
    last = count // processes % batch_size
    if drop_last:
        assert last == 0
        assert abs(count - rate * offered) <= max(batch_size * processes / 2, batch_size * processes - rate * offered)
    else:
        least = min(8, max(2, batch_size // 8)) if count > batch_size * processes else 2
        assert last == 0 or last >= least or batch_size == 1 or count == offered, "BatchNorm"
        exact = abs(count - rate * offered) <= 0.005 * rate * offered + 1e-6
        assert exact or abs(count - rate * offered) <= 5 * processes, "within half a per cent, or half of the fewest"


@pytest.mark.parametrize(
    ("offered", "rate", "batch_size", "processes", "drop_last", "expected"),
    [
        (50_000, 0.4, 256, 1, False, 19_968),  # 78 whole batches instead of 78.1
        (50_000, 0.4, 256, 1, True, 19_968),
        (1000, 0.4, 64, 1, False, 400),  # whole batches would move the rate by 4 %
        (1000, 0.4, 64, 1, True, 384),
        (1000, 0.257, 64, 1, False, 256),
        (1000, 0.1933, 64, 1, False, 192),  # not 193 = 3 * 64 + 1
        (1000, 0.198, 64, 1, False, 200),  # not 198 = 3 * 64 + 6
        (1000, 0.2, 64, 1, False, 200),  # 3 * 64 + 8
        (1000, 0.21, 16, 1, False, 210),  # 13 * 16 + 2
        (1000, 0.21, 32, 1, False, 210),  # 6 * 32 + 18
        (1000, 0.195, 32, 1, False, 196),  # not 195 = 6 * 32 + 3
        (1000, 0.193, 64, 1, False, 192),
        (1000, 0.4, 64, 2, False, 400),
        (10, 0.01, 64, 1, False, 2),
        (1, 0.4, 64, 1, False, 1),
        (640, 0.01, 64, 1, True, 64),
    ],
)
def test_planned_counts_by_hand(
    offered: int, rate: float, batch_size: int, processes: int, drop_last: bool, expected: int
) -> None:
    assert planned_count(offered, rate, batch_size=batch_size, processes=processes, drop_last=drop_last) == expected


def test_fewest_samples() -> None:
    assert planned_count(1000, 0.1, batch_size=64, min_selected=300) == 300
    assert planned_count(1000, 0.1, batch_size=64, min_selected=0.5) == 500
