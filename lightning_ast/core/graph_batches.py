"""Batches of graphs, as torch_geometric makes them: a sample is a graph, and its rows are nodes or edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["assignments_of", "graph_count", "take_graphs"]


def graph_count(batch: Any) -> int | None:
    """Count the graphs of a batch of graphs; return None for any other batch.

    It is an object with ``num_graphs``, and ``batch``: the graph of each node.
    """
    return None if _nodes(batch) is None else int(batch.num_graphs)


def assignments_of(batch: Any) -> tuple[Tensor, ...]:
    """Return the graph of each node, and of each edge where there are edges; nothing for any other batch."""
    nodes = _nodes(batch)
    if nodes is None:
        return ()
    edges = getattr(batch, "edge_index", None)
    if not isinstance(edges, Tensor) or edges.dim() != 2 or edges.is_sparse:
        return (nodes,)
    return nodes, nodes[edges[0]]


def take_graphs(batch: Any, indices: Tensor) -> Any:
    """Take graphs out of a batch that can be made from a list of graphs; return None where it cannot.

    Args:
        batch: A batch of graphs.
        indices: ``(k,)`` positions.
    """
    make = getattr(type(batch), "from_data_list", None)
    if make is None or not hasattr(batch, "index_select"):
        return None
    return make(batch.index_select(indices))


def _nodes(batch: Any) -> Tensor | None:
    if isinstance(batch, (Tensor, list, tuple, Mapping)) or not hasattr(batch, "num_graphs"):
        return None
    nodes = getattr(batch, "batch", None)
    is_index = isinstance(nodes, Tensor) and nodes.dim() == 1 and nodes.dtype is torch.int64
    return nodes if is_index else None
