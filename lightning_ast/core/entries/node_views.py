"""Step 3, what is known of the graph's nodes: which own parameters, which depend on samples, where the rows are."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_ast.core.batch.graphs import Assignments
from lightning_ast.core.dependence.records import shape_of
from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries import node_facts as facts
from lightning_ast.core.entries.layout import Layout, layouts_by_assignment, layouts_by_size, prove_layout
from lightning_ast.core.entries.node_facts import Edge

__all__ = ["OutputForm", "SizedView", "TracedView", "owns_parameters"]

OutputForm = tuple[str, tuple[int, ...] | None]
"""A node's name, and the sizes of its output but for the first."""


class SizedView:
    """What the form of a graph tells of its nodes, by what was proved in other graphs (``known``, ``mixed``) and by
    sizes.

    Attributes:
        unclear: The sizes of outputs whose rows could not be told, by their form.
    """

    def __init__(
        self, batch_size: int, known: dict[tuple[str, int], Layout], mixed: set[OutputForm], assignments: Assignments
    ) -> None:
        self.batch_size = batch_size
        self.assignments = assignments
        self._known = known  # the layouts that were proved, by the name of the node and its number of dimensions
        self._mixed = mixed  # the forms of outputs that were found to hold no rows of samples
        self._pure: dict[Edge, bool] = {}
        self.unclear: dict[OutputForm, str] = {}

    def is_parameter(self, leaf: Tensor) -> bool:
        """Tell whether a leaf of the graph is a parameter, and not an input."""
        return isinstance(leaf, nn.Parameter)

    def is_pure(self, node: Node, output_nr: int) -> bool:
        """Tell whether a node's output does not depend on the samples."""
        root = node, output_nr
        pending = [] if root in self._pure else [root]  # a stack of our own: a graph may be deeper than Python's
        while pending:
            edge = pending[-1]
            pure = self._pure_of(edge)  # asked again once one of its children is known
            if isinstance(pure, list):
                unknown = [child for child in pure if child not in self._pure]
                pure = all(self._pure[child] for child in pure if child in self._pure)
                if pure and unknown:
                    pending.append(unknown[0])
                    continue
            self._pure[edge] = pure
            pending.pop()
        return self._pure[root]

    def _pure_of(self, edge: Edge) -> bool | list[Edge]:
        """Tell whether an output is pure, or list the outputs that must all be pure for it."""
        node = edge[0]
        # Without a trace, only what is made of parameters by all its edges is known not to depend on the samples.
        if facts.is_leaf(node):
            return self.is_parameter(node.variable)  # type: ignore[attr-defined]
        if node.name().startswith((*facts.PICKING, *facts.OPAQUE)):
            return False
        # An edge to nothing is an input without gradient, such as the batch itself.
        children = facts.edges_of(node)
        return children if children and len(children) == len(node.next_functions) else False

    def add_unclear(self, node: Node, output_nr: int) -> None:
        """Remember a node whose rows cannot be told, unless it was found before that they are not the samples'."""
        shape = shape_of(node, output_nr)
        if shape is not None and math.prod(shape) < self.batch_size and not facts.is_layer(node.name()):
            return  # what is left of the samples after a mean: learned weights of several losses
        kind = node.name(), None if shape is None else shape[1:]
        if kind not in self._mixed:
            self.unclear.setdefault(kind, f"{node.name()} {'of a jagged tensor' if shape is None else shape}")

    def layout(self, node: Node, output_nr: int) -> Layout | None:
        """Find where the samples lie in a node's output; return None where that is not known."""
        shape = shape_of(node, output_nr)
        if shape is None or _has_shape_of_parameter(node, shape):
            return None
        known = self._known.get((facts.form_of(node), len(shape)))  # what was proved of such a node elsewhere
        if known is not None and known.place(shape, self.batch_size, self.assignments) is not None:
            return self._unless_picked(node, output_nr, known)
        # With a single sample nothing can be told apart, nor has it to be: every row is the sample's.
        if self.batch_size == 1 and shape:
            return Layout(len(shape), 0, 1, shape[0])
        # In a batch of graphs a number of rows that is a multiple of the graphs' is so by chance.
        by_assignment = list(layouts_by_assignment(shape, self.assignments))
        fitting = by_assignment or list(layouts_by_size(shape, self.batch_size))
        if len(fitting) > 1:  # as in the other tensors of this network, if these agree
            kin = {replace(layout, exact=True) for (_, ndim), layout in self._known.items() if ndim == len(shape)}
            fitting = [layout for layout in fitting if kin == {layout}]
        return self._unless_picked(node, output_nr, fitting[0]) if len(fitting) == 1 else None

    def _unless_picked(
        self, node: Node, output_nr: int, layout: Layout | None, *, picked: bool = False
    ) -> Layout | None:
        """Refuse rows that are a multiple of the samples by chance, as picked tokens and proposals can be."""
        # Values pick along the first dimension, and one row a sample is no multiple.
        if layout is None or layout.dim or layout.assigned is not None or layout.pre * layout.post == 1:
            return layout
        return None if picked or facts.rows_are_picked(node, output_nr, is_constant=self.is_pure) else layout


class TracedView(SizedView):
    """What the trace of one sample through the forward tells of the nodes."""

    def __init__(self, batch_size: int, trace: SampleTrace, assignments: Assignments = ()) -> None:
        super().__init__(batch_size, {}, set(), assignments)  # a proof takes nothing from other graphs
        self._trace = trace

    def is_parameter(self, leaf: Tensor) -> bool:
        """Tell whether a leaf of the graph is a parameter, and not an input."""
        return self._trace.depends(leaf) is False or isinstance(leaf, nn.Parameter)

    def _pure_of(self, edge: Edge) -> bool | list[Edge]:
        # Leaves were made before the trace: what it knows of them is asked for in `is_parameter`.
        dependence = None if facts.is_leaf(edge[0]) else self._trace.dependence(*edge)
        if dependence is None:
            return super()._pure_of(edge)
        return not dependence.touched

    def layout(self, node: Node, output_nr: int) -> Layout | None:
        """Find where the samples lie in a node's output; return None where that cannot be proved."""
        dependence = self._trace.dependence(node, output_nr)
        if dependence is None or dependence.independent:
            return None
        layout = prove_layout(dependence, self.batch_size, self._trace.sample, self.assignments)
        return self._unless_picked(node, output_nr, layout, picked=dependence.picked)


def owns_parameters(node: Node, view: SizedView) -> bool:
    """Tell whether a node combines parameters with what depends on the samples."""
    name = node.name()
    if name.startswith(facts.OPAQUE):  # what is inside is not seen: most likely layers
        return True
    layer = facts.is_layer(name)
    for child, output_nr in facts.edges_of(node):
        if not _leads_to_parameters(child, output_nr, view):
            continue
        shape = tuple(child.variable.shape) if facts.is_leaf(child) else shape_of(child, output_nr)  # type: ignore[attr-defined]
        if layer or shape is None or math.prod(shape) > 1:  # a single element is a temperature or a loss weight
            return True
        if name.startswith("Add") and any(_is_layers_output(other, view) for other, _ in facts.edges_of(node)):
            return True  # the bias of a layer of one output, which stands apart from the product
    return False


def _is_layers_output(node: Node | None, view: SizedView) -> bool:
    """Tell whether a node is a product with a parameter, or shows one in another shape or type."""
    while node is not None and node.name().startswith(facts.RESHAPING):  # these have one input
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(facts.PRODUCTS) and owns_parameters(node, view)


def _has_shape_of_parameter(node: Node, shape: tuple[int, ...]) -> bool:
    """Tell whether a node's output has the shape of a parameter that it works on: a weight times a constant mask."""
    leaves = [child.variable for child, _ in facts.edges_of(node) if facts.is_leaf(child)]  # type: ignore[attr-defined]
    return not facts.is_layer(node.name()) and any(tuple(leaf.shape) == shape for leaf in leaves)


def _leads_to_parameters(node: Node, output_nr: int, view: SizedView) -> bool:
    """Tell whether a node's output is made without the samples, and of a parameter."""
    if facts.is_leaf(node):
        return view.is_parameter(node.variable)  # type: ignore[attr-defined]
    if not view.is_pure(node, output_nr):
        return False
    return any(facts.is_leaf(below) and view.is_parameter(below.variable) for below in facts.nodes_below([node]))  # type: ignore[attr-defined]
