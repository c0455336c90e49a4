"""The entries of a loss's graph: the edges through which its gradient enters the network.

Walk from the loss towards the parameters. What is made of parameters alone (a tied weight, a temperature) is passed by;
the first nodes that combine parameters with the samples' rows are the entries. What lies between the loss and them is
the loss part: it may be of any form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_ast.core.dependence import SampleTrace
from lightning_ast.core.graph import rows_are_picked
from lightning_ast.core.layout import Layout, layouts_by_size, prove_layout
from lightning_ast.core.partial.rows import Place

__all__ = ["Entry", "EntryError", "EntryFinder", "Found"]

_PRODUCTS = (
    *("Addmm", "Addmv", "Addbmm", "Baddbmm", "Bilinear", "Bmm", "Mm", "Mv"),
    *("Convolution", "Embedding", "Linear", "Prelu"),
)
"""Layers even where their parameter has a single element; other nodes with one are a temperature or a loss weight."""
_PARTS = ("Rnn", "Conv", "Norm")
_OPAQUE = ("CheckpointFunction", "CompiledFunction", "DifferentiableGraph")
"""Nodes that hide their parameters."""
_PICKING = ("Embedding", "Index", "Gather", "Take")
"""Nodes that pick rows of a parameter by data, which their edges do not show."""
_RESHAPING = (
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"),
    *("Transpose", "TBackward", "Permute", "ToCopy", "Alias"),
)
"""Nodes that give a tensor another shape or type."""
_PLANS = 64
"""Graphs of different forms that are remembered."""

_Edge = tuple[Node, int]
"""A node, and the position of one of its outputs."""

_Kind = tuple[str, tuple[int, ...] | None]
"""A node's name, and the sizes of its output but for the first."""

Verdict = Literal["pass", "walk", "enter"]


class EntryError(RuntimeError):
    """The rows of the samples cannot be found in the graph of a loss."""


@dataclass(frozen=True)
class Entry:
    """One tensor through which the gradient enters the network.

    Attributes:
        node: The node that computed it.
        output_nr: Which of the node's outputs it is.
        place: Where the samples lie in it.
        edges: The edges of the loss part that lead to it: pairs of a node and the position among its inputs.
        nested: Whether the network's own gradient arrives there too, from an entry closer to the loss.
        exact: Whether a sample was seen to change its own rows alone.
    """

    node: Node
    output_nr: int
    place: Place
    edges: tuple[tuple[Node, int], ...]
    nested: bool
    exact: bool


@dataclass(frozen=True)
class Found:
    """The entries of one loss.

    Attributes:
        entries: In the order of the walk; empty where the loss does not depend on the samples.
        proved: Whether each one's rows are proved to be the samples'. False: they were taken from the sizes, which
            allow one answer only.
        unclear: Sizes of tensors whose rows could not be told.
    """

    entries: tuple[Entry, ...] = ()
    proved: bool = True
    unclear: tuple[str, ...] = ()


@dataclass
class _Plan:
    """A walk that was proved, to be followed in graphs of the same form.

    Attributes:
        names: For each visited node, its name.
        verdicts: For each visited node, what to do at each of its edges.
        layouts: For each edge that enters, in order, the layout, the child's name and whether it is nested.
    """

    names: list[str] = field(default_factory=list)
    verdicts: list[tuple[Verdict, ...]] = field(default_factory=list)
    layouts: list[tuple[Layout, str, bool]] = field(default_factory=list)


class EntryFinder:
    """Finds the entries of each batch's losses; proves them where a trace of the forward is at hand.

    Attributes:
        proved: Whether a graph was proved.
    """

    def __init__(self) -> None:
        self._plans: list[_Plan] = []
        self._known: dict[tuple[str, int], Layout] = {}
        self._mixed: set[_Kind] = set()

    @property
    def proved(self) -> bool:
        """Whether the rows of at least one loss were proved."""
        return any(plan.layouts for plan in self._plans)

    def prove(self, loss: Tensor, batch_size: int, trace: SampleTrace, *, may_be_apart: bool = False) -> Found:
        """Find the entries of a loss whose forward was traced, and remember the form of its graph.

        Args:
            loss: Scalar with its graph.
            batch_size: Samples B of the batch.
            trace: The trace of one sample through the forward.
            may_be_apart: Whether the loss may have nothing to do with the samples, as that of a generator which
                begins with noise.
        """
        view = _TracedView(batch_size, trace)
        found, plan = _search(loss, batch_size, view)
        if found.entries or (may_be_apart and trace.complete and not found.unclear):
            self._remember(plan)
        if found.entries:
            self._mixed |= view.unclear.keys()
        return found

    def find(self, loss: Tensor, batch_size: int) -> Found | None:
        """Find the entries of a loss whose graph has a form that was proved.

        Returns:
            None where its form is new.
        """
        for position, plan in enumerate(self._plans):
            found = _Follow(plan).result(loss, batch_size)
            if found is not None:
                if position:
                    self._plans.insert(0, self._plans.pop(position))
                return found
        return None

    def guess(self, loss: Tensor, batch_size: int) -> Found:
        """Find the entries of a loss by what is known of other losses, and by sizes that allow one answer only."""
        found, _ = _search(loss, batch_size, _SizedView(batch_size, self._known, self._mixed))
        return Found(found.entries, proved=False, unclear=found.unclear)

    def _remember(self, plan: _Plan) -> None:
        self._plans.insert(0, plan)
        del self._plans[_PLANS:]
        for layout, name, _ in plan.layouts:
            self._known[name, layout.ndim] = layout


# ---------------------------------------------------------------------- what is known of a node


class _SizedView:
    """What the form of a graph tells: a branch without an edge to nothing is made of parameters alone."""

    def __init__(self, batch_size: int, known: dict[tuple[str, int], Layout], mixed: set[_Kind]) -> None:
        self._batch_size = batch_size
        self._known = known
        self._mixed = mixed
        self._pure: dict[_Edge, bool] = {}
        self.unclear: dict[_Kind, str] = {}

    def is_parameter(self, leaf: Tensor) -> bool:
        return isinstance(leaf, nn.Parameter)

    def is_pure(self, node: Node, output_nr: int) -> bool:
        """Whether a node's output does not depend on the samples."""
        return _settled((node, output_nr), self._pure, self._pure_of)

    def _pure_of(self, edge: _Edge) -> bool | list[_Edge]:
        node = edge[0]
        if _is_leaf(node):
            return self.is_parameter(node.variable)  # type: ignore[attr-defined]
        if _named(node.name(), _PICKING) or _named(node.name(), _OPAQUE):
            return False
        children = _edges_of(node)
        return children if children and len(children) == len(node.next_functions) else False

    def note_unclear(self, node: Node, output_nr: int) -> None:
        """Remember a node whose rows cannot be told, unless it was found before that they are not the samples'."""
        shape = _shape(node, output_nr)
        if shape is not None and _numel(shape) < self._batch_size and not _is_layer(node.name()):
            return  # what is left of the samples after a mean: learned weights of several losses
        kind = node.name(), None if shape is None else shape[1:]
        if kind not in self._mixed:
            self.unclear.setdefault(kind, f"{node.name()} {shape}")

    def layout(self, node: Node, output_nr: int) -> Layout | None:
        """Where the samples lie in a node's output; None where that is not known."""
        shape = _shape(node, output_nr)
        if shape is None or _has_shape_of_parameter(node, shape):
            return None
        known = self._known.get((_form(node), len(shape)))
        if known is not None and known.place(shape, self._batch_size) is not None:
            return self._unless_picked(node, output_nr, known)
        if self._batch_size == 1 and shape:  # every row is the sample's
            return Layout(len(shape), 0, 1, shape[0])
        fitting = list(layouts_by_size(shape, self._batch_size))
        if len(fitting) > 1:  # as in the other tensors of this network, if these agree
            kin = [layout for (_, ndim), layout in self._known.items() if ndim == len(shape)]
            fitting = [layout for layout in fitting if kin and all(_is_alike(layout, other) for other in kin)]
        return self._unless_picked(node, output_nr, fitting[0]) if len(fitting) == 1 else None

    def _unless_picked(self, node: Node, output_nr: int, layout: Layout | None) -> Layout | None:
        """Refuse rows that are a multiple of the samples by chance, as picked tokens and proposals can be."""
        if layout is None or layout.dim or layout.pre * layout.post == 1:
            return layout
        return None if rows_are_picked(node, output_nr, is_constant=self.is_pure) else layout


class _TracedView(_SizedView):
    """What the trace of one sample through the forward tells."""

    def __init__(self, batch_size: int, trace: SampleTrace) -> None:
        super().__init__(batch_size, {}, set())
        self._trace = trace

    def is_parameter(self, leaf: Tensor) -> bool:
        return self._trace.depends(leaf) is False or isinstance(leaf, nn.Parameter)

    def _pure_of(self, edge: _Edge) -> bool | list[_Edge]:
        dependence = None if _is_leaf(edge[0]) else self._trace.dependence(*edge)
        if dependence is None:
            return super()._pure_of(edge)
        return not dependence.touched

    def layout(self, node: Node, output_nr: int) -> Layout | None:
        dependence = self._trace.dependence(node, output_nr)
        if dependence is None:
            return None
        if dependence.independent:
            return self._inherited(node, output_nr)
        layout = prove_layout(
            dependence.shape, dependence.profiles, batch_size=self._batch_size, sample=self._trace.sample
        )
        return self._unless_picked(node, output_nr, layout)

    def _inherited(self, node: Node, output_nr: int) -> Layout | None:
        """Find where the samples lie in an output that is flat at the sample, by the rows that it was computed from.

        So are those of a straight-through estimator, which are equal for samples of one code.
        """
        shape = _shape(node, output_nr)
        pending, seen = [node], set[Node]()
        while pending and shape:
            current = pending.pop()
            if current in seen or _named(current.name(), (*_RESHAPING, *_PICKING, *_OPAQUE)):
                continue
            seen.add(current)
            for edge in _edges_of(current):
                rows = None if _is_leaf(edge[0]) or self.is_pure(*edge) else _shape(*edge)
                if not rows or rows[0] != shape[0]:
                    continue
                dependence = self._trace.dependence(*edge)
                if dependence is None or dependence.independent:
                    pending.append(edge[0])
                    continue
                layout = self.layout(*edge)
                if layout is not None and layout.dim == 0:
                    return replace(layout, ndim=len(shape))
        return None


# ---------------------------------------------------------------------- the walk


def _search(loss: Tensor, batch_size: int, view: _SizedView) -> tuple[Found, _Plan]:
    """Walk twice where there are several entries: what one network hands to the next is not the loss part's."""
    first = _Walk(loss, batch_size, view, inner=set())
    if len(first.entered) > 1:
        inner = set(_below([child for child, _ in first.entered]))
        return _Walk(loss, batch_size, view, inner=inner).result()
    return first.result()


class _Walk:
    """One walk from a loss to its entries."""

    def __init__(self, loss: Tensor, batch_size: int, view: _SizedView, inner: set[Node]) -> None:
        self._view = view
        self._batch_size = batch_size
        self._inner = inner
        self.plan = _Plan()
        self.entered: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        self._layouts: dict[tuple[Node, int], Layout] = {}
        for node in _visit(loss, self._decide):
            self.plan.names.append(_form(node))

    def _decide(self, node: Node) -> tuple[Verdict, ...]:
        verdicts = tuple(self._verdict(node, position, *edge) for position, edge in enumerate(node.next_functions))
        self.plan.verdicts.append(verdicts)
        return verdicts

    def _verdict(self, node: Node, position: int, child: Node | None, output_nr: int) -> Verdict:
        if child is None or _is_leaf(child) or self._view.is_pure(child, output_nr):
            return "pass"
        if child in self._inner or _owns_parameters(child, self._view):
            layout = self._view.layout(child, output_nr)
            if layout is not None:
                self.entered.setdefault((child, output_nr), []).append((node, position))
                self._layouts[child, output_nr] = layout
                self.plan.layouts.append((layout, _form(child), child in self._inner))
                return "enter"
            self._view.note_unclear(child, output_nr)
        return "walk"

    def result(self) -> tuple[Found, _Plan]:
        entries = []
        for (child, output_nr), edges in self.entered.items():
            layout = self._layouts[child, output_nr]
            entry = _entry(child, output_nr, layout, edges, self._batch_size, nested=child in self._inner)
            if entry is not None:
                entries.append(entry)
        return Found(tuple(entries), unclear=tuple(self._view.unclear.values())), self.plan


def _entry(
    child: Node, output_nr: int, layout: Layout, edges: list[tuple[Node, int]], batch_size: int, *, nested: bool
) -> Entry | None:
    shape = _shape(child, output_nr)
    place = None if shape is None else layout.place(shape, batch_size)
    return None if place is None else Entry(child, output_nr, place, tuple(edges), nested, layout.exact)


class _Follow:
    """Follows a proved walk through a graph that may have the same form."""

    def __init__(self, plan: _Plan) -> None:
        self._names = iter(plan.names)
        self._verdicts = iter(plan.verdicts)
        self._layouts = iter(plan.layouts)
        self._edges: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        self._facts: dict[tuple[Node, int], tuple[Layout, bool]] = {}

    def result(self, loss: Tensor, batch_size: int) -> Found | None:
        """Give the entries; None where this graph has another form or its sizes do not fit."""
        complete = all(node is not None for node in _visit(loss, self._decide))
        if not complete or next(self._names, None) is not None:
            return None
        entries = []
        for (child, output_nr), (layout, nested) in self._facts.items():
            edges = self._edges[child, output_nr]
            entry = _entry(child, output_nr, layout, edges, batch_size, nested=nested)
            if entry is None:
                return None
            entries.append(entry)
        return Found(tuple(entries))

    def _decide(self, node: Node) -> tuple[Verdict, ...] | None:
        if next(self._names, None) != _form(node):
            return None
        planned = next(self._verdicts)
        following = node.next_functions
        if len(planned) != len(following):
            return None
        for position, (verdict, (child, output_nr)) in enumerate(zip(planned, following, strict=True)):
            if verdict != "pass" and child is None:
                return None
            if verdict == "enter":
                layout, name, nested = next(self._layouts)
                if _form(child) != name:
                    return None
                self._edges.setdefault((child, output_nr), []).append((node, position))
                self._facts[child, output_nr] = layout, nested
        return planned


def _visit(loss: Tensor, decide: Callable[[Node], tuple[Verdict, ...] | None]) -> Iterator[Any]:
    """Visit the loss part; give None and end where ``decide`` does not know a node."""
    root = loss.grad_fn
    pending: list[Node] = [] if root is None else [root]
    seen = set(pending)
    while pending:
        node = pending.pop()
        verdicts = decide(node)
        if verdicts is None:
            yield None
            return
        yield node
        for verdict, (child, _) in zip(verdicts, node.next_functions, strict=True):
            if verdict == "walk" and child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def _below(roots: list[Node]) -> Iterator[Node]:
    """List what the given nodes are computed from, without themselves unless one leads to another."""
    pending = [child for root in roots for child, _ in root.next_functions]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [child for child, _ in node.next_functions]


def _owns_parameters(node: Node, view: _SizedView) -> bool:
    """Whether a node combines parameters with what depends on the samples."""
    name = node.name()
    if _named(name, _OPAQUE):
        return True
    layer = _is_layer(name)
    for child, output_nr in node.next_functions:
        if child is None or not _leads_to_parameters(child, output_nr, view):
            continue
        shape = tuple(child.variable.shape) if _is_leaf(child) else _shape(child, output_nr)  # type: ignore[attr-defined]
        if layer or shape is None or _numel(shape) > 1:
            return True
        if _named(name, ("Add",)) and any(_is_layers_output(other, view) for other, _ in node.next_functions):
            return True  # the bias of a layer of one output, which stands apart from the product
    return False


def _is_layers_output(node: Node | None, view: _SizedView) -> bool:
    """Whether a node is a product with a parameter, or shows one in another shape or type."""
    while node is not None and _named(node.name(), _RESHAPING):
        node = node.next_functions[0][0]
    return node is not None and _named(node.name(), _PRODUCTS) and _owns_parameters(node, view)


def _has_shape_of_parameter(node: Node, shape: tuple[int, ...]) -> bool:
    """Whether a node's output is as large as a parameter that it works on, as a weight times a constant mask is."""
    leaves = [child.variable for child, _ in node.next_functions if child is not None and _is_leaf(child)]  # type: ignore[attr-defined]
    return not _is_layer(node.name()) and any(tuple(leaf.shape) == shape for leaf in leaves)


def _leads_to_parameters(node: Node, output_nr: int, view: _SizedView) -> bool:
    """Whether a node's output is made without the samples, and of a parameter."""
    if _is_leaf(node):
        return view.is_parameter(node.variable)  # type: ignore[attr-defined]
    if not view.is_pure(node, output_nr):
        return False
    return any(_is_leaf(below) and view.is_parameter(below.variable) for below in _below([node]))  # type: ignore[attr-defined]


def _settled(edge: _Edge, memo: dict[_Edge, bool], rule: Callable[[_Edge], bool | list[_Edge]]) -> bool:
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


def _edges_of(node: Node) -> list[_Edge]:
    """List what a node was computed from, as far as that has a graph."""
    return [(child, output_nr) for child, output_nr in node.next_functions if child is not None]


def _form(node: Node) -> str:
    """Name a node without the number of its overload, which may be another one under a trace."""
    return node.name().rstrip("0123456789")


def _is_alike(one: Layout, other: Layout) -> bool:
    return (one.dim, one.pre, one.post) == (other.dim, other.pre, other.post)


def _is_leaf(node: Node) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"


def _is_layer(name: str) -> bool:
    return _named(name, _PRODUCTS) or any(part in name for part in _PARTS)


def _named(name: str, beginnings: tuple[str, ...]) -> bool:
    return name.startswith(beginnings)


def _numel(shape: tuple[int, ...]) -> float:
    """Count the elements of a shape; a jagged one's length is not known."""
    return math.prod(shape) if all(isinstance(size, int) for size in shape) else math.inf


def _shape(node: Node, output_nr: int) -> tuple[int, ...] | None:
    """Shape of an output, as the graph keeps it; None for what has none (nested tensors, undefined outputs)."""
    metadata = getattr(node, "_input_metadata", None)
    if metadata is None or output_nr >= len(metadata):
        return None
    try:
        return tuple(metadata[output_nr].shape)
    except (RuntimeError, AttributeError):
        return None
