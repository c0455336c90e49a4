"""Step 2, the results by node: what is known about the outputs of autograd nodes.

Tensors are kept until they are compared with their shadows, up to a limit: most are never asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor
from torch.autograd.graph import Node

from lightning_ast.core.dependence.profiles import Dependence, compare, independent_of_shape

__all__ = ["GraphNode", "Record", "Records", "shape_of"]

_MAX_ELEMENTS = 64 * 10**6
_numbers = count()
GraphNode: TypeAlias = Any  # a Node, whose `metadata` torch declares as a method


@dataclass(eq=False)
class Record:
    """One output of a node, and its shadow until they are compared."""

    shape: tuple[int, ...]
    pair: tuple[Tensor, Tensor] | None = None  # the output without its graph, and its shadow, while they are needed
    known: bool = True  # without tensors: True for an independent output, False where nothing is known
    picked: bool = False  # whether values chose its rows one by one
    found: Dependence | None = None  # the result of the comparison

    @property
    def elements(self) -> int:
        """Return the number of elements held."""
        return 0 if self.pair is None else self.pair[0].numel()

    def dependence(self) -> Dependence | None:
        """Compare the output with its shadow, once; return None where nothing is known."""
        if self.pair is not None:
            real, shadow = self.pair
            found = replace(compare(real, shadow), picked=self.picked)
            hidden = found.independent and not bool(real.isfinite().all())  # NaN or infinity in both hides the rest
            self.found = None if hidden else found
            self.known = not hidden
            self.pair = None  # from now on the profiles stand for the tensors, which are much larger
        elif self.found is None and self.known:
            self.found = independent_of_shape(self.shape)
        return self.found

    def forget(self) -> None:
        """Drop the tensors without a comparison."""
        if self.pair is not None:
            self.pair = None
            self.known = False


class Records:
    """Finds what is known about a node's output."""

    def __init__(self) -> None:
        # A record is kept in the metadata of its node and ends with it. Numbers tell the nodes of one thread alone, so
        # that they are used only for outputs that nothing has used yet, whose node nobody has seen.
        self._name = f"lightning_ast.records.{next(_numbers)}"
        self._unused: dict[int, list[Record | None]] = {}
        self._held: WeakValueDictionary[int, Record] = WeakValueDictionary()  # the oldest first
        self._by_memory: dict[int, WeakSet[Record]] = {}
        self._elements = 0

    def has(self, node: GraphNode, output_nr: int) -> bool:
        """Tell whether an output of a node is known."""
        return output_nr in node.metadata.get(self._name, ())

    def add(self, node: GraphNode, output_nr: int, record: Record, key: int | None) -> None:
        """Record an output of a node; ``key`` stands for its memory."""
        node.metadata.setdefault(self._name, {})[output_nr] = record
        made = self._unused.get(node._sequence_nr(), [])
        if output_nr < len(made):
            made[output_nr] = None  # from now on it is found by its node
        self._hold(record, key)

    def add_unused(self, number: int, records: list[Record | None], keys: list[int | None]) -> None:
        """Record the outputs of the node that has a number, before anything uses them."""
        self._unused[number] = records
        for record, key in zip(records, keys, strict=True):
            if record is not None:
                self._hold(record, key)

    def find(self, node: GraphNode, output_nr: int, *, by_number: bool) -> Record | None:
        """Find the record of a node's output; by the node's number only where the numbers are those of its thread."""
        record: Record | None = node.metadata.get(self._name, {}).get(output_nr)
        if record is not None or not by_number:
            return record
        made = self._unused.get(node._sequence_nr(), [])
        shape = shape_of(node, output_nr)
        if output_nr < len(made):
            record = made[output_nr]
            if record is not None and shape in (None, record.shape):
                return record
        # The results need not be in the order of the node's outputs: the shape decides then.
        fitting = [other for other in made if other is not None and other.shape == shape]
        return fitting[0] if len(fitting) == 1 else None

    def before_write(self, key: int | None) -> None:
        """Compare the outputs that lie in some memory, before it is written to."""
        # What is written later is no result of the node: the comparison cannot wait until it is asked for.
        for record in () if key is None else self._by_memory.pop(key, ()):
            record.dependence()

    def sweep(self) -> None:
        """Forget records that ended with their node or were compared, and compare the oldest above the limit."""
        self._elements = sum(record.elements for record in self._held.values())
        for number, record in list(self._held.items()):
            if self._elements > _MAX_ELEMENTS:
                self._elements -= record.elements
                record.dependence()
            if not record.elements:
                del self._held[number]
        self._by_memory = {key: held for key, held in self._by_memory.items() if held}
        self._unused = {number: made for number, made in self._unused.items() if any(r is not None for r in made)}

    def clear(self) -> None:
        """Drop all tensors."""
        for record in list(self._held.values()):
            record.forget()
        self._held.clear()
        self._by_memory.clear()
        self._unused.clear()
        self._elements = 0

    def _hold(self, record: Record, key: int | None) -> None:
        if record.elements == 0:
            return
        self._held[next(_numbers)] = record
        self._elements += record.elements
        if key is not None:
            self._by_memory.setdefault(key, WeakSet()).add(record)
        if self._elements > _MAX_ELEMENTS:  # many have ended with their nodes since the last sweep
            self.sweep()


def shape_of(node: Node, output_nr: int) -> tuple[int, ...] | None:
    """Return the shape of a node's output; None where the graph keeps none (nested tensors, undefined outputs)."""
    metadata = getattr(node, "_input_metadata", None)
    if metadata is None or output_nr >= len(metadata):
        return None
    try:
        shape = tuple(metadata[output_nr].shape)
    except (RuntimeError, AttributeError):
        return None
    return shape if all(type(size) is int for size in shape) else None
