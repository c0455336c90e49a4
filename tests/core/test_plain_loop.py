"""The gate in a plain loop: one call before ``loss.backward()``."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core.gradient_gate import Execution
from lightning_ast.core.plain_loop import GradientGate
from lightning_ast.core.selector import SampleSelector
from lightning_ast.errors import EntryError

B, X, C = 8, 5, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(X, 7), nn.Tanh(), nn.Linear(7, C)).double()


def batches(count: int, sizes: tuple[int, ...] = (B,)) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    made = [sizes[k % len(sizes)] for k in range(count)]
    return [(torch.randn(size, X, dtype=torch.float64), torch.randint(0, C, (size,))) for size in made]


@pytest.mark.parametrize("execution", ["mask", "partial"])
@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
def test_a_loop_trains_as_one_by_hand(execution: Execution, weighting: str) -> None:
    model = network()
    other = copy.deepcopy(model)
    selector = SampleSelector(target_activation_rate=0.5, weighting=weighting)  # type: ignore[arg-type]
    gate = GradientGate(selector, execution=execution)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for x, y in batches(4, (B, B - 2)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with gate.trace((x, y)):
            loss = F.cross_entropy(model(x), y)
        gate.open(loss, batch_size=len(x))
        loss.backward()
        assert gate.selection is not None
        indices, weights = gate.selection.indices, gate.selection.weights
        weights = torch.ones(len(indices)) if weights is None else weights
        total = len(x) if weighting == "unbiased" else weights.sum()
        (F.cross_entropy(other(x)[indices], y[indices], reduction="none") * weights).sum().div(total).backward()
        for optimizer in optimizers:
            optimizer.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_without_a_trace_the_sizes_decide_where_they_allow_one_answer() -> None:
    model, ((x, y),) = network(), batches(1)
    gate = GradientGate(SampleSelector(target_activation_rate=0.5))
    loss = F.cross_entropy(model(x), y)
    gate.open(loss, batch_size=B)
    loss.backward()
    assert gate.selection is not None
    assert 0 < len(gate.selection.indices) < B


def test_sizes_that_allow_two_answers_are_refused_without_a_trace() -> None:
    model = nn.Linear(X, B)
    x = torch.randn(B, X)
    loss = F.cross_entropy(model(x), torch.arange(B))
    gate = GradientGate(SampleSelector())
    with pytest.raises(EntryError, match=rf"{B} samples.*\({B}, {B}\)"):
        gate.open(loss, batch_size=B)
    with gate.trace((x, torch.arange(B))):
        loss = F.cross_entropy(model(x), torch.arange(B))
    gate.open(loss, batch_size=B)
    loss.backward()
    assert gate.selection is not None


def test_a_first_batch_of_one_sample_proves_nothing_and_is_no_fault() -> None:
    model = network()
    gate = GradientGate(SampleSelector(target_activation_rate=0.5))
    for (x, y), kept in zip(batches(2, (1, B)), (1, B // 2), strict=True):
        with gate.trace((x, y)):
            loss = F.cross_entropy(model(x), y)
        gate.open(loss, batch_size=len(x))
        loss.backward()
        assert gate.selection is not None
        assert len(gate.selection.indices) == kept


def test_a_loss_that_does_not_depend_on_the_samples_is_refused() -> None:
    model, ((x, y),) = network(), batches(1)
    gate = GradientGate(SampleSelector())
    with gate.trace((x, y)):
        loss = sum(p.square().sum() for p in model.parameters())
    assert isinstance(loss, Tensor)
    with pytest.raises(EntryError, match="expected a batch of 8 samples"):
        gate.open(loss, batch_size=B)


def test_a_sample_that_is_not_finite_is_left_out() -> None:
    model, ((x, y),) = network(), batches(1)
    x[2, 1] = float("nan")
    gate = GradientGate(SampleSelector(target_activation_rate=0.9), execution="mask")
    with gate.trace((x, y)):
        loss = F.cross_entropy(model(x), y)
    gate.open(loss, batch_size=B)
    loss.backward()
    assert gate.selection is not None
    assert 2 not in gate.selection.indices.tolist()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_average_of_processes_is_the_denominator() -> None:
    model, ((x, y),) = network(), batches(1)
    other = copy.deepcopy(model)
    selector = SampleSelector(target_activation_rate=0.5, gate="topk", weighting="none")
    gate = GradientGate(selector, average=lambda value: 2 * value)
    with gate.trace((x, y)):
        loss = F.cross_entropy(model(x), y)
    gate.open(loss, batch_size=B)
    loss.backward()
    assert gate.selection is not None
    chosen = gate.selection.indices
    (F.cross_entropy(other(x)[chosen], y[chosen], reduction="sum") / (2 * len(chosen))).backward()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)
