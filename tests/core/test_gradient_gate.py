"""The gate in the backward: one selection a batch, whatever the backward calls, and no value of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import EntryFinder, Found
from lightning_ast.core.gradient_gate import BatchGate, Execution, Kept
from tests.core.entries.gating import Parts

B, X, C = 6, 5, 3
KEPT = (0, 2, 5)
both = pytest.mark.parametrize("execution", ["mask", "partial"])


def network(out: int = C) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(X, 7), nn.Tanh(), nn.Linear(7, out)).double()


def points() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, X, dtype=torch.float64), torch.randint(0, C, (B,))


def proved(batch: Any, loss_of: Callable[[], Tensor]) -> tuple[Tensor, Found]:
    trace = SampleTrace(batch, B)
    with trace:
        loss = loss_of()
    return loss, EntryFinder().prove(loss, B, trace)


def gate_of(kept: Kept | None, execution: Execution, seen: list[Tensor] | None = None) -> BatchGate:
    return BatchGate(B, lambda norms: (seen.append(norms) if seen is not None else None, kept)[1], execution=execution)


def kept_rows(*indices: int, **options: Any) -> Kept:
    return Kept(torch.tensor(indices or KEPT), **options)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def of_samples(model: nn.Module, terms: Callable[[nn.Module], Tensor], factors: Tensor | None = None) -> list[Tensor]:
    """Gradients of the kept samples' share in a mean of ``(B,)`` terms."""
    model = copy.deepcopy(model)
    weights = torch.zeros(B, dtype=torch.float64)
    weights[list(KEPT)] = 1.0 if factors is None else factors
    (terms(model) * weights).mean().backward()
    return gradients(model)


# ------------------------------------------------------------------ the decision


@both
def test_for_softmax_cross_entropy_the_norm_is_el2n(execution: Execution) -> None:
    model, (x, y) = network(), points()
    z: list[Tensor] = []
    loss, found = proved((x, y), lambda: F.cross_entropy((z.append(model(x)), z[0])[1], y))
    seen: list[Tensor] = []
    gate = gate_of(kept_rows(), execution, seen)
    gate.open(loss, found.entries)
    loss.backward()
    el2n = (z[0].softmax(1) - F.one_hot(y, C)).norm(dim=1)
    torch.testing.assert_close(seen[0] * B, el2n)
    assert gate.decided
    assert gate.kept is not None


@both
def test_watching_changes_nothing(execution: Execution) -> None:
    model, (x, y) = network(), points()
    F.cross_entropy(model(x), y).backward()
    plain = gradients(model)
    model.zero_grad()
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    seen: list[Tensor] = []
    gate = gate_of(None, execution, seen)
    gate.open(loss, found.entries)
    loss.backward()
    assert len(seen) == 1
    assert all(torch.equal(left, right) for left, right in zip(gradients(model), plain, strict=True))


@both
def test_a_selection_made_elsewhere_is_used(execution: Execution) -> None:
    model, (x, y) = network(), points()
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    seen: list[Tensor] = []
    gate = gate_of(None, execution, seen)
    gate.settle(kept_rows())
    gate.open(loss, found.entries)
    loss.backward()
    assert not seen
    assert_close(gradients(model), of_samples(model, lambda m: F.cross_entropy(m(x), y, reduction="none")))


@both
def test_nothing_kept_stops_the_gradient(execution: Execution) -> None:
    model, (x, y) = network(), points()
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    gate = gate_of(Kept(torch.zeros(0, dtype=torch.long)), execution)
    gate.open(loss, found.entries)
    loss.backward()
    assert all(not gradient.any() for gradient in gradients(model))


@both
def test_all_kept_with_factors(execution: Execution) -> None:
    model, (x, y) = network(), points()
    factors = torch.rand(B, dtype=torch.float64) + 0.5
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    gate = gate_of(Kept(torch.arange(B), factors), execution)
    gate.open(loss, found.entries)
    loss.backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    (F.cross_entropy(other(x), y, reduction="none") * factors).mean().backward()
    assert_close(gradients(model), gradients(other))


# ------------------------------------------------------------------ several backward calls


@both
def test_several_backward_calls_on_one_graph(execution: Execution) -> None:
    model, (x, y) = network(), points()
    z: list[Tensor] = []
    loss, found = proved((x, y), lambda: F.cross_entropy((z.append(model(x)), z[0])[1], y))
    seen: list[Tensor] = []
    factors = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    gate = gate_of(kept_rows(factors=factors), execution, seen)
    gate.open(loss, found.entries)
    loss.backward(retain_graph=True)
    once = gradients(model)
    gate.open(loss, found.entries)
    loss.backward(retain_graph=True)
    assert_close(gradients(model), [2 * gradient for gradient in once])
    other = z[0].square().sum(1).mean()
    gate.open(other, found.entries)
    model.zero_grad()
    other.backward()
    assert len(seen) == 1
    assert_close(gradients(model), of_samples(model, lambda m: m(x).square().sum(1), factors))


@both
def test_a_later_graph_uses_the_first_selection(execution: Execution) -> None:
    model, (x, y) = network(), points()
    seen: list[Tensor] = []
    gate = gate_of(kept_rows(), execution, seen)
    for power in (2, 3):  # as LBFGS and TBPTT do
        loss, found = proved((x, y), lambda power=power: model(x).pow(power).sum(1).mean())
        model.zero_grad()
        gate.open(loss, found.entries)
        loss.backward()
        assert_close(gradients(model), of_samples(model, lambda m, power=power: m(x).pow(power).sum(1)))
    assert len(seen) == 1


def test_closed_it_stands_no_more() -> None:
    model, (x, y) = network(), points()
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    gate = gate_of(kept_rows(), "mask")
    gate.open(loss, found.entries)
    gate.close()
    loss.backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    F.cross_entropy(other(x), y).backward()
    assert_close(gradients(model), gradients(other))


@both
def test_a_second_derivative_through_the_gate(execution: Execution) -> None:
    model, (x, y) = network(), points()
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    gate = gate_of(kept_rows(), execution)
    gate.open(loss, found.entries)
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]
    other = copy.deepcopy(model)
    other.zero_grad()
    weights = torch.zeros(B, dtype=torch.float64)
    weights[list(KEPT)] = 1.0
    expected = (F.cross_entropy(other(x), y, reduction="none") * weights).mean()
    second = torch.autograd.grad(expected, list(other.parameters()), create_graph=True)
    sum(g.square().sum() for g in second).backward()  # type: ignore[union-attr]
    assert_close([g.detach() for g in first], [g.detach() for g in second])
    assert_close(gradients(model), gradients(other))


# ------------------------------------------------------------------ derivatives in the loss


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    v = x.clone().requires_grad_()
    out = model(v)
    (slope,) = torch.autograd.grad(out.sum(), v, create_graph=True)
    return out.squeeze(1) + (slope.norm(dim=1) - 1).square()


def force_field(model: nn.Module, x: Tensor) -> Tensor:
    v = x.clone().requires_grad_()
    energy = model(v).squeeze(1)
    (force,) = torch.autograd.grad(energy.sum(), v, create_graph=True)
    return (energy - x.sum(1)).square() + (force + x).square().sum(1)


def curvature(model: nn.Module, x: Tensor) -> Tensor:
    v = x.clone().requires_grad_()
    out = model(v)
    (slope,) = torch.autograd.grad(out.sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), v, create_graph=True)
    return (second.sum(1) + out.squeeze(1) - x.prod(1)).square()


@both
@pytest.mark.parametrize("terms", [penalised, force_field, curvature])
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_in_the_loss(
    terms: Callable[[nn.Module, Tensor], Tensor], weighted: bool, execution: Execution
) -> None:
    model, (x, _) = network(1), points()
    factors = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64) if weighted else None
    loss, found = proved(x, lambda: terms(model, x).mean())
    gate = gate_of(kept_rows(factors=factors), execution)
    gate.open(loss, found.entries)
    loss.backward()
    assert_close(gradients(model), of_samples(model, lambda m: terms(m, x), factors))


# ------------------------------------------------------------------ values


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_left_out_must_not_enter(value: float, execution: Execution) -> None:
    model, (x, y) = network(), points()
    clean = x.clone()
    x[3, 0] = value
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    gate = gate_of(kept_rows(rows_only=True), execution)
    gate.open(loss, found.entries)
    loss.backward()
    assert_close(gradients(model), of_samples(model, lambda m: F.cross_entropy(m(clean), y, reduction="none")))


@both
def test_inputs_that_require_gradients(execution: Execution) -> None:
    model, (x, y) = network(), points()
    x.requires_grad_()
    loss, found = proved((x, y), lambda: F.cross_entropy(model(x), y))
    gate = gate_of(kept_rows(), execution)
    gate.open(loss, found.entries)
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum(1).nonzero().flatten().tolist() == list(KEPT)
    assert_close(gradients(model), of_samples(model, lambda m: F.cross_entropy(m(x), y, reduction="none")))


@both
def test_autocast(execution: Execution) -> None:
    model, (x, y) = network().float(), points()
    x = x.float()

    def terms(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(m(x), y, reduction="none")

    loss, found = proved((x, y), lambda: terms(model).mean())
    gate = gate_of(kept_rows(), execution)
    gate.open(loss, found.entries)
    loss.backward()
    assert_close(gradients(model), of_samples(model, terms), tolerance=2e-2)


def test_the_first_of_two_losses_decides_for_both() -> None:
    x, y = points()
    model = Parts(a=network(), b=network(1)).double()
    seen: list[Tensor] = []
    gate = gate_of(kept_rows(), "partial", seen)
    for terms in (lambda m: F.cross_entropy(m.a(x), y, reduction="none"), lambda m: m.b(x).square().squeeze(1)):
        loss, found = proved((x, y), lambda terms=terms: terms(model).mean())
        model.zero_grad()
        gate.open(loss, found.entries)
        loss.backward()
        assert_close(gradients(model), of_samples(model, terms))
    assert len(seen) == 1
