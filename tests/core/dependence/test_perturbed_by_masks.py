"""A `select_batch` of the user's own that takes samples by a mask cannot repeat one: its rows are changed in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.dependence.perturbed import perturbed

NODES = torch.tensor([0, 0, 1, 1, 1, 2])


def by_mask(batch: Any, indices: Tensor) -> Any:
    nodes, labels, assignment = batch
    keep = torch.zeros(len(labels), dtype=torch.bool)
    keep[indices] = True
    rows = keep[assignment]
    return nodes[rows], labels[keep], (keep.cumsum(0) - 1)[assignment[rows]]


def test_the_rows_of_the_sample_change_alone() -> None:
    batch = torch.ones(6, 2), torch.ones(3), NODES
    for sample in range(3):
        nodes, labels = perturbed(batch, 3, sample, by_mask)
        assert (nodes[0] != nodes[1]).any(1).tolist() == (sample == NODES).tolist()
        assert (labels[0] != labels[1]).nonzero().flatten().tolist() == [sample]
