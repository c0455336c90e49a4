"""The gate against ordinary row masking: one loss function, run once with the gate and once with cuts by hand.

A case computes its loss with ``cut(tensor)`` around the outputs of its last layers. Under the gate a cut is nothing; in
the oracle it is an identity whose backward multiplies the rows of the samples.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import EntryFinder, Found
from lightning_ast.core.gradient_gate import BatchGate, Execution, Kept

B = 5
KEPT = (1, 3, 4)

Loss = Callable[[Any, Any, Callable[..., Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """A network, its batches and its loss.

    Args:
        build: Makes the network.
        batch: Makes a batch of so many samples.
        loss: ``(network, batch, cut) -> loss``.
        scored: Whether the cuts are where the samples are scored, too.
        tolerance: Relative error that is allowed.
        double: Whether it runs in float64.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Loss
    scored: bool = True
    tolerance: float = 1e-9
    double: bool = True


class Parts(nn.Module):
    """A network of named parts and parameters, which its loss puts together."""

    def __init__(self, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)


@dataclass
class Outcome:
    """What a backward left behind."""

    gradients: dict[str, Tensor | None]
    norms: Tensor | None = None
    found: Found | None = None
    dense_ops: Counter[str] | None = None


def whole(tensor: Tensor, **_: Any) -> Tensor:
    """Cut nothing."""
    return tensor


class Cuts:
    """Cuts by hand: multiplies the rows of each sample in the backward, and adds up their squares before that."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors
        self.squares = torch.zeros(len(factors), dtype=torch.float64)

    def __call__(self, tensor: Tensor, *, dim: int = 0, groups: int = 1, nested: bool = False) -> Tensor:
        """Cut along a dimension of ``groups * B`` rows; a nested one, on the path of the loss alone, is not scored."""
        cuts, size = self, len(self.factors)

        class Cut(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: Tensor) -> Tensor:
                return value.view_as(value)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                rows = gradient.movedim(dim, 0).reshape(groups, size, -1, *gradient.movedim(dim, 0).shape[1:])
                if not nested:
                    cuts.squares += rows.detach().transpose(0, 1).reshape(size, -1).abs().double().square().sum(1)
                factors = cuts.factors.to(rows.real.dtype).view(1, size, *[1] * (rows.dim() - 2))
                return (rows * factors).reshape(gradient.movedim(dim, 0).shape).movedim(0, dim)

        cut: Tensor = Cut.apply(tensor)
        return cut


def gated(
    model: nn.Module,
    batch: Any,
    loss_of: Loss,
    kept: Kept,
    *,
    size: int,
    execution: Execution,
    finder: EntryFinder,
    traced: bool = True,
) -> Outcome:
    """Run a loss under the gate; traced, its entries are proved, otherwise they are found by an earlier proof."""
    model = copy.deepcopy(model)
    norms: list[Tensor] = []
    dense_ops: Counter[str] = Counter()
    torch.manual_seed(3)
    if traced:
        trace = SampleTrace(batch, size)
        with trace:
            loss = loss_of(model, batch, whole)
        assert trace.failure is None
        found: Found | None = finder.prove(loss, size, trace)
        trace.release()
    else:
        loss = loss_of(model, batch, whole)
        found = finder.find(loss, size)
    assert found is not None, "the graph has a form that was not proved"
    gate = BatchGate(
        size,
        lambda arrived: (norms.append(arrived), kept)[1],
        execution=execution,
        batchnorm="exact",
        dense_ops=dense_ops,
    )
    gate.open(loss, found.entries)
    loss.backward()
    gate.close()
    assert len(norms) <= 1, "selected more than once"
    return Outcome(_gradients(model), norms[0] if norms else None, found, dense_ops)


def by_hand(model: nn.Module, batch: Any, loss_of: Loss, kept: Kept, *, size: int) -> Outcome:
    """Run a loss with cuts."""
    model = copy.deepcopy(model)
    factors = torch.zeros(size, dtype=torch.float64)
    factors[kept.indices] = 1.0 if kept.factors is None else kept.factors.double()
    cuts = Cuts(factors)
    torch.manual_seed(3)
    loss_of(model, batch, cuts).backward()
    return Outcome(_gradients(model), cuts.squares.sqrt())


def check(case: Case, execution: Execution, factors: Tensor | None = None) -> Found:
    """Compare the gate with cuts by hand, on a batch that is traced and on a longer one that is not."""
    finder = EntryFinder()
    torch.manual_seed(0)
    model = case.build()
    model = model.double() if case.double else model
    first: Found | None = None
    first: Found | None = None
    for size, traced in ((B, True), (B + 2, False)):
        torch.manual_seed(1)
        batch = _double(case.batch(size)) if case.double else case.batch(size)
        kept = Kept(torch.tensor(KEPT), factors)
        got = gated(model, batch, case.loss, kept, size=size, execution=execution, finder=finder, traced=traced)
        if traced:
            first = got.found
        expected = by_hand(model, batch, case.loss, kept, size=size)
        assert_same(got.gradients, expected.gradients, case.tolerance)
        if case.scored:
            assert got.norms is not None
            assert expected.norms is not None
            error = (got.norms.double() - expected.norms).norm() / expected.norms.norm()
            assert error < max(case.tolerance, 1e-6), (got.norms, expected.norms)
    assert first is not None
    assert first is not None
    return first


def assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """Compare gradients, each by its own size."""
    for name, right in expected.items():
        left = got[name]
        if left is None or right is None:
            assert left is None or not left.any(), name
            assert right is None or not right.any(), name
            continue
        assert type(left) is Tensor, name
        difference = (left - right).to_dense() if left.is_sparse else left - right
        scale = (right.to_dense() if right.is_sparse else right).abs().max().clamp(min=1e-6)
        assert difference.abs().max() <= tolerance * scale, (name, left, right)


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {name: _double(part) for name, part in batch.items()}
    return type(batch)(_double(part) for part in batch)
