"""Losses and gradients of a selection, against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_ast.core.execution import cost_share, denominator, report_full_loss, selected_loss
from lightning_ast.core.gate import Selection, keep_probability, select, solve_threshold

SUMS = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
COUNTS = torch.tensor([1.0, 2.0, 1.0, 1.0])
KEPT = Selection(torch.tensor([1, 3]), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("none", (2 + 8) / (2 + 1)),
        ("sqrt", (2 * 2 + 3 * 8) / (2 * 2 + 3 * 1)),
        ("unbiased", (2 * 2 + 3 * 8) / 5),
    ],
)
def test_the_three_weightings(weighting: str, expected: float) -> None:
    selection = Selection(KEPT.indices) if weighting == "none" else KEPT
    rows = SUMS[selection.indices]
    divisor = denominator(COUNTS[selection.indices], selection, weighting, total_count=COUNTS.sum())
    assert selected_loss(rows, selection, divisor).item() == pytest.approx(expected)


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
def test_a_sum_is_the_mean_times_the_count(weighting: str) -> None:
    """So that a step that divides its sum by the batch size trains as one that averages."""
    selection = Selection(KEPT.indices) if weighting == "none" else KEPT
    ones, total = torch.ones(2), torch.tensor(4.0)
    rows = SUMS[selection.indices]
    mean = selected_loss(rows, selection, denominator(ones, selection, weighting, total_count=total))
    summed = selected_loss(rows, selection, denominator(ones, selection, weighting, total_count=total, mean=False))
    assert summed.item() == pytest.approx(4 * mean.item())


def test_unselected_rows_get_exactly_no_gradient() -> None:
    rows = SUMS[KEPT.indices]
    loss = selected_loss(rows, KEPT, denominator(COUNTS[KEPT.indices], KEPT, "sqrt", total_count=COUNTS.sum()))
    (gradient,) = torch.autograd.grad(loss, SUMS)
    assert gradient.tolist() == pytest.approx([0, 2 / 7, 0, 3 / 7])


def test_reported_value_is_the_full_loss() -> None:
    selected, full = SUMS[:2].sum(), SUMS.mean()
    reported = report_full_loss(selected, full)
    assert reported.item() == full.item()
    (gradient,) = torch.autograd.grad(reported, SUMS)
    assert gradient.tolist() == [1, 1, 0, 0]


def test_unbiased_weights_have_the_dense_gradient_on_average() -> None:
    """Mean over 4,000 draws within 5 standard errors of the dense gradient, in every component."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 6, generator=g), torch.randint(0, 4, (32,), generator=g)
    weight = torch.randn(4, 6, generator=g, requires_grad=True)
    losses = F.cross_entropy(x @ weight.t(), y, reduction="none")
    (target,) = torch.autograd.grad(losses.mean(), weight, retain_graph=True)
    per_sample = torch.stack([torch.autograd.grad(one, weight, retain_graph=True)[0] for one in losses])
    significance = losses.detach()
    counts = torch.ones(32)
    threshold = solve_threshold(significance, 0.3, "soft")
    assert keep_probability(significance, threshold, "soft").mean().item() == pytest.approx(0.3, rel=1e-4)
    draws = []
    for seed in range(4000):
        selection = select(
            significance,
            threshold,
            gate="soft",
            rate=0.3,
            weighting="unbiased",
            min_selected=1,
            generator=torch.Generator().manual_seed(seed),
        )
        divisor = denominator(counts[selection.indices], selection, "unbiased", total_count=counts.sum())
        draws.append((per_sample[selection.indices] * selection.weights.view(-1, 1, 1)).sum(0) / divisor)
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - target).abs()
    assert (error <= 5 * stacked.std(0) / 4000**0.5 + 1e-7).all()


@pytest.mark.parametrize(("mode", "expected"), [("mask", 1.0), ("subset", 2.2 / 3), ("partial", 0.6), ("prune", 0.4)])
def test_cost_model(mode: str, expected: float) -> None:
    assert cost_share(mode, 0.4) == pytest.approx(expected)
