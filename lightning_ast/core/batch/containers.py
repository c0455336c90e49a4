"""Step 1 for the containers and tensors of a batch: list them, and make the same ones with some of the samples."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sized
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_ast.core.batch.graphs import graph_count, take_graphs
from lightning_ast.errors import BatchError

__all__ = ["Slicer", "are_images", "children_of", "holds_floats", "is_listing", "is_plain", "leaves_of", "row_count"]

_REMEDY = "use SparseLossMixin and override `count_samples(batch)` and `select_batch(batch, indices)`."


def row_count(leaf: Any) -> int | None:
    """Return the leading dimension of a tensor or an array; None where it has none."""
    if leaf.ndim == 0:
        return None
    return int(leaf.size(0) if isinstance(leaf, Tensor) else leaf.shape[0])  # strided nested ones have no shape


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is an ordinary one: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def holds_floats(leaf: Any) -> bool:
    """Tell whether a tensor or an array holds floating-point numbers."""
    return leaf.is_floating_point() if isinstance(leaf, Tensor) else leaf.dtype.kind == "f"


def is_listing(part: Any) -> TypeGuard[list[Any] | tuple[Any, ...] | deque[Any]]:
    """Tell whether a container is a plain sequence: a list, a tuple without names or a deque."""
    return isinstance(part, (list, tuple, deque)) and not hasattr(part, "_fields")


def are_images(part: Any) -> bool:
    """Tell whether a list holds nothing but images ``(C, H, W)``, whose channels may be as many as the samples."""
    planes = [each for each in part if isinstance(each, Tensor) and each.ndim == 3]
    pixels = [each for each in planes if each.is_floating_point() or each.dtype is torch.uint8]  # others are ids
    return 0 < len(part) == len(pixels)


def children_of(part: Any) -> list[Any] | None:
    """List what a container holds; return None for an object that is no container."""
    if type(part) in (list, tuple):  # the usual case, without a look at all the other kinds
        return list(part)
    if isinstance(part, PackedSequence):
        # Its rows are sorted by time step: those of one sample do not lie along a dimension.
        raise BatchError(f"a PackedSequence has no batch dimension to index: {_REMEDY}")
    if _is_tensordict(part):
        try:
            return [part.get(key) for key in part.keys()]  # noqa: SIM118  # iterating goes over its rows
        except RuntimeError:  # lazily stacked rows of several lengths have no common tensor
            return list(part.unbind(0))
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, (list, tuple, deque)):
        return list(part)
    names = _field_names(part)
    return None if names is None else [getattr(part, name) for name in names if hasattr(part, name)]


def leaves_of(part: Any, *, lists: bool = True) -> Iterator[Tensor | np.ndarray[Any, Any]]:
    """Find the tensors and arrays in a nesting of containers, plain sequences included or not."""
    if isinstance(part, (Tensor, np.ndarray)):
        yield part
    elif lists or not is_listing(part):
        for child in children_of(part) or ():
            yield from leaves_of(child, lists=lists)


class Slicer:
    """Takes the samples at ``(k,)`` indices out of a batch of nested containers, and keeps the types of these."""

    def __init__(self, batch: Any, size: int, indices: Tensor, listings: frozenset[int]) -> None:
        self._batch = batch
        self._size = size
        self._on_device = {indices.device: indices}
        self._indices = indices
        self._listings = listings  # ids of the sequences that certainly have one entry for each sample
        # One dict for the whole batch: jagged tensors can be combined only where they share their offsets.
        self._offsets: dict[int, Tensor] = {}

    @cached_property
    def positions(self) -> list[int]:
        """Return the positions to take, on the host."""
        # The host waits for the device here, so this is read only where a list or an array needs it.
        return [int(i) for i in self._indices.tolist()]

    def take(self, part: Any) -> Any:
        """Take the chosen samples out of a part of the batch; what has no entry for each sample stays as it is."""
        if isinstance(part, (Tensor, np.ndarray)):
            if row_count(part) != self._size:
                return part
            return self.tensor(part) if isinstance(part, Tensor) else self.array(part)
        if graph_count(part) == self._size:
            graphs = take_graphs(part, self._indices)
            return self.unknown(part) if graphs is None else graphs
        names = _field_names(part)
        if isinstance(part, PackedSequence) or (names is None and _may_hold_samples(part, self._size)):
            return self.unknown(part)
        return self._container(part, names or [])

    def _container(self, part: Any, names: list[str]) -> Any:
        if _is_tensordict(part):
            return self._tensordict(part)
        if isinstance(part, (list, tuple, deque)):
            return self._sequence(part)
        if isinstance(part, Mapping):
            return self._mapping(part)
        return self._object(part, names) if names else part

    def tensor(self, tensor: Tensor) -> Tensor:
        """Take rows of a tensor that has one row for each sample."""
        try:
            return _take_rows(tensor, self._at(tensor.device), self._offsets)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            layout = f"{type(tensor).__name__} of layout {tensor.layout}"
            raise BatchError(f"the samples of a {layout} cannot be indexed: {_REMEDY}") from error

    def array(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Take rows of an array that has one row for each sample."""
        return array[self.positions]

    def entries(self, part: Any) -> list[Any]:
        """Take entries of a sequence that has one entry for each sample."""
        return [part[i] for i in self.positions]

    def unknown(self, part: Any) -> Any:
        """Refuse an object that may hold samples but cannot be taken apart."""
        kind = type(part).__name__
        raise BatchError(f"an object of type {kind} in the batch cannot be indexed by samples: {_REMEDY}")

    def _sequence(self, part: Any) -> Any:
        if hasattr(part, "_fields"):  # a named tuple
            return part._make([self.take(entry) for entry in part])
        # Images beside other things are one for each sample, even where their channels are as many as the samples.
        listed = id(part) in self._listings or (part is not self._batch and are_images(part))
        entry_a_sample = len(part) == self._size and (listed or self._few_rows(part))
        entries = self.entries(part) if entry_a_sample else [self.take(entry) for entry in part]
        return self._remake(part, entries, "a list")

    def _few_rows(self, part: Any) -> bool:
        # Entries with B rows are tensors of the whole batch, such as the features of several layers.
        with_rows = sum(any(row_count(t) == self._size for t in leaves_of(entry)) for entry in part)
        return with_rows == 0 if part is self._batch else 2 * with_rows < self._size

    def _mapping(self, part: Any) -> Any:
        items = {key: self.take(part[key]) for key in part}
        if isinstance(part, (UserDict, defaultdict)):  # these copy themselves; their constructors vary
            taken = copy.copy(part)
            taken.update(items)
        else:
            taken = self._remake(part, items, "a dict")
        own = vars(taken) if hasattr(taken, "__dict__") else {}
        # Subclasses keep more than items, such as the encodings of a tokenizer or image sizes, one for each sample.
        for name, value in getattr(part, "__dict__", {}).items():
            if name != "data" and (name not in own or own[name] is value):
                own[name] = self.take(value)
        return taken

    def _remake(self, part: Any, content: Any, source: str) -> Any:
        try:
            return type(part)(content)
        except Exception as error:
            raise BatchError(f"a {type(part).__name__} cannot be made from {source}: {_REMEDY}") from error

    def _object(self, part: Any, names: list[str]) -> Any:
        taken = copy.copy(part)
        for name in dict.fromkeys((*getattr(part, "__dict__", {}), *names)):
            if isinstance(getattr(type(part), name, None), cached_property):
                # It was computed from the whole batch: it is computed anew from the selected samples.
                taken.__dict__.pop(name, None)
            elif hasattr(part, name):
                object.__setattr__(taken, name, self.take(getattr(part, name)))  # a frozen class refuses setattr()
        return taken

    def _tensordict(self, part: Any) -> Any:
        if part.batch_size:  # a TensorDict with a batch dimension indexes itself
            if part.batch_size[0] != self._size:
                return part
            device = next((leaf.device for leaf in leaves_of(part) if isinstance(leaf, Tensor)), torch.device("cpu"))
            return part[self._at(device)]
        taken = part.clone(recurse=False)
        for key in part.keys():  # noqa: SIM118
            taken.set(key, self.take(part.get(key)))
        return taken

    def _at(self, device: torch.device) -> Tensor:
        if device not in self._on_device:
            self._on_device[device] = self._indices.to(device)
        return self._on_device[device]


def _take_rows(tensor: Tensor, indices: Tensor, shared: dict[int, Tensor]) -> Tensor:
    """Take the rows at ``(k,)`` positions, on its device, out of a tensor ``(B, ...)``, and keep its layout.

    ``shared`` has the offsets of the rows taken, by the id of the jagged offsets that they come from.
    """
    if tensor.is_nested:
        taken: Tensor = _take_nested(tensor, indices.tolist(), shared)
        return taken
    if tensor.layout in (torch.strided, torch.sparse_coo):
        return tensor.index_select(0, indices)
    # torch cannot index rows of the compressed layouts, but of COO, which each of them turns into.
    return tensor.to_sparse(layout=torch.sparse_coo).index_select(0, indices).to_sparse(layout=tensor.layout)


def _take_nested(tensor: Any, indices: list[int], shared: dict[int, Tensor]) -> Any:
    rows = tensor.unbind()  # views: torch has no index_select for nested tensors
    taken: Any = torch.nested.as_nested_tensor([rows[i] for i in indices], layout=tensor.layout)
    if tensor.layout is not torch.jagged:
        return taken
    # Tensors that shared their offsets must share the new ones: torch compares offsets by identity.
    known = shared.setdefault(id(tensor.offsets()), taken.offsets())
    if known is taken.offsets() or taken.values().shape[0] != int(known[-1]):
        return taken
    return torch.nested.nested_tensor_from_jagged(taken.values(), offsets=known)


def _is_tensordict(part: Any) -> bool:
    """Tell whether an object is a TensorDict or a tensorclass; their package need not be installed."""
    return isinstance(getattr(part, "batch_size", None), torch.Size) and hasattr(part, "get")


def _field_names(part: Any) -> list[str] | None:
    """List the fields of an instance of a dataclass or an attrs class; return None for anything else."""
    if isinstance(part, type):
        return None
    if dataclasses.is_dataclass(part):
        return [field.name for field in dataclasses.fields(part)]
    attributes = getattr(type(part), "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]


def _may_hold_samples(part: Any, size: int) -> bool:
    """Tell whether an object that is no container may hold samples, so that passing it on would be wrong."""
    known = (str, bytes, int, float, type, nn.Module, list, tuple, deque, Mapping)
    if isinstance(part, known) or _is_tensordict(part):
        return False
    if isinstance(part, Iterator) or callable(getattr(part, "to", None)):  # what moves to a device holds tensors
        return True
    if any(isinstance(value, Tensor) for value in getattr(part, "__dict__", {}).values()):
        return True
    return isinstance(part, Sized) and len(part) == size
