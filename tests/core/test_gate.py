from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ast.core.gate import (
    FLOOR,
    drawn,
    keep_probability,
    lift_zeros,
    minimum_count,
    select,
    soft_probability,
)
from lightning_ast.core.threshold import ThresholdSolver, solve_threshold


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_keep_probability_against_a_loop() -> None:
    s, threshold = [0.0, 0.005, 0.5, 1.0, 4.0], 2.0
    soft = [min(1.0, max(FLOOR, v / threshold)) for v in s]
    assert keep_probability(torch.tensor(s), threshold, "soft").tolist() == pytest.approx(soft)
    assert keep_probability(torch.tensor(s), 1.0, "threshold").tolist() == [0, 0, 0, 0, 1]
    assert keep_probability(torch.tensor(s), 1.0, "topk").tolist() == [0, 0, 0, 1, 1]


values = st.lists(st.floats(0, 1e4), min_size=4, max_size=64)


@settings(max_examples=200)
@given(values, st.floats(0.02, 0.98), st.floats(-9, 9))
def test_solve_threshold_hits_the_rate(significance: list[float], rate: float, exponent: float) -> None:
    s = torch.tensor(significance, dtype=torch.float64) * 10**exponent
    s = lift_zeros(s)
    p = keep_probability(s, solve_threshold(s, rate, "soft"), "soft")
    assert p.mean().item() == pytest.approx(rate, rel=1e-6)


def test_solve_threshold_of_hard_gates() -> None:
    s = torch.tensor([5.0, 1.0, 3.0, 2.0])
    assert 2.0 < solve_threshold(s, 0.5, "threshold").item() < 3.0
    assert keep_probability(s, solve_threshold(s, 0.25, "topk"), "topk").tolist() == [1, 0, 0, 0]


def test_the_draw_keeps_each_with_its_probability() -> None:
    p = torch.tensor([0.05, 0.9, 0.3, 1.0, 0.5, 0.25])
    draws = 20_000
    counts = torch.zeros(6)
    sizes = set()
    g = generator(1)
    for _ in range(draws):
        kept = drawn(p.numpy(), g)
        counts[kept] += 1
        sizes.add(len(kept))
    assert sizes == {3}, "the probabilities sum to 3: the count never varies"
    for share, probability in zip((counts / draws).tolist(), p.tolist()):
        bound = 4.5 * math.sqrt(max(probability * (1 - probability), 1e-12) / draws)  # 4.5 standard errors
        assert abs(share - probability) <= bound + 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), st.integers(0, 1000))
def test_the_count_of_a_draw_and_certainty(probabilities: list[float], seed: int) -> None:
    p = torch.tensor(probabilities, dtype=torch.float64)
    kept = drawn(p.numpy(), generator(seed))
    assert abs(len(kept) - p.sum().item()) < 1 + 1e-9
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert set((p == 1).nonzero().flatten().tolist()) <= set(kept.tolist()), "certain samples are always kept"
    assert not set((p == 0).nonzero().flatten().tolist()) & set(kept.tolist()), "impossible ones never"


@pytest.mark.parametrize(
    ("batch", "minimum", "expected"), [(64, 2, 2), (64, 0.1, 6), (10, 0.1, 2), (1, 2, 1), (64, 9, 9)]
)
def test_minimum_count(batch: int, minimum: float, expected: int) -> None:
    assert minimum_count(batch, minimum) == expected


def options(**changes: object) -> dict[str, object]:
    base = {"gate": "soft", "rate": 0.5, "weighting": "none", "min_selected": 2, "generator": generator()}
    return {**base, **changes}


def test_threshold_and_topk_keep_the_right_samples() -> None:
    s = torch.tensor([0.1, 0.9, 0.4, 0.8])
    assert select(s, 0.35, **options(gate="threshold")).indices.tolist() == [1, 2, 3]
    assert select(s, 123.0, **options(gate="topk", rate=0.5)).indices.tolist() == [1, 3]


def test_fallback_adds_the_most_significant() -> None:
    s = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0])
    assert select(s, 5.0, **options(gate="threshold")).indices.tolist() == [1, 3]
    assert select(s, 0.85, **options(gate="threshold", min_selected=3)).indices.tolist() == [1, 2, 3]
    assert select(s, 5.0, **options(gate="threshold", min_selected=0.4)).indices.tolist() == [1, 2, 3, 5]
    assert select(torch.zeros(4), 1.0, **options(gate="threshold")).indices.numel() == 2
    probability = keep_probability(s, 1e9, "soft")
    hit = drawn(probability.numpy(), generator()).tolist()
    filled = select(s, 1e9, **options(min_selected=4)).indices.tolist()
    expected = set(hit) | set([i for i in (1, 3, 2, 5, 4, 0) if i not in hit][: 4 - len(hit)])
    assert set(filled) == expected, "what was drawn, and the most significant of the rest"


@pytest.mark.parametrize(("weighting", "exponent"), [("none", 0.0), ("sqrt", 0.5), ("unbiased", 1.0)])
def test_weights(weighting: str, exponent: float) -> None:
    s = torch.rand(32, generator=generator())
    selection = select(s, 1.5, **options(weighting=weighting))
    if weighting == "none":
        assert selection.weights is None
        return
    expected = [max(FLOOR, min(1.0, s[i].item() / 1.5)) ** -exponent for i in selection.indices.tolist()]
    assert selection.weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_own_generator_alone_decides() -> None:
    s = torch.rand(64)
    before = torch.get_rng_state()
    first = select(s, 1.0, **options(generator=generator(7))).indices
    torch.manual_seed(99)
    again = select(s, 1.0, **options(generator=generator(7))).indices
    other = select(s, 1.0, **options(generator=generator(8))).indices
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.set_rng_state(before)
    select(s, 1.0, **options())
    assert torch.equal(torch.get_rng_state(), before), "the global generator is untouched"


def solver_of(significance: torch.Tensor) -> ThresholdSolver:
    return ThresholdSolver(significance, "soft", floor=FLOOR, share_of="samples")


@pytest.mark.parametrize(("rate", "apart"), [(0.5, 8), (0.4, 4), (0.12, 2), (0.04, 1)])
def test_few_counts_are_drawn_at_a_rate(rate: float, apart: int) -> None:
    """Thresholds of a controller, which does not know the next batch, make the counts of 256 samples scatter."""
    random = generator()
    counts = []
    expected = []
    for _ in range(300):
        s = torch.rand(256, generator=random) + 0.01
        threshold = solve_threshold(s, rate, "soft") * (0.8 + 0.4 * float(torch.rand(1, generator=random)))
        expected.append(float(keep_probability(s, threshold, "soft").sum()))
        moved = solver_of(s).with_few_counts(float(threshold), random)
        settings = {"gate": "soft", "rate": rate, "weighting": "none", "min_selected": 2}
        counts.append(len(select(s, moved, generator=random, **settings).indices))
    assert all(count % apart == 0 for count in counts)
    assert sum(counts) == pytest.approx(sum(expected), rel=0.01)
    assert len(set(counts)) <= 12
    assert max(abs(count - mean) for count, mean in zip(counts, expected, strict=True)) < 2 * apart


def test_few_counts_leave_large_shares_and_small_batches_alone() -> None:
    for s, threshold in ((torch.ones(100), 1.01), (torch.rand(16, generator=generator()), 1.0)):
        assert solver_of(s).with_few_counts(threshold, generator()) == threshold


def test_the_soft_gate_on_the_host_is_that_of_tensors_at_every_scale() -> None:
    s = torch.cat([torch.rand(50, generator=generator()), torch.tensor([0.0, 1e-38, 1e30, 3e38])])
    for threshold in (0.0, 1e-30, 0.3, 1e30, 1e300):
        kept = torch.from_numpy(soft_probability(s.numpy(), threshold, FLOOR))
        assert torch.equal(kept, keep_probability(s, threshold, "soft", floor=FLOOR))
