"""Plans of data sets too large to sort, against those that are sorted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ast.core import large_plan
from lightning_ast.core.gate import floor_for, keep_probability, lift_zeros
from lightning_ast.core.history import SignificanceHistory, plan_epoch
from lightning_ast.core.large_plan import histogram_of, largest, rate_of_many, sampled, threshold_of
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.threshold import rate_at_coverage, solve_threshold

SIZE = 20_000


def drawn(kind: str) -> Tensor:
    """Scores of several forms, as networks give them and as they do not."""
    generator = torch.Generator().manual_seed(0)
    exponential = torch.empty(SIZE).exponential_(generator=generator)
    return {
        "exponential": exponential,
        "equal": torch.ones(SIZE),
        "half of them 0": exponential.where(exponential > exponential.median(), torch.zeros(())),
        "few large": torch.empty(SIZE).log_normal_(0, 3, generator=generator),
        "many unseen": exponential.clamp_max(0.5),
    }[kind]


KINDS = ("exponential", "equal", "half of them 0", "few large", "many unseen")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_plan, "_BLOCK", 3_000)


@each_kind
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_the_largest_are_those_of_topk(kind: str, rate: float) -> None:
    scores, count = lift_zeros(drawn(kind)), int(rate * SIZE)
    positions, least = largest(drawn(kind), count)
    assert (positions.diff() > 0).all()
    torch.testing.assert_close(scores[positions].sort().values, scores.topk(count, sorted=True).values.flip(0))
    assert least == pytest.approx(float(scores[positions].min()))


def test_equal_scores_are_taken_from_all_over_the_data_set() -> None:
    positions, _ = largest(torch.ones(SIZE), SIZE // 4)
    assert (positions.diff() == 4).all()


@each_kind
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_a_draw_keeps_the_count_and_the_probabilities(kind: str, rate: float) -> None:
    scores, count, floor = drawn(kind), int(rate * SIZE), floor_for(rate)
    solved = float(solve_threshold(scores, rate, "soft", floor=floor))
    guess = threshold_of(histogram_of(scores), rate, floor=floor)
    assert guess == pytest.approx(solved, rel=4e-3)
    draws = torch.zeros(SIZE)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        kept, used = sampled(scores, count, guess, floor=floor, exponent=0.5, generator=generator)
        assert kept.indices.numel() == count
        assert (kept.indices.diff() > 0).all()
        draws[kept.indices] += 1 / 20
    probability = keep_probability(lift_zeros(scores.double()), solved, "soft", floor=floor)
    parts = [part.mean() for part in draws[probability.argsort()].split(SIZE // 10)]
    expected = [part.mean() for part in probability.sort().values.float().split(SIZE // 10)]
    torch.testing.assert_close(torch.stack(parts), torch.stack(expected), rtol=0.02, atol=0.01)
    assert kept.weights is not None
    torch.testing.assert_close(kept.weights, probability[kept.indices] ** -0.5, rtol=5e-3, atol=0)
    assert used <= guess


@each_kind
@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_the_rate_to_cover(kind: str, gate: str) -> None:
    for coverage in (0.5, 0.9, 1.0):
        exact = rate_at_coverage(drawn(kind), coverage, gate)  # type: ignore[arg-type]
        assert rate_of_many(drawn(kind), coverage, gate, floor=0.01) == pytest.approx(exact, rel=4e-3, abs=2 / SIZE)  # type: ignore[arg-type]


@each_kind
def test_histograms_of_parts_add_up(kind: str) -> None:
    parts = sum(histogram_of(part) for part in drawn(kind).split(777))
    torch.testing.assert_close(torch.from_numpy(parts), torch.from_numpy(histogram_of(drawn(kind))))


@pytest.mark.parametrize(("gate", "weighting"), [("soft", "unbiased"), ("soft", "none"), ("topk", "none")])
def test_a_large_plan_is_like_one_that_is_sorted(gate: str, weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = drawn("exponential")
    scores[5] = torch.inf
    history = SignificanceHistory(SIZE)
    history.observe(torch.arange(100, SIZE), scores[100:])
    history.fold()
    draws = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
    plans = []
    for limit in (large_plan.MANY, 1000):
        monkeypatch.setattr("lightning_ast.core.selector.MANY", limit)
        selector = SampleSelector(gate=gate, weighting=weighting)  # type: ignore[arg-type]
        plans.append((plan_epoch(history, draws, epoch=1, count=8_000, selector=selector), selector))
    (exact, by_sort), (large, by_histogram) = plans
    assert large.indices.numel() == exact.indices.numel() == large.indices.unique().numel() == 8_000
    assert by_histogram.coverage == pytest.approx(by_sort.coverage, abs=5e-3)
    assert float(by_histogram.last_threshold) == pytest.approx(float(by_sort.last_threshold), rel=5e-3)  # type: ignore[arg-type]
    if gate == "topk":
        assert set(large.indices.tolist()) == set(exact.indices.tolist())
    if weighting != "none":
        assert large.weights is not None
        assert exact.weights is not None
        assert float(large.weights.mean()) == pytest.approx(float(exact.weights.mean()), rel=0.02)
    places = torch.empty(SIZE, dtype=torch.long).scatter_(0, draws, torch.arange(SIZE))[large.indices]
    assert (places.diff() > 0).all(), "in the order of the draws"


@pytest.mark.parametrize("missing", [False, True])
def test_draws_of_each_sample_once_need_no_sort(missing: bool) -> None:
    """A permutation takes another way than draws with repeats: the same samples are chosen where both say the same."""
    history = SignificanceHistory(SIZE)
    history.observe(torch.arange(SIZE), drawn("exponential"))
    history.fold()
    draws = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
    if missing:
        draws = torch.where(draws == 3, torch.tensor(4), draws)
    plan = plan_epoch(history, draws, epoch=1, count=8_000, selector=SampleSelector(gate="topk", weighting="none"))
    scores = drawn("exponential")[plan.indices]
    torch.testing.assert_close(scores.sort().values, drawn("exponential")[draws].topk(8_000).values.flip(0))
