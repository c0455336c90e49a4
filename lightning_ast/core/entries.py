"""The entries of a loss's graph: the edges through which its gradient enters the network.

Walk from the loss towards the parameters. What is made of parameters alone (a tied weight, a temperature) is passed by;
the first nodes that combine parameters with the samples' rows are the entries. What lies between the loss and them is
the loss part: it may be of any form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_ast.core.dependence import Dependence, SampleTrace
from lightning_ast.core.layout import Layout, assigned_layout, layouts_by_size, prove_layout
from lightning_ast.core.partial.rows import Place

__all__ = ["Entry", "EntryError", "EntryFinder", "Found"]

_PRODUCTS = ("Addmm", "Addmv", "Addbmm", "Baddbmm", "Bilinear", "Bmm", "Convolution", "Embedding", "Linear", "Mm", "Mv")
"""Layers even where their parameter has a single element; other nodes with one are a temperature or a loss weight,
unless they are the next after a layer: the bias of a head with one output is added by a node of its own."""
_PARTS = ("Rnn", "Conv", "Norm")
_OPAQUE = ("CheckpointFunction", "CompiledFunction", "DifferentiableGraph")
"""Nodes that hide their parameters."""
_RESHAPES = (
    "Alias",
    "Permute",
    "Reshape",
    "Squeeze",
    "TBackward",
    "ToCopy",
    "Transpose",
    "UnsafeView",
    "Unsqueeze",
    "View",
)
"""Nodes that move numbers and change none."""
_PICKING = ("Embedding", "Index", "Gather", "Take")
"""Nodes that pick rows of a parameter by data, which their edges do not show."""
_PLANS = 64
"""Graphs of different forms that are remembered."""

_Kind = tuple[str, tuple[int, ...] | None]
"""A node's name, and the sizes of its output but for the first."""
_Edge = tuple[Node, int]
"""A node, and the position of one of its outputs."""

Assignments = tuple[Tensor, ...]
"""For each kind of rows of a batch of graphs ``(N,)``, the sample of each row: of the nodes, and of the edges."""
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
        assignment: The sample of each row, where samples have unequal numbers of rows, as the nodes of graphs.
    """

    node: Node
    output_nr: int
    place: Place
    edges: tuple[_Edge, ...]
    nested: bool
    exact: bool
    assignment: Tensor | None = None


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
        doubts: Whether a loss was seen that does not depend on the sample that was followed. It may depend on others.
    """

    def __init__(self) -> None:
        self._plans: list[_Plan] = []
        self._empty: set[tuple[str, ...]] = set()
        self._known: dict[tuple[str, int], Layout] = {}
        self._mixed: set[_Kind] = set()

    @property
    def proved(self) -> bool:
        """Whether the rows of at least one loss were proved."""
        return bool(self._plans)

    @property
    def doubts(self) -> bool:
        """Whether a loss was seen that does not depend on the sample that was followed."""
        return bool(self._empty)

    def prove(
        self,
        loss: Tensor,
        batch_size: int,
        trace: SampleTrace,
        *,
        last: bool = True,
        assignments: Assignments = (),
    ) -> Found:
        """Find the entries of a loss whose forward was traced, and remember the form of its graph.

        Args:
            loss: Scalar with its graph.
            batch_size: Samples B of the batch.
            trace: The trace of one sample through the forward.
            last: Whether no other forward can be traced. False: nothing is found where a later one may show more.
            assignments: The sample of each node and of each edge, in a batch of graphs.
        """
        view = _TracedView(batch_size, trace, assignments)
        found, plan = _search(loss, batch_size, view)
        if view.undecided and not last:
            return Found()
        if found.entries:
            self._remember(plan)
            self._mixed |= view.unclear.keys()
        elif not found.entries and not found.unclear:
            self._empty.add(_form(loss))
        return found

    def find(
        self, loss: Tensor, batch_size: int, *, doubtful: bool = True, assignments: Assignments = ()
    ) -> Found | None:
        """Find the entries of a loss whose graph has a form that was proved.

        Args:
            loss: Scalar with its graph.
            batch_size: Samples B of the batch.
            doubtful: Whether a loss that did not depend on the sample that was followed counts as known.
            assignments: The sample of each node and of each edge, in a batch of graphs.

        Returns:
            None where its form is new.
        """
        for position, plan in enumerate(self._plans):
            found = _Follow(plan, assignments).result(loss, batch_size)
            if found is not None:
                if position:
                    self._plans.insert(0, self._plans.pop(position))
                return found
        return Found() if doubtful and self._empty and _form(loss) in self._empty else None

    def guess(self, loss: Tensor, batch_size: int, *, assignments: Assignments = ()) -> Found:
        """Find the entries of a loss by what is known of other losses, and by sizes that allow one answer only."""
        found, _ = _search(loss, batch_size, _SizedView(batch_size, self._known, self._mixed, assignments))
        return Found(found.entries, proved=False, unclear=found.unclear)

    def _remember(self, plan: _Plan) -> None:
        self._plans.insert(0, plan)
        del self._plans[_PLANS:]
        for layout, name, _ in plan.layouts:
            self._known[name, layout.ndim] = layout


# ---------------------------------------------------------------------- what is known of a node


class _SizedView:
    """What the form of a graph tells: a branch without an edge to nothing is made of parameters alone."""

    def __init__(
        self,
        batch_size: int,
        known: dict[tuple[str, int], Layout],
        mixed: set[_Kind],
        assignments: Assignments,
    ) -> None:
        self._batch_size = batch_size
        self.assignments = assignments
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
        name = node.name()
        if _is_leaf(node):
            return self.is_parameter(node.variable)  # type: ignore[attr-defined]
        if _named(name, _PICKING) or _named(name, _OPAQUE):
            return False
        children = [(child, output_nr) for child, output_nr in node.next_functions if child is not None]
        return children if children and len(children) == len(node.next_functions) else False

    def note_unclear(self, node: Node, output_nr: int) -> None:
        """Remember a node whose rows cannot be told, unless it was found before that they are not the samples'."""
        shape = _shape(node, output_nr)
        kind = node.name(), None if shape is None else shape[1:]
        if kind not in self._mixed:
            self.unclear.setdefault(kind, f"{node.name()} {shape}")

    def layout(self, node: Node, output_nr: int) -> Layout | None:
        """Where the samples lie in a node's output; None where that is not known."""
        shape = _shape(node, output_nr)
        if shape is None:
            return None
        assigned = assigned_layout(shape, self.assignments)
        if assigned is not None:
            return assigned
        known = self._known.get((node.name(), len(shape)))
        if known is not None and known.place(shape, self._batch_size) is not None:
            return known
        fitting = list(layouts_by_size(shape, self._batch_size))
        return fitting[0] if len(fitting) == 1 else None


class _TracedView(_SizedView):
    """What the trace of one sample through the forward tells."""

    def __init__(self, batch_size: int, trace: SampleTrace, assignments: Assignments) -> None:
        super().__init__(batch_size, {}, set(), assignments)
        self._trace = trace
        self.undecided = False

    def is_parameter(self, leaf: Tensor) -> bool:
        return self._trace.depends(leaf) is False or isinstance(leaf, nn.Parameter)

    def _pure_of(self, edge: _Edge) -> bool | list[_Edge]:
        """Follow the edges too: a sum over a large batch, or a row of weight 0, hides that one sample is in it."""
        node = edge[0]
        dependence = None if _is_leaf(node) else self._trace.dependence(*edge)
        if dependence is None:
            return super()._pure_of(edge)
        if not dependence.independent or any(not found.independent for found in self._saved(node)):
            return False
        return [(child, output_nr) for child, output_nr in node.next_functions if child is not None]

    def _saved(self, node: Node) -> Iterator[Dependence]:
        """Compare what a layer keeps of its inputs, which may need no gradient."""
        if not _is_layer(node.name()):
            return
        for name in dir(node):
            saved = _saved_tensor(node, name) if name.startswith("_saved_") else None
            found = None if saved is None else self._trace.dependence_of(saved)
            if found is not None:
                yield found

    def layout(self, node: Node, output_nr: int) -> Layout | None:
        dependence = self._trace.dependence(node, output_nr)
        if dependence is None:
            return None
        return self._inherited(node, dependence.shape) if dependence.independent else self._proved(dependence)

    def _inherited(self, node: Node, shape: tuple[int, ...]) -> Layout | None:
        """Take the layout of what a layer is computed from: its weight may still be zero, as LoRA's is at first."""
        inputs = [self._trace.dependence(*edge) for edge in node.next_functions if edge[0] is not None]
        inputs += self._saved(node)
        layouts = {self._proved(found) for found in inputs if found is not None and not found.independent}
        layout = layouts.pop() if len(layouts) == 1 else None
        if layout is None or layout.place(shape, self._batch_size) is None:
            self.undecided = True
            return None
        return layout

    def _proved(self, found: Dependence) -> Layout | None:
        if found.shape and self.assignments:
            assigned = assigned_layout(found.shape, self.assignments, found.profiles[0], self._trace.sample)
            if assigned is not None:
                return assigned
        return prove_layout(found.shape, found.profiles, batch_size=self._batch_size, sample=self._trace.sample)


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
        self.entered: dict[_Edge, list[_Edge]] = {}
        self._layouts: dict[_Edge, Layout] = {}
        for node in _visit(loss, self._decide):
            self.plan.names.append(node.name())

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
                self.plan.layouts.append((layout, child.name(), child in self._inner))
                return "enter"
            self._view.note_unclear(child, output_nr)
        return "walk"

    def result(self) -> tuple[Found, _Plan]:
        entries = []
        for (child, output_nr), edges in self.entered.items():
            layout = self._layouts[child, output_nr]
            entry = _entry(
                child,
                output_nr,
                layout,
                edges,
                self._batch_size,
                self._view.assignments,
                nested=child in self._inner,
            )
            if entry is not None:
                entries.append(entry)
        return Found(tuple(entries), unclear=tuple(self._view.unclear.values())), self.plan


def _entry(
    child: Node,
    output_nr: int,
    layout: Layout,
    edges: list[_Edge],
    batch_size: int,
    assignments: Assignments,
    *,
    nested: bool,
) -> Entry | None:
    shape = _shape(child, output_nr)
    place = None if shape is None else layout.place(shape, batch_size)
    if place is None:
        return None
    assignment = None
    if layout.assigned is not None:
        assignment = assignments[layout.assigned] if layout.assigned < len(assignments) else None
        if assignment is None or len(assignment) != place.size:
            return None
    return Entry(child, output_nr, place, tuple(edges), nested, layout.exact, assignment)


class _Follow:
    """Follows a proved walk through a graph that may have the same form."""

    def __init__(self, plan: _Plan, assignments: Assignments) -> None:
        self._assignments = assignments
        self._names = iter(plan.names)
        self._verdicts = iter(plan.verdicts)
        self._layouts = iter(plan.layouts)
        self._edges: dict[_Edge, list[_Edge]] = {}
        self._facts: dict[_Edge, tuple[Layout, bool]] = {}

    def result(self, loss: Tensor, batch_size: int) -> Found | None:
        """Give the entries; None where this graph has another form or its sizes do not fit."""
        complete = all(node is not None for node in _visit(loss, self._decide))
        if not complete or next(self._names, None) is not None:
            return None
        entries = []
        for (child, output_nr), (layout, nested) in self._facts.items():
            edges = self._edges[child, output_nr]
            entry = _entry(child, output_nr, layout, edges, batch_size, self._assignments, nested=nested)
            if entry is None:
                return None
            entries.append(entry)
        return Found(tuple(entries))

    def _decide(self, node: Node) -> tuple[Verdict, ...] | None:
        if next(self._names, None) != node.name():
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
                if child.name() != name:
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
    owns = False
    for child, output_nr in node.next_functions:
        if child is None or not _leads_to_parameters(child, output_nr, view):
            continue
        shape = tuple(child.variable.shape) if _is_leaf(child) else _shape(child, output_nr)  # type: ignore[attr-defined]
        if layer or shape is None or math.prod(shape) > 1:
            return True
        owns = True
    return owns and any(_is_from_layer(child, view) for child, _ in node.next_functions)


def _is_from_layer(node: Node | None, view: _SizedView) -> bool:
    """Whether a layer computed this output, but for reshapes: a number beside it is the layer's bias or scale."""
    while node is not None and _named(node.name(), _RESHAPES):
        node = node.next_functions[0][0]
    return node is not None and _is_layer(node.name()) and _owns_parameters(node, view)


def _leads_to_parameters(node: Node, output_nr: int, view: _SizedView) -> bool:
    """Whether a node's output is made without the samples, and of a parameter."""
    if _is_leaf(node):
        return view.is_parameter(node.variable)  # type: ignore[attr-defined]
    if not view.is_pure(node, output_nr):
        return False
    return any(_is_leaf(below) and view.is_parameter(below.variable) for below in _below([node]))  # type: ignore[attr-defined]


def _form(loss: Tensor) -> tuple[str, ...]:
    """List the names of all nodes of a loss's graph."""
    root = loss.grad_fn
    return () if root is None else (root.name(), *(node.name() for node in _below([root])))


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


def _is_leaf(node: Node) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"


def _is_layer(name: str) -> bool:
    return _named(name, _PRODUCTS) or any(part in name for part in _PARTS)


def _saved_tensor(node: Node, name: str) -> Tensor | None:
    """Read a tensor that a node keeps for its backward; None where it keeps something else, or nothing any more."""
    try:
        saved = getattr(node, name)
    except RuntimeError:
        return None
    return saved if isinstance(saved, Tensor) else None


def _named(name: str, beginnings: tuple[str, ...]) -> bool:
    return name.startswith(beginnings)


def _shape(node: Node, output_nr: int) -> tuple[int, ...] | None:
    """Shape of an output, as the graph keeps it; None for what has none (nested tensors, undefined outputs)."""
    metadata = getattr(node, "_input_metadata", None)
    if metadata is None or output_nr >= len(metadata):
        return None
    try:
        return tuple(metadata[output_nr].shape)
    except (RuntimeError, AttributeError):
        return None
