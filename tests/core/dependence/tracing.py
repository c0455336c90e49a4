"""Helpers of the tests that follow one sample through a step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ast.core.dependence.records import Dependence
from lightning_ast.core.dependence.trace import SampleTrace

B = 5


def places(trace: SampleTrace, out: Tensor, dim: int = 0) -> list[int]:
    """Positions along a dimension of a node's output that depend on the sample."""
    found = trace.dependence(out.grad_fn, out.output_nr)
    assert found is not None
    assert found.shape == tuple(out.shape)
    assert [len(p) for p in found.profiles] == list(out.shape)
    return found.profiles[dim].nonzero().flatten().tolist() if out.dim() else []


def known(trace: SampleTrace, out: Tensor) -> Dependence | None:
    return trace.dependence(out.grad_fn, out.output_nr)


def unchanged(
    network: nn.Module, batch: Tensor, run: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[SampleTrace, Tensor]:
    """Run a network with and without a trace; outputs, gradients, buffers and random numbers must be the same."""
    results = []
    for traced in (False, True):
        torch.manual_seed(3)
        net = copy.deepcopy(network)
        x = batch.clone()
        trace = SampleTrace(x, B)
        first_node = torch.autograd._get_sequence_nr()
        if traced:
            with trace:
                out = run(net, x)
                out.sum()
        else:
            out = run(net, x)
            out.sum()
        nodes = torch.tensor(torch.autograd._get_sequence_nr() - first_node)
        drawn = torch.rand(3)
        out.square().sum().backward()
        state = [*net.state_dict().values(), *(p.grad for p in net.parameters()), out.detach(), drawn, nodes, x]
        results.append(state)
    for plain, with_trace in zip(*results, strict=True):
        assert (plain is None) == (with_trace is None)
        assert plain is None or torch.equal(plain, with_trace)
    assert trace.failure is None
    return trace, out
