"""A target coverage: thresholds against bisection, and the coverage that a selector holds on simulated streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ast.core.controller import PIController
from lightning_ast.core.gate import FLOOR, coverage_of, keep_probability, lift_zeros
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.threshold import ThresholdSolver, rate_at_coverage, solve_threshold


def covered(s: torch.Tensor, threshold: float, gate: str = "soft") -> float:
    """The expected coverage, as it is defined."""
    return float((keep_probability(lift_zeros(s), threshold, gate) * s).sum() / s.sum())


def bisected(s: torch.Tensor, coverage: float) -> float:
    """The threshold of the soft gate, slowly: the expected coverage falls with it."""
    low, high = 1e-30, float(s.max()) * 1e6
    for _ in range(300):
        middle = (low * high) ** 0.5
        if covered(s, middle) >= coverage:
            low = middle
        else:
            high = middle
    return low


values = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e4)), min_size=1, max_size=40).filter(any)


@settings(max_examples=60, deadline=None)
@given(values, st.floats(0.02, 0.999), st.floats(-9, 9))
def test_the_soft_threshold_is_that_of_bisection(significance: list[float], coverage: float, exponent: float) -> None:
    s = torch.tensor(significance, dtype=torch.float64) * 10**exponent
    solved = solve_threshold(s, coverage, "soft", share_of="significance")
    assert covered(s, float(solved)) == pytest.approx(coverage, rel=1e-7)
    oracle = keep_probability(lift_zeros(s), bisected(s, coverage), "soft")
    assert rate_at_coverage(s, coverage, "soft") == pytest.approx(float(oracle.mean()), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(values, st.floats(0.02, 0.999))
def test_hard_gates_keep_the_fewest_that_carry_the_coverage(significance: list[float], coverage: float) -> None:
    s = torch.tensor(significance, dtype=torch.float64)
    kept = 0
    carried = 0.0
    for value in sorted(significance, reverse=True):
        if carried >= coverage * float(s.sum()) * (1 - 1e-12):
            break
        kept += 1
        carried += value
    assert rate_at_coverage(s, coverage, "topk") == pytest.approx(kept / len(s))
    threshold = float(solve_threshold(s, coverage, "threshold", share_of="significance"))
    last = sorted(significance, reverse=True)[kept - 1]
    assert int((lift_zeros(s) > threshold).sum()) == int((s >= last).sum()), "equal ones are kept together"
    selector = SampleSelector(target_coverage=coverage, gate="topk", min_selected=1)
    selection = selector.select(s)
    assert selection.indices.numel() == (len(s) if kept / len(s) >= 0.95 else kept)
    assert selector.coverage == pytest.approx(coverage_of(s, selection.indices))


@pytest.mark.parametrize("gate", ["soft", "threshold", "topk"])
def test_a_coverage_of_one_keeps_everything(gate: str) -> None:
    s = torch.rand(32)
    assert rate_at_coverage(s, 1.0, gate) == 1.0
    selector = SampleSelector(target_coverage=1, gate=gate)
    assert not selector.selects
    assert selector.select(s).indices.tolist() == list(range(32))
    assert (selector.coverage, selector.last_threshold, selector.is_whole) == (1.0, None, False)


def test_the_scale_of_the_significance_does_not_matter() -> None:
    s = torch.rand(50, generator=torch.Generator().manual_seed(0)) ** 3
    plain = float(solve_threshold(s, 0.8, "soft", share_of="significance"))
    for factor in (2.0**-60, 2.0**60):
        assert float(solve_threshold(s * factor, 0.8, "soft", share_of="significance")) == pytest.approx(plain * factor)


# ---------------------------------------------------------------------- the selector


def stream(kind: str, batch: int, generator: torch.Generator) -> torch.Tensor:
    if kind == "lognormal":  # heavy tail: label noise
        return (1.5 * torch.randn(batch, generator=generator)).exp()
    return torch.rand(batch, generator=generator) ** 3  # most samples learned


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("kind", ["lognormal", "learned"])
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("gate", ["soft", "threshold", "topk"])
def test_the_coverage_is_held(gate: str, coverage: float, kind: str, weighting: str) -> None:
    selector = SampleSelector(target_coverage=coverage, gate=gate, weighting=weighting)
    generator = torch.Generator().manual_seed(1)
    observed = []
    for step in range(250):
        selector.select(stream(kind, 128, generator) * 10 ** (step / 125))  # under drift
        observed.append(selector.coverage)
    assert sum(observed[100:]) / 150 == pytest.approx(coverage, rel=0.02)


def test_the_originals_controller_moves_its_threshold_by_the_coverage() -> None:
    controller = PIController(preset="original", kp=0.5, ki=0.01, initial_threshold=0.6)
    selector = SampleSelector(target_coverage=0.8, gate="threshold", controller=controller)
    generator = torch.Generator().manual_seed(1)
    observed = []
    for _ in range(300):
        selector.select(stream("lognormal", 128, generator))
        observed.append(selector.coverage)
    assert sum(observed[100:]) / 200 == pytest.approx(0.8, rel=0.02)
    assert 0.5 < float(selector.last_threshold) < 10


def test_the_mean_of_the_rate_is_kept_beside_that_of_the_coverage() -> None:
    selector = SampleSelector(target_coverage=0.9)
    generator = torch.Generator().manual_seed(1)
    mean = None
    for _ in range(50):
        selector.select(stream("learned", 64, generator))
        mean = selector.activation_rate if mean is None else mean + 0.1 * (selector.activation_rate - mean)
        assert selector.controller.activation_rate_ema == pytest.approx(mean)
        assert selector.activation_rate == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("gate", ["soft", "threshold", "topk"])
@pytest.mark.parametrize(
    ("batch", "whole"),
    [
        (torch.zeros(64), False),
        (torch.full((64,), 3.0), False),
        (torch.tensor([2.0]), True),
        (torch.tensor([2.0, 1e-9]), True),  # two are the fewest that are kept
        (torch.cat([torch.ones(1), torch.zeros(63)]), False),
    ],
    ids=["zeros", "equal", "one sample", "two samples", "one counts"],
)
def test_unusual_batches(gate: str, batch: torch.Tensor, whole: bool) -> None:
    """Where all are alike, any of them carry their share, and the soft gate draws as many as the coverage."""
    selector = SampleSelector(target_coverage=0.9, gate=gate)
    kept = selector.select(batch).indices.numel()
    alike = bool((batch == batch[0]).all()) and batch.numel() > 2
    if whole or (alike and gate == "threshold"):  # which keeps all that are equal, or none of them
        assert (kept, selector.is_whole, selector.coverage) == (batch.numel(), True, 1.0)
    elif alike:
        assert kept in ((56, 60) if gate == "soft" else (57, 58))  # the soft gate keeps one of few numbers
        assert selector.coverage == pytest.approx(kept / 64)
    else:
        assert 2 <= kept <= 4
        assert selector.coverage == 1.0


def test_samples_that_are_not_eligible_carry_nothing() -> None:
    s = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 50.0])
    eligible = torch.tensor([True] * 7 + [False])
    selector = SampleSelector(target_coverage=0.75, gate="topk")
    assert selector.select(s, eligible=eligible).indices.numel() == 3
    assert selector.coverage == 0.75
    before = selector.controller.state_dict()
    assert selector.select(s, eligible=torch.zeros(8, dtype=torch.bool)).indices.numel() == 0
    after = selector.controller.state_dict()
    assert selector.coverage == 0.0
    assert {**after, "activation_rate_ema": None} == {**before, "activation_rate_ema": None}, "it teaches nothing"


def test_a_batch_that_needs_nearly_all_of_its_samples_is_kept_whole() -> None:
    even = torch.linspace(1.0, 1.02, 64)
    selector = SampleSelector(target_coverage=0.97)
    selection = selector.select(even)
    assert selection.indices.tolist() == list(range(64))
    assert selection.weights is None
    assert (selector.is_whole, selector.activation_rate, selector.coverage) == (True, 1.0, 1.0)
    assert selector.expected_rate == pytest.approx(0.97, abs=0.002)
    for _ in range(100):
        selector.select(even)
    assert selector.controller.state_dict()["integral"] == 0.0, "whole batches do not wind the controller up"
    selector.select(torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 3)
    assert not selector.is_whole
    assert selector.expected_rate < 0.8


def test_a_high_rate_is_never_taken_for_a_whole_batch() -> None:
    selector = SampleSelector(target_activation_rate=0.97)
    assert selector.select(torch.rand(200)).indices.numel() < 200
    assert not selector.is_whole
    assert selector.expected_rate is None


def test_the_fallback_is_kept() -> None:
    s = torch.cat([torch.ones(1), torch.full((99,), 1e-9)])
    for gate in ("soft", "threshold", "topk"):
        selector = SampleSelector(target_coverage=0.5, gate=gate, min_selected=0.25)
        for _ in range(20):
            assert selector.select(s).indices.numel() == 25


class Ranks:
    """Two processes in one: the other one's values are those that it sent in the same place of its own turn."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.sent: dict[int, torch.Tensor] = {}

    def average(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def mean(value: torch.Tensor) -> torch.Tensor:
            self.sent[rank] = value
            self.barrier.wait(20)
            result = (self.sent[0] + self.sent[1]) / 2
            self.barrier.wait(20)
            return result

        return mean


@pytest.mark.parametrize("gate", ["soft", "threshold"])
def test_processes_hold_the_coverage_of_one_large_batch(gate: str) -> None:
    """The second one's significance is a thirtieth of the first one's, and spread otherwise."""
    ranks = Ranks()
    selectors = [SampleSelector(target_coverage=0.8, gate=gate, rank=rank) for rank in (0, 1)]
    sums: list[list[tuple[float, float, float]]] = [[], []]

    def train(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        for _ in range(150):
            s = stream("learned", 48, generator) / 30 if rank else stream("lognormal", 32, generator)
            kept = selectors[rank].select(s, average=ranks.average(rank)).indices
            assert selectors[rank].coverage == pytest.approx(float(s[kept].sum() / s.sum()))
            sums[rank].append((float(s[kept].sum()), float(s.sum()), float(selectors[rank].last_threshold)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, (0, 1)))
    assert [t for _, _, t in sums[0]] == [t for _, _, t in sums[1]], "one threshold"
    joint = [(a + b) / (c + d) for (a, c, _), (b, d, _) in zip(*sums)]
    assert sum(joint[:50]) / 50 == pytest.approx(0.8, rel=0.03)
    assert sum(joint[50:]) / 100 == pytest.approx(0.8, rel=0.02)
    states = [selector.controller.state_dict() for selector in selectors]
    assert states[0] == states[1]
    mean = 0.8
    for coverage in joint:
        mean += 0.1 * (coverage - mean)
    assert states[0]["held_ema"] == pytest.approx(mean)


@pytest.mark.parametrize("gate", ["soft", "threshold"])
def test_the_threshold_of_processes_is_that_of_their_samples_in_one_batch(gate: str) -> None:
    ranks = Ranks()
    generator = torch.Generator().manual_seed(0)
    batches = [stream("lognormal", 400, generator), stream("learned", 700, generator) * 50]
    both = torch.cat(batches)

    def solve(rank: int) -> torch.Tensor:
        solver = ThresholdSolver(batches[rank], gate, floor=FLOOR, share_of="significance")
        return solver.shared(0.8, solver.threshold(0.8), 0.5, ranks.average(rank))[0]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(solve, (0, 1))
    assert torch.equal(one, other)
    assert covered(both, float(one), gate) == pytest.approx(0.8, rel=0.005)


def test_a_plan_has_a_coverage() -> None:
    s = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 3
    for gate in ("soft", "topk"):
        selector = SampleSelector(target_coverage=0.9, gate=gate)
        count = round(rate_at_coverage(s, 0.9, gate) * 1000)
        kept = selector.plan(s, count=count, epoch=1)
        assert selector.coverage == pytest.approx(float(s[kept.indices].sum() / s.sum()))
        assert selector.coverage == pytest.approx(0.9, rel=0.01)
    selector.plan(s, count=1000, epoch=2)
    assert selector.coverage == 1.0


def test_the_state_continues_exactly() -> None:
    one, other = (SampleSelector(target_coverage=0.8) for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    batches = [stream("learned", 64, generator) for _ in range(40)]
    for batch in batches[:20]:
        one.select(batch)
    one.pass_over()
    other.load_state_dict(one.state_dict())
    for batch in batches[20:]:
        a, b = one.select(batch), other.select(batch)
        assert torch.equal(a.indices, b.indices)
    first = one.state_dict()
    second = other.state_dict()
    assert first.pop("threshold") == second.pop("threshold")
    assert first == second


def test_both_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="got both"):
        SampleSelector(target_activation_rate=0.4, target_coverage=0.9)
    assert SampleSelector().target_activation_rate == 0.4
    assert SampleSelector(target_coverage=0.9).target_activation_rate is None
