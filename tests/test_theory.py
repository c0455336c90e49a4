"""The formulas of docs/theory.md, each checked with numbers; a test has the name that the page gives its formula."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core import GradientGate, SampleSelector, keep_rows
from lightning_ast.core.gate import FLOOR, GateName, Weighting, coverage_of, drawn, keep_probability, select
from lightning_ast.core.significance import el2n
from lightning_ast.core.threshold import rate_at_coverage, solve_threshold

PAGE = (Path(__file__).parent.parent / "docs" / "theory.md").read_text()
EXPONENTS: dict[Weighting, float] = {"none": 0.0, "sqrt": 0.5, "unbiased": 1.0}
EACH_WEIGHTING = pytest.mark.parametrize("weighting", EXPONENTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(size: int, *, seed: int = 0) -> Tensor:
    """Gradients ``(B, 5)`` of samples, some of which are much larger than others; double precision."""
    rows = torch.randn(size, 5, generator=generator(seed), dtype=torch.float64)
    return rows * torch.rand(size, 1, generator=generator(seed + 1), dtype=torch.float64).square()


def soft(significance: Tensor, rate: float, floor: float = 0.0) -> Tensor:
    """The keep-probabilities of the soft gate at an activation rate."""
    threshold = solve_threshold(significance, rate, "soft", floor=floor)
    return keep_probability(significance, threshold, "soft", floor=floor)


def subsets(probability: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Every outcome of independent draws, with its probability."""
    for kept in itertools.product((False, True), repeat=len(probability)):
        mask = torch.tensor(kept)
        yield mask, float(torch.where(mask, probability, 1 - probability).prod())


# ------------------------------------------------------------------ the score


class Recording(SampleSelector):
    """Keeps the significance that the gate has measured."""

    def select(self, significance: Tensor, **kwargs: object) -> object:
        self.significance = significance.clone()
        return super().select(significance, **kwargs)


def test_the_gradient_score_is_el2n() -> None:
    net, x, labels = nn.Linear(6, 4), torch.randn(8, 6), torch.randint(0, 4, (8,))
    selector = Recording(target_activation_rate=0.5)
    gate = GradientGate(selector)
    with gate.trace((x, labels)):
        loss = F.cross_entropy(net(x), labels)
    gate.open(loss, batch_size=8)
    loss.backward()
    logits = net(x).detach()
    error = logits.softmax(1) - F.one_hot(labels, 4)
    torch.testing.assert_close(selector.significance, error.norm(dim=1))
    torch.testing.assert_close(selector.significance, el2n(torch.zeros(8), logits, None, labels))


def test_the_norm_at_a_linear_layer() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(8, 6)
    out = layer(x)
    losses = F.cross_entropy(out, torch.randint(0, 4, (8,)), reduction="none")
    rows = torch.autograd.grad(losses.sum(), out, retain_graph=True)[0]
    for i in range(8):
        weight = torch.autograd.grad(losses[i], layer.weight, retain_graph=True)[0]
        assert float(weight.norm()) == pytest.approx(float(rows[i].norm() * x[i].norm()), rel=1e-4)


# ------------------------------------------------------------------ what the gradient estimates


@EACH_WEIGHTING
def test_the_gradient_of_a_sparse_step(weighting: Weighting) -> None:
    net, x = nn.Linear(5, 1, bias=False).double(), torch.randn(16, 5, dtype=torch.float64)
    gate = GradientGate(SampleSelector(target_activation_rate=0.5, weighting=weighting), execution="mask")
    with gate.trace(x):
        loss = net(x).square().mean()
    gate.open(loss, batch_size=16)
    loss.backward()
    kept = gate.selection
    w = torch.ones(len(kept.indices)).double() if kept.weights is None else kept.weights.double()
    each = 2 * net(x).detach() * x  # the gradient of each sample's loss
    d = 16 if weighting == "unbiased" else w.sum()
    torch.testing.assert_close(net.weight.grad[0], (w[:, None] * each[kept.indices]).sum(0) / d)


@EACH_WEIGHTING
def test_the_expected_weight_of_a_sample(weighting: Weighting) -> None:
    significance, draws, rng = gradients(12).norm(dim=1), 4000, generator()
    threshold = solve_threshold(significance, 0.5, "soft", floor=0.1)
    p = keep_probability(significance, threshold, "soft", floor=0.1)
    total = torch.zeros(12, dtype=torch.float64)
    for _ in range(draws):
        kept = select(
            significance,
            threshold,
            gate="soft",
            rate=0.5,
            weighting=weighting,
            min_selected=1,
            generator=rng,
            floor=0.1,
        )
        total.index_add_(
            0, kept.indices, torch.ones(len(kept.indices)).double() if kept.weights is None else kept.weights
        )
    a = EXPONENTS[weighting]
    error = (p * (1 - p)).sqrt() * p**-a / draws**0.5
    assert bool(((total / draws - p ** (1 - a)).abs() <= 4 * error + 1e-9).all())


def test_the_backward_is_linear_so_mask_is_unbiased() -> None:
    """With BatchNorm in the network: exactly so with its exact backward, not with the one over the selected rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    first = net[0].weight

    def gradient(indices: Tensor, factors: Tensor, batchnorm: str) -> Tensor:
        losses = (net(x) - x[:, :1]).square().squeeze(1)
        return torch.autograd.grad(keep_rows(losses, indices, factors, batchnorm=batchnorm).mean(), first)[0]

    dense = torch.autograd.grad((net(x) - x[:, :1]).square().mean(), first)[0]
    p = torch.ones(20, dtype=torch.float64)
    p[:3] = torch.tensor([0.3, 0.6, 0.8])  # the others are kept for certain, so that there are few outcomes
    for batchnorm, is_equal in (("exact", True), ("selected", False)):
        mean = torch.zeros_like(dense)
        for mask, chance in subsets(p[:3]):
            indices = torch.cat([mask, torch.ones(17, dtype=torch.bool)]).nonzero().squeeze(1)
            mean += chance * gradient(indices, 1 / p[indices], batchnorm)
        assert torch.allclose(mean, dense, rtol=1e-9, atol=1e-12) == is_equal


# ------------------------------------------------------------------ the noise of the draw


def test_the_variance_of_independent_draws() -> None:
    g = gradients(8)
    p = soft(g.norm(dim=1), 0.5, floor=0.05)
    mean = g.mean(0)
    exact = sum(
        chance * float(((g / p[:, None])[mask].sum(0) / 8 - mean).square().sum()) for mask, chance in subsets(p)
    )
    formula = float(((1 - p) / p * g.square().sum(1)).sum()) / 8**2
    assert exact == pytest.approx(formula, rel=1e-9)


def test_the_variance_of_the_systematic_draw() -> None:
    g, rng = gradients(40), generator()
    p = soft(g.norm(dim=1), 0.5, floor=0.05)
    w = g / p[:, None] / 40
    errors = torch.stack([w[drawn(p.numpy(), rng)].sum(0) - g.mean(0) for _ in range(8000)])
    ratio = g / p[:, None]
    common = ((p * (1 - p))[:, None] * ratio).sum(0) / (p * (1 - p)).sum()
    formula = float((p * (1 - p) * (ratio - common).square().sum(1)).sum()) / 40**2
    independent = float(((1 - p) / p * g.square().sum(1)).sum()) / 40**2
    assert float(errors.square().sum(1).mean()) == pytest.approx(formula, rel=0.1)
    assert formula < independent


def test_the_count_of_the_systematic_draw() -> None:
    p, rng = soft(gradients(30).norm(dim=1), 0.4), generator()
    counts = [len(drawn(p.numpy(), rng)) for _ in range(500)]
    assert max(abs(count - float(p.sum())) for count in counts) < 1


def test_the_largest_weight() -> None:
    significance = torch.cat([torch.zeros(50), torch.ones(50)]).double()
    for weighting, most in (("none", 1.0), ("sqrt", 10.0), ("unbiased", 100.0)):
        seen = 0.0
        for seed in range(40):
            kept = select(
                significance, 1.0, gate="soft", rate=0.5, weighting=weighting, min_selected=1, generator=generator(seed)
            )
            seen = max(seen, 1.0 if kept.weights is None else float(kept.weights.max()))
        assert seen == pytest.approx(most)
    assert pytest.approx(99) == (1 - FLOOR) / FLOOR


def test_the_soft_gate_has_the_least_variance() -> None:
    norms = gradients(20).norm(dim=1)
    best = soft(norms, 0.5)
    assert 0 < int((best == 1).sum()) < 20  # some are capped, some are not

    def noise(p: Tensor) -> float:
        return float((norms.square() / p).sum())

    for seed in range(300):
        other = best * torch.randn(20, generator=generator(seed), dtype=torch.float64).mul(0.3).exp()
        for _ in range(50):  # back to the same expected count, none above 1
            other = (other * best.sum() / other.sum()).clamp(max=1)
        assert noise(other) >= noise(best)
    assert noise(torch.full_like(best, 0.5)) > noise(best)


# ------------------------------------------------------------------ another objective


def test_the_soft_gate_without_weights_descends_the_squared_losses() -> None:
    weights = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(10, 5, dtype=torch.float64)
    losses = (x @ weights).cosh()
    largest = float(losses.detach().max())
    p = keep_probability(losses.detach(), 2 * largest, "soft", floor=0.0)  # none is capped
    expected = torch.autograd.grad((p * losses).sum(), weights, retain_graph=True)[0]
    squares = torch.autograd.grad((losses.square() / 2).sum(), weights)[0]
    torch.testing.assert_close(expected, squares / (2 * largest))


def test_the_hard_cut_descends_the_average_top_k_loss() -> None:
    weights = torch.randn(5, dtype=torch.float64, requires_grad=True)
    losses = (torch.randn(10, 5, dtype=torch.float64) @ weights).cosh()
    kept = select(
        losses.detach(), 0.0, gate="topk", rate=0.3, weighting="none", min_selected=1, generator=generator()
    ).indices
    ours = torch.autograd.grad(losses[kept].mean(), weights, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(losses.topk(3).values.mean(), weights)[0])


@pytest.mark.parametrize(
    ("gate", "a", "end"), [("soft", 1.0, 0.25), ("soft", 0.0, 1 / (1 + math.sqrt(3))), ("topk", 0.0, 0.5)]
)
def test_selection_moves_the_minimum(gate: GateName, a: float, end: float) -> None:
    """The expected step for the samples 0, 0, 0 and 1 with the loss (x - sample)^2 / 2."""
    samples, x = torch.tensor([0.0, 0.0, 0.0, 1.0]).double(), torch.tensor(0.3).double()
    for _ in range(400):
        g = x - samples
        if gate == "topk":
            w = torch.zeros(4).double().index_fill(0, g.abs().topk(2).indices, 1.0)
        else:
            w = soft(g.abs(), 0.25) ** (1 - a)
        x = x - 0.05 * (w * g).sum() / w.sum()
    assert float(x) == pytest.approx(end, abs=0.03 if gate == "topk" else 1e-6)


@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_what_fits_every_sample_stays_the_goal(gate: GateName) -> None:
    x, goal = torch.randn(30, 3, generator=generator()).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    weights = torch.zeros(3).double()
    for _ in range(600):
        error = x @ (weights - goal)
        g = error[:, None] * x
        norms = g.norm(dim=1)
        p = keep_probability(norms, solve_threshold(norms, 0.4, gate, floor=0.0), gate, floor=0.0)
        weights = weights - 0.1 * (p[:, None] * g).sum(0) / p.sum()
    torch.testing.assert_close(weights, goal, atol=1e-3, rtol=0)


# ------------------------------------------------------------------ coverage


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.97])
def test_the_coverage_of_the_soft_gate(coverage: float) -> None:
    s = gradients(50).norm(dim=1)
    threshold = solve_threshold(s, coverage, "soft", floor=FLOOR, share_of="significance")
    p = keep_probability(s, threshold, "soft", floor=FLOOR)
    assert float((p * s).sum() / s.sum()) == pytest.approx(coverage, abs=1e-9)
    assert rate_at_coverage(s, coverage, "soft") == pytest.approx(float(p.mean()), abs=1e-9)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.97])
def test_the_coverage_of_the_hard_cut(coverage: float) -> None:
    s = gradients(50).norm(dim=1)
    carried = s.sort(descending=True).values.cumsum(0) / s.sum()
    fewest = 1 + int((carried < coverage).sum())
    assert rate_at_coverage(s, coverage, "topk") == fewest / 50
    assert fewest / 50 < rate_at_coverage(s, coverage, "soft") + 1 / 50


def test_the_hard_cut_covers_the_most() -> None:
    s = gradients(50).norm(dim=1)
    most = coverage_of(s, s.topk(20).indices)
    for p in (soft(s, 0.4), torch.full_like(s, 0.4), soft(s.sqrt(), 0.4), soft(s.square(), 0.4)):
        assert float(p.sum()) == pytest.approx(20, abs=1e-6)
        assert float((p * s).sum() / s.sum()) <= most


def test_the_rate_that_a_coverage_needs() -> None:
    s = 1 + torch.rand(200, generator=generator(), dtype=torch.float64)  # so even that none is capped
    variation = float(s.var(correction=0)) / float(s.mean()) ** 2
    assert rate_at_coverage(s, 0.5, "soft", floor=0.0) == pytest.approx(0.5 / (1 + variation), abs=1e-9)
    assert rate_at_coverage(torch.ones(10), 0.9, "soft") == pytest.approx(0.9)
    assert rate_at_coverage(torch.ones(10), 0.9, "topk") == pytest.approx(0.9)


def test_the_scale_of_the_significance_does_not_matter() -> None:
    s = gradients(50).norm(dim=1)
    for share_of in ("samples", "significance"):
        one = solve_threshold(s, 0.6, "soft", share_of=share_of)
        assert float(solve_threshold(1000 * s, 0.6, "soft", share_of=share_of)) == pytest.approx(1000 * float(one))


@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_coverage_bounds_the_bias(gate: GateName) -> None:
    for seed in range(20):
        g = gradients(40, seed=seed)
        s = g.norm(dim=1)
        threshold = solve_threshold(s, 0.9, gate, floor=0.0, share_of="significance")
        p = keep_probability(s, threshold, gate, floor=0.0)
        bias = (p[:, None] * g).sum(0) / 40 - g.mean(0)
        covered = float((p * s).sum() / s.sum())
        assert float(bias.norm()) <= (1 - covered) * float(s.mean()) + 1e-9
        assert covered >= 0.9 - 1e-9
        mean_of_kept = (p[:, None] * g).sum(0) / p.sum()
        torch.testing.assert_close(mean_of_kept, (40 / p.sum()) * (g.mean(0) + bias))


# ------------------------------------------------------------------ convergence


@pytest.mark.parametrize(("gate", "a"), [("soft", 1.0), ("soft", 0.0), ("topk", 0.0)])
def test_the_bound_on_the_mean_squared_gradient(gate: GateName, a: float) -> None:
    """For f(x) = mean |x - a_i|^2 / 2, which has L = 1, divided by B, with independent draws."""
    targets, step, steps, runs = gradients(20, seed=3), 0.3, 40, 60
    rng, squares, bias, noise = generator(), [], [], []
    start = torch.full((5,), 2.0).double()
    for _ in range(runs):
        x = start
        for _ in range(steps):
            g = x - targets
            s = g.norm(dim=1)
            p = keep_probability(s, solve_threshold(s, 0.5, gate, floor=0.05), gate, floor=0.05)
            w = torch.where(p > 0, p.clamp_min(1e-9) ** -a, torch.zeros_like(p))
            squares.append(float(g.mean(0).square().sum()))
            bias.append(float(((p * w - 1)[:, None] * g).mean(0).square().sum()))
            noise.append(float((p * (1 - p) * w.square() * g.square().sum(1)).sum()) / 20**2)
            z = (torch.rand(20, generator=rng, dtype=torch.float64) < p).double()
            x = x - step * ((z * w)[:, None] * g).mean(0)

    def f(x: Tensor) -> float:
        return float((x - targets).square().sum(1).mean()) / 2

    gap = f(start) - f(targets.mean(0))
    mean = {name: sum(each) / len(each) for name, each in (("bias", bias), ("noise", noise), ("squares", squares))}
    assert mean["squares"] <= 2 * gap / (step * steps) + mean["bias"] + step * mean["noise"]


# ------------------------------------------------------------------ BatchNorm in partial


def test_the_backward_of_batchnorm_over_the_selected_rows() -> None:
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(3).double(), torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    nn.init.uniform_(norm.weight)
    along, rows = torch.randn(40, 3, dtype=torch.float64), torch.arange(0, 40, 2)
    loss = keep_rows((norm(x) * along).sum(1), rows).sum()
    loss.backward()
    g, own = along[rows], x.detach()[rows]
    spread = (own.var(0, correction=0) + norm.eps).sqrt()
    normalised = (own - own.mean(0)) / spread
    deviation = (x.detach().var(0, correction=0) + norm.eps).sqrt()
    expected = norm.weight / deviation * (g - g.mean(0) - normalised * (g * normalised).mean(0))
    torch.testing.assert_close(x.grad[rows], expected.detach())
    assert int(x.grad.abs().sum(1).count_nonzero()) == 20  # the other rows have none
    torch.testing.assert_close(x.grad.sum(0), torch.zeros(3).double())
    full = (x.detach() - x.detach().mean(0)) / deviation
    torch.testing.assert_close(norm.weight.grad, (g * full[rows]).sum(0))


def test_the_backward_of_batchnorm_over_all_rows_is_exact() -> None:
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(3).double(), torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    losses = (norm(x).sin()).sum(1)
    ours = torch.autograd.grad(keep_rows(losses, torch.arange(40)).sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(losses.sum(), x)[0])


# ------------------------------------------------------------------ the page


def test_every_formula_of_the_page_has_its_check() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    here = {name for name in globals() if name.startswith("test_")} - {
        test_every_formula_of_the_page_has_its_check.__name__
    }
    assert named == here
