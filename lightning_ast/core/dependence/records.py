"""Step 2, the results by node: what is known about the outputs of autograd nodes.

Tensors are kept until they are compared with their shadows, up to a limit: most are never asked for. The comparison
finds where the two differ, as a profile along each dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["Dependence", "GraphNode", "Record", "Records", "shape_of"]

_MAX_ELEMENTS = 64 * 10**6
_RELATIVE_NOISE = 1e-6  # of the largest value: kernels may round differently
_RELATIVE_NOISE_DOUBLE = 1e-14
_OUTLIER = 1e3  # times the largest value that differs: above that, a value is a mask's (-1e9), and no measure of noise
_numbers = count()
GraphNode: TypeAlias = Any  # a Node, whose `metadata` torch declares as a method


@dataclass(frozen=True)
class Dependence:
    """Where a tensor depends on one sample.

    Attributes:
        shape: The tensor's shape.
        profiles: For each dimension ``d`` the summed differences over all others, ``(shape[d],)`` float64 on the CPU.
        independent: Whether it is known that no element changes with the sample: NaN hides it.
        touched: Whether it was computed from something of the sample all the same: a margin, a shared code.
        picked: Whether values chose its rows one by one, so that their number says nothing of the samples.
    """

    shape: tuple[int, ...]
    profiles: tuple[Tensor, ...]
    independent: bool
    touched: bool = True
    picked: bool = False


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
            self.found = _compare(*self.pair, picked=self.picked)
            self.known = self.found is not None
            self.pair = None  # from now on the profiles stand for the tensors, which are much larger
        elif self.found is None and self.known:
            self.found = Dependence(self.shape, _flat(self.shape), independent=True, touched=False)
        return self.found


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
            record.known = record.known and record.pair is None  # its tensors go without a comparison
            record.pair = None
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
    return shape if set(map(type, shape)) <= {int} else None


def _compare(real: Tensor, shadow: Tensor, *, picked: bool) -> Dependence | None:
    """Measure where a tensor and its shadow differ; return None where NaN or infinity in both hides it."""
    shape = tuple(real.shape)
    profiles = _flat(shape)
    if real.is_complex():  # with a dimension more, which is summed over
        real, shadow = (torch.view_as_real(tensor.resolve_conj()) for tensor in (real, shadow))
    independent = True
    box = _box(real != shadow)  # the rest of a large tensor need not be looked at
    if box is not None:
        difference = _difference(real[box], shadow[box], whole=real)
        summed = difference.double() if difference.device.type != "mps" else difference  # which has no float64
        for d, profile in enumerate(profiles):
            others = [e for e in range(real.dim()) if e != d]
            profile[box[d]] = (summed.sum(others) if others else summed).cpu().double()
        # NaN in a part that differs hides it, as in the mean of losses of which another sample's is NaN.
        independent = not bool(real[box].isnan().any() or difference.any())
    if independent and not bool(real.isfinite().all()):
        return None
    return Dependence(shape, profiles, independent, picked=picked)


def _flat(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Make the profiles of a tensor in which nothing changes."""
    return tuple(torch.zeros(size, dtype=torch.float64) for size in shape)


def _difference(real: Tensor, shadow: Tensor, *, whole: Tensor) -> Tensor:
    """Return the absolute differences of a part of a tensor and its shadow, without those that may be rounding."""
    differs = real != shadow
    if not real.is_floating_point():
        return differs.float()
    # A value of the whole that is out of all proportion to what differs is a mask's.
    largest = torch.minimum(
        _largest(whole), _OUTLIER * torch.maximum(_largest(real[differs]), _largest(shadow[differs]))
    )
    unit = torch.finfo(real.dtype).eps
    wide = real.dtype if real.dtype is torch.float64 else torch.float32
    real = real.to(wide)
    shadow = shadow.to(wide)
    size = real.abs().nan_to_num(0.0, 0.0, 0.0)
    difference = (real - shadow).abs()
    noise = _RELATIVE_NOISE_DOUBLE if wide is torch.float64 else _RELATIVE_NOISE
    # Kernels may round differently in the second run: such differences would seem to belong to every sample.
    difference = torch.where(difference > noise * largest + 2 * unit * size, difference, 0.0)
    # Infinity and NaN have no difference to compare: they differ where one of the two is finite, or another infinity.
    odd = ~(torch.isfinite(real) & torch.isfinite(shadow))
    same = (real == shadow) | (real.isnan() & shadow.isnan())
    return torch.where(odd, torch.where(same, 0.0, largest.clamp(min=1.0)), difference)


def _box(changed: Tensor) -> tuple[slice, ...] | None:
    """Find the smallest box around the places that differ; None where there are none."""
    if not bool(changed.any()):
        return None
    box = []
    for d in range(changed.dim()):
        others = [e for e in range(changed.dim()) if e != d]
        places = (changed.any(others) if others else changed).nonzero().flatten()
        box.append(slice(int(places[0]), int(places[-1]) + 1))
        changed = changed.narrow(d, box[-1].start, box[-1].stop - box[-1].start)
    return tuple(box)


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest finite absolute value of a tensor that is not empty."""
    low, high = (edge.abs() for edge in tensor.aminmax())
    largest = torch.maximum(low, high).float()
    return largest if bool(largest.isfinite()) else tensor.float().abs().nan_to_num(0.0, 0.0, 0.0).amax()
