"""What a node of an autograd graph tells of itself: its kind, its sizes, what it was computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.autograd.graph import Node

__all__ = [
    "OPAQUE",
    "PICKING",
    "PRODUCTS",
    "RESHAPING",
    "Edge",
    "edges_of",
    "form_of",
    "is_layer",
    "is_leaf",
    "named",
    "nodes_below",
    "settled",
    "shape_of",
]

PRODUCTS = (
    "Addmm",
    "Addmv",
    "Addbmm",
    "Baddbmm",
    "Bilinear",
    "Bmm",
    "Convolution",
    "Embedding",
    "Linear",
    "Mm",
    "Mv",
    "Prelu",
)
"""Layers even where their parameter has a single element; other nodes with one are a temperature or a loss weight."""
_PARTS = ("Rnn", "Conv", "Norm")
OPAQUE = ("CheckpointFunction", "CompiledFunction", "DifferentiableGraph")
"""Nodes that hide their parameters."""
PICKING = ("Embedding", "Index", "Gather", "Take")
"""Nodes that pick rows of a parameter by data, which their edges do not show."""
RESHAPING = (
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"),
    *("Transpose", "TBackward", "Permute", "ToCopy", "Alias"),
)
"""Nodes that give a tensor another shape or type."""

Edge = tuple[Node, int]
"""A node, and the position of one of its outputs."""


def settled(edge: Edge, memo: dict[Edge, bool], rule: Callable[[Edge], bool | list[Edge]]) -> bool:
    """Settle a question that a node hands on to its children, all of which must answer yes, without recursion."""
    pending = [edge]
    while pending:
        current = pending[-1]
        if current in memo:
            pending.pop()
            continue
        answer = rule(current)
        if isinstance(answer, bool):
            memo[current] = answer
            continue
        open_ones = [child for child in answer if child not in memo]
        if any(memo.get(child) is False for child in answer) or not open_ones:
            memo[current] = all(memo.get(child, False) for child in answer)
        else:
            pending.append(open_ones[0])
    return memo[edge]


def edges_of(node: Node) -> list[Edge]:
    """List what a node was computed from, as far as that has a graph."""
    return [(child, output_nr) for child, output_nr in node.next_functions if child is not None]


def form_of(node: Node) -> str:
    """Name a node without the number of its overload, which may be another one under a trace."""
    return node.name().rstrip("0123456789")


def is_leaf(node: Node) -> bool:
    """Tell whether a node stands for a tensor that nothing computed, such as a parameter."""
    return node.name() == "torch::autograd::AccumulateGrad"


def is_layer(name: str) -> bool:
    """Tell whether a node of this name is a layer, and not a step of a loss."""
    return named(name, PRODUCTS) or any(part in name for part in _PARTS)


def named(name: str, beginnings: tuple[str, ...]) -> bool:
    """Tell whether a node's name begins in one of these ways."""
    return name.startswith(beginnings)


def shape_of(node: Node, output_nr: int) -> tuple[int, ...] | None:
    """Shape of an output, as the graph keeps it; None for what has none (nested tensors, undefined outputs)."""
    metadata = getattr(node, "_input_metadata", None)
    if metadata is None or output_nr >= len(metadata):
        return None
    try:
        shape = tuple(metadata[output_nr].shape)
        return shape if all(type(size) is int for size in shape) else None
    except (RuntimeError, AttributeError):
        return None


def nodes_below(roots: list[Node]) -> Iterator[Node]:
    """List what the given nodes are computed from, without themselves unless one leads to another."""
    pending = [child for root in roots for child, _ in root.next_functions]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [child for child, _ in node.next_functions]
