"""Step 3 of a batch: find the entries of a loss's graph, the edges through which its gradient enters the network.

Walk from the loss towards the parameters. What is made of parameters alone (a tied weight, a temperature) is passed by;
the first nodes that combine parameters with the samples' rows are the entries. What lies between the loss and them is
the loss part: it may be of any form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.autograd.graph import Node

from lightning_ast.core.batch.graphs import Assignments
from lightning_ast.core.dependence.order import OrderedTrace
from lightning_ast.core.dependence.records import shape_of
from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.layout import Layout
from lightning_ast.core.entries.node_facts import Edge, edges_of, form_of, is_leaf, nodes_below
from lightning_ast.core.entries.node_views import OutputForm, SizedView, TracedView, owns_parameters
from lightning_ast.core.partial.rows import Place
from lightning_ast.errors import EntryError

__all__ = ["Entry", "EntryFinder", "Found", "entry_error"]

_PLANS = 64
"""Number of graphs of different forms that are remembered."""
_HIDDEN = "What a step takes out of tensors by `numpy()`, `tolist()` or `item()` cannot be followed: use tensors."
_REMEDY = (
    "If the batch size is another one, or the samples do not lie along the first dimension of the batch's tensors, use "
    "SparseLossMixin and override `count_samples(batch)` and `select_batch(batch, indices)`. If the step sorts or "
    "shuffles the samples, or leaves some out, do that before the batch is made."
)

Verdict = Literal["pass", "walk", "enter"]
_Entered = dict[Edge, tuple[Layout, bool, list[Edge]]]
"""By each edge that enters the network: where the samples lie, whether it is nested, and the edges that lead to it."""


@dataclass(frozen=True)
class Entry:
    """One tensor through which the gradient enters the network.

    Attributes:
        node: The node that computed it.
        output_nr: The position of the tensor among the node's outputs.
        place: The place of the samples in it.
        edges: The edges of the loss part that lead to it: pairs of a node and the position among its inputs.
        nested: Whether the network's own gradient arrives there too, from an entry closer to the loss.
        exact: Whether a sample was seen to change its own rows alone.
    """

    node: Node
    output_nr: int
    place: Place
    edges: tuple[Edge, ...]
    nested: bool
    exact: bool


@dataclass(frozen=True)
class Found:
    """The entries of one loss, in the order of the walk, and the sizes of tensors whose rows could not be told."""

    entries: tuple[Entry, ...] = ()
    unclear: tuple[str, ...] = ()


@dataclass
class _Plan:
    """A walk that was proved, to be followed in graphs of the same form."""

    # The name of each visited node, and the decision at each of its edges.
    steps: list[tuple[str, tuple[Verdict, ...]]] = field(default_factory=list)
    # Of each edge that enters: the layout, the child's name, and whether it is nested.
    layouts: list[tuple[Layout, str, bool]] = field(default_factory=list)


class EntryFinder:
    """Finds the entries of each batch's losses; proves them where a trace of the forward is at hand."""

    def __init__(self) -> None:
        self._plans: list[_Plan] = []
        self._known: dict[tuple[str, int], Layout] = {}
        self._mixed: set[OutputForm] = set()

    @property
    def proved(self) -> bool:
        """Tell whether the rows of at least one loss were proved."""
        return any(plan.layouts for plan in self._plans)

    def prove(
        self,
        loss: Tensor,
        batch_size: int,
        trace: SampleTrace,
        *,
        may_be_apart: bool = False,
        assignments: Assignments = (),
    ) -> Found:
        """Find the entries of a loss, a scalar whose forward was traced, and remember the form of its graph.

        ``may_be_apart`` tells that the loss may have nothing to do with the samples, as that of a generator which
        begins with noise; ``assignments`` are the sample of each node and of each edge, in a batch of graphs. Raise
        EntryError where the step was seen to put the samples into another order.
        """
        view = TracedView(batch_size, trace, assignments)
        found, plan = _search(loss, view)
        if isinstance(trace, OrderedTrace):
            for entry in found.entries:
                if entry.exact and trace.is_elsewhere(entry.node, entry.output_nr, entry.place):
                    raise EntryError(_order_problem(entry.node, batch_size))
        # A loss that nothing of the samples goes into is remembered only where a whole trace has shown it.
        if found.entries or (may_be_apart and trace.complete and not found.unclear):
            self._plans.insert(0, plan)
            del self._plans[_PLANS:]
            self._known |= {(name, layout.ndim): layout for layout, name, _ in plan.layouts}
        if found.entries:  # what is unclear beside them holds no rows of samples, and will not in later batches
            self._mixed |= view.unclear.keys()
        return found

    def locate(
        self,
        loss: Tensor,
        batch_size: int,
        trace: SampleTrace | None,
        *,
        may_be_apart: bool = False,
        assignments: Assignments = (),
    ) -> Found:
        """Find the entries of a loss in the best way there is: a graph of known form, else a trace, else sizes.

        Arguments are those of :meth:`prove`, except that there may be no trace; one that failed is not used.
        """
        found = self.find(loss, batch_size, assignments=assignments)
        if found is not None:
            return found
        if trace is None or trace.failure is not None or batch_size == 1:  # a single sample has none to be told from
            return self.guess(loss, batch_size, assignments=assignments)
        return self.prove(loss, batch_size, trace, may_be_apart=may_be_apart, assignments=assignments)

    def find(self, loss: Tensor, batch_size: int, *, assignments: Assignments = ()) -> Found | None:
        """Find the entries of a loss whose graph has a form that was proved; return None where its form is new."""
        for position, plan in enumerate(self._plans):
            found = _follow(plan, loss, batch_size, assignments)
            if found is not None:
                # Losses of the same form tend to follow each other: the newest is tried first.
                if position:
                    self._plans.insert(0, self._plans.pop(position))
                return found
        return None

    def guess(self, loss: Tensor, batch_size: int, *, assignments: Assignments = ()) -> Found:
        """Find the entries of a loss by what is known of other losses, and by sizes that allow one answer only."""
        return _search(loss, SizedView(batch_size, self._known, self._mixed, assignments))[0]


def entry_error(unclear: tuple[str, ...], batch_size: int, *, remedy: str = _REMEDY) -> EntryError:
    """Make the error for a loss in whose graph the samples' rows cannot be found, with the ``unclear`` sizes."""
    if unclear:
        problem = f"in {', '.join(unclear)} no dimension holds {batch_size} samples that only change their own rows"
    else:
        problem = f"nothing in the graph of the loss was seen to depend on one of the {batch_size} samples"
        remedy = f"{remedy} {_HIDDEN}"
    return EntryError(
        f"expected a batch of {batch_size} samples, each of which has rows of its own where the gradient of the loss "
        f"enters the network, but {problem}. {remedy}"
    )


def _order_problem(node: Node, batch_size: int) -> str:
    return (
        f"expected the {batch_size} samples in the order of the batch where the gradient of the loss enters the "
        f"network, but in {node.name()} a sample was seen to change the rows of another one, and none of its own: the "
        "step sorts or shuffles the samples, or leaves some out. Do that in the collate_fn, so that the batch arrives "
        "as the network sees it (in mode 'prune' together with SparseLossMixin and `sample_indices(batch)`)."
    )


def _search(loss: Tensor, view: SizedView) -> tuple[Found, _Plan]:
    """Walk from a loss to its entries, a second time where there are several."""
    first = _Walk(loss, view)
    # Where no layer has rows that can be told (jagged tensors), the last place of the loss part with some is an entry.
    if not first.entered and view.unclear:
        unclear = view.unclear.copy()
        view.unclear.clear()  # what the second walk finds unclear counts alone, if it finds an entry
        above = _Walk(loss, view, above=True)
        if above.entered:
            return above.result()
        view.unclear.update(unclear)
    # One of several may lie below another. The second walk knows what lies inside the network, so that what one part
    # of it hands to the next is not taken for the loss part's.
    if len(first.entered) > 1:
        return _Walk(loss, view, inner=frozenset(nodes_below([child for child, _ in first.entered]))).result()
    return first.result()


class _Walk:
    """One walk from a loss to its entries; with ``above``, to the last places above the layers that have rows."""

    def __init__(
        self, loss: Tensor, view: SizedView, *, inner: frozenset[Node] = frozenset(), above: bool = False
    ) -> None:
        self._above = above
        self._view = view
        self._inner = inner
        self.plan = _Plan()
        self.entered: _Entered = {}
        pending: list[Node] = [] if loss.grad_fn is None else [loss.grad_fn]
        seen = set(pending)  # marked when they are found: a plan is followed in this very order
        while pending:
            node = pending.pop()
            for verdict, (child, _) in zip(self._decide(node), node.next_functions, strict=True):
                if verdict == "walk" and child is not None and child not in seen:
                    seen.add(child)
                    pending.append(child)

    def _decide(self, node: Node) -> tuple[Verdict, ...]:
        # An edge is entered, passed by, or walked on; what lies behind an entry is the network's own affair.
        verdicts = tuple(self._verdict(node, position, *edge) for position, edge in enumerate(node.next_functions))
        self.plan.steps.append((form_of(node), verdicts))
        return verdicts

    def _verdict(self, node: Node, position: int, child: Node | None, output_nr: int) -> Verdict:
        if child is None or is_leaf(child) or self._view.is_pure(child, output_nr):
            return "pass"
        if child in self._inner or owns_parameters(child, self._view) or (self._above and self._is_last(child)):
            layout = self._view.layout(child, output_nr)
            if layout is not None:
                # What an inner node gives to the entry closer to the loss carries the network's own gradient back.
                nested = child in self._inner
                # Several edges of the loss part may lead to one output: it is one entry with all of them.
                self.entered.setdefault((child, output_nr), (layout, nested, []))[2].append((node, position))
                self.plan.layouts.append((layout, form_of(child), nested))
                return "enter"
            self._view.add_unclear(child, output_nr)
        return "walk"

    def _is_last(self, node: Node) -> bool:
        """Tell whether the samples' rows are unknown in all that a node was computed from."""
        below = [edge for edge in edges_of(node) if not is_leaf(edge[0]) and not self._view.is_pure(*edge)]
        return bool(below) and all(self._view.layout(*edge) is None for edge in below)

    def result(self) -> tuple[Found, _Plan]:
        entries = _entries(self.entered, self._view.batch_size, self._view.assignments)
        return Found(entries, unclear=tuple(self._view.unclear.values())), self.plan


def _entries(entered: _Entered, batch_size: int, assignments: Assignments) -> tuple[Entry, ...]:
    """Make the entries of what was entered, without those whose sizes do not fit."""
    entries = []
    for (child, output_nr), (layout, nested, edges) in entered.items():
        shape = shape_of(child, output_nr)
        place = None if shape is None else layout.place(shape, batch_size, assignments)
        if place is not None:
            entries.append(Entry(child, output_nr, place, tuple(edges), nested, layout.exact))
    return tuple(entries)


def _follow(plan: _Plan, loss: Tensor, batch_size: int, assignments: Assignments) -> Found | None:
    """Follow a proved walk; return None where this graph has another form, or its sizes do not fit."""
    pending = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(pending)
    layouts = iter(plan.layouts)
    entered: _Entered = {}
    for name, planned in plan.steps:
        node = pending.pop() if pending else None
        if node is None or name != form_of(node) or len(planned) != len(following := node.next_functions):
            return None  # at the first difference the plan is of no use
        for position, (verdict, (child, output_nr)) in enumerate(zip(planned, following, strict=True)):
            if verdict == "pass":
                continue
            if child is None:
                return None
            if verdict == "enter":
                layout, child_name, nested = next(layouts)
                if form_of(child) != child_name:
                    return None
                entered.setdefault((child, output_nr), (layout, nested, []))[2].append((node, position))
            elif child not in seen:
                seen.add(child)
                pending.append(child)
    if pending:  # they belong to a part that the plan lacks, as a term that starts later
        return None
    entries = _entries(entered, batch_size, assignments)
    return Found(entries) if len(entries) == len(entered) else None
