"""Step 1 for batches of graphs, as torch_geometric makes them: a sample is a graph, its rows are nodes or edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Assignments", "assignments_of", "graph_count", "graphs_in", "take_graphs"]

Assignments = tuple[Tensor, ...]
"""For each kind of rows of a batch of graphs, ``(N,)`` the graph of each row: of the nodes, and of the edges."""


def graphs_in(part: Any) -> Any:
    """Find the batch of graphs in a batch, which may hold other things beside it; return None where there is none."""
    if isinstance(part, Tensor):
        return None
    if isinstance(part, (list, tuple, Mapping)):
        children = part.values() if isinstance(part, Mapping) else part
        others = [child for child in children if not isinstance(child, Tensor)]
        return next((found for child in others if (found := graphs_in(child)) is not None), None)
    return None if _nodes(part) is None else part


def graph_count(part: Any) -> int | None:
    """Count the graphs of a batch of graphs; return None for anything else, containers of such a batch included."""
    return None if isinstance(part, (list, tuple, Mapping)) or _nodes(part) is None else int(part.num_graphs)


def assignments_of(batch: Any) -> Assignments:
    """Return the graph of each node, and of each edge where there are edges; nothing where there are no graphs."""
    graphs = graphs_in(batch)
    if graphs is None:
        return ()
    nodes = graphs.batch
    edges = getattr(graphs, "edge_index", None)
    if not isinstance(edges, Tensor) or edges.dim() != 2 or edges.layout is not torch.strided:
        return (nodes,)
    return nodes, nodes[edges[0]]  # no edge leads from one graph to another: its first node tells


def take_graphs(graphs: Any, indices: Tensor) -> Any:
    """Take the graphs at ``(k,)`` positions out of a batch; return None where a list of graphs makes none."""
    make = getattr(type(graphs), "from_data_list", None)
    if make is None or not hasattr(graphs, "index_select"):
        return None
    return make(graphs.index_select(indices))


def _nodes(part: Any) -> Tensor | None:
    if not hasattr(part, "num_graphs"):
        return None
    nodes = getattr(part, "batch", None)
    # Other objects have a `batch` too: only whole numbers along one dimension are an assignment.
    is_index = isinstance(nodes, Tensor) and nodes.dim() == 1 and nodes.dtype is torch.int64
    return nodes if is_index else None
