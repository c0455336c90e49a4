"""A trained cell of the compatibility matrix is compared with the loop written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.compatibility.matrix import Cell, verdict
from tests.compatibility.oracle import Micro, network, replay
from tests.compatibility.train_cell import record_of

__all__ = ["GPU", "check", "distance", "flat"]

GPU = torch.cuda.is_available()


def check(cell: Cell, stem: Path) -> None:
    """Compare a trained cell with the loop by hand."""
    ranks, parameters = record_of(stem, 1 if cell.devices == "1" else 2)
    for other in parameters[1:]:
        assert all(map(torch.equal, parameters[0], other)), "the ranks end with the same parameters"
    selects(cell, ranks)
    got = flat(parameters[0])
    if verdict(cell, gpu=GPU) == "exact":
        is_exact(cell, got, ranks)
        return
    if cell.mode == "subset" and cell.batchnorm != "none":
        is_exact(cell, got, ranks)  # as a step on the selected samples alone
    masked = flat(replay(ranks, replace(cell, mode="mask")))
    start = flat(list(network(cell.batchnorm != "none").parameters()))
    if cell.batchnorm != "none":
        assert distance(got, masked) > 1e-3 * distance(masked, start), "what is called approximate is not exact"
    assert torch.nn.functional.cosine_similarity(got - start, masked - start, dim=0) > 0.9


def is_exact(cell: Cell, got: Tensor, ranks: list[list[Micro]]) -> None:
    """The parameters at the end are those of the loop by hand, as near as the precision allows."""
    device = "cuda" if cell.precision == "16-mixed" else "cpu"
    start = flat(list(network(cell.batchnorm != "none").parameters()))
    want, dense = (flat(replay(ranks, cell, dense=dense, device=device)) for dense in (False, True))
    error, change = distance(got, want), distance(want, start)
    if cell.precision == "32-true":
        assert error < 1e-5 * change
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        return
    # ten times nearer than training on all samples alike or not at all; where those differ but little, four times, and
    # nearer than the loop by hand is to itself in float32
    wrong = min(one for one in (distance(want, dense), change) if one > 0)
    rounding = distance(want, flat(replay(ranks, replace(cell, precision="32-true"), device=device)))
    assert error < max(0.1 * wrong, min(0.25 * wrong, rounding))


def selects(cell: Cell, ranks: list[list[Micro]]) -> None:
    """What was recorded is a selection that can tell a right denominator from a wrong one."""
    sparse = [micro for micros in ranks for micro in micros if micro.indices is not None]
    if cell.mode == "prune":
        assert bool(sparse) == (cell.weighting != "none")
        sizes = {micro.y.numel() for micros in ranks for micro in micros if micro.epoch > 0}
    else:
        assert len(sparse) == sum(map(len, ranks))
        assert all(micro.indices.numel() < micro.y.numel() for micro in sparse)
        sizes = {micro.indices.numel() for micro in sparse}
    assert len(sizes) > 1, "unequal numbers"
    for micro in sparse:
        assert (micro.weights is None) == (cell.weighting == "none")


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in parameters])


def distance(left: Tensor, right: Tensor) -> float:
    return (left - right).norm().item()
