"""Step 2, before the forward: the batch as it would be if one of its samples were another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.batch.containers import children_of, is_plain, leaves_of
from lightning_ast.core.batch.graphs import assignments_of, graphs_in
from lightning_ast.core.batch.samples import select_batch

__all__ = ["Pair", "Take", "is_real_valued", "perturbed"]

Take = Callable[[Any, Tensor], Any]
Pair = tuple[Tensor, Tensor]

_IDS = (torch.int64, torch.int32, torch.int16)
_CANDIDATES = 8  # other samples that are tried until one differs in every tensor; each costs a copy of the batch


def perturbed(batch: Any, batch_size: int, sample: int, take: Take | None = None) -> list[Pair]:
    """Pair the tensors of a batch with copies in which one sample is another; the batch itself is not changed.

    Tensors that all samples share are left out. Where B is 1 there are no pairs. Raise BatchError if the batch cannot
    be indexed.
    """
    if batch_size < 2:
        return []
    # A sample gets the values of another one, not noise: ids must stay in range, or an embedding would fail.
    with torch.no_grad():
        graphs = graphs_in(batch)
        pairs = [] if graphs is None else list(_graph_pairs(graphs, assignments_of(graphs)[0], sample))
        if graphs is None or graphs is not batch:
            pairs += _Swap(batch, batch_size, sample, take).pairs()
        return pairs


def is_real_valued(tensor: Tensor) -> bool:
    """Tell whether a tensor holds floating-point or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


class _Swap:
    """Swaps one sample of a batch for others, tensor by tensor."""

    def __init__(self, batch: Any, batch_size: int, sample: int, take: Take | None) -> None:
        self._batch = batch
        self._size = batch_size
        self._sample = sample
        self._take: Take = take or partial(select_batch, batch_size=batch_size)
        self._own_take = take is not None
        self._leaves = list(_tensors(batch))
        self._every = torch.arange(batch_size, device=self._leaves[0].device if self._leaves else "cpu")

    def pairs(self) -> list[Pair]:
        """Pair each tensor that can be changed with its changed copy; masks only where nothing else can be."""
        every = range(len(self._leaves))
        if self._own_take and not self._can_repeat():
            changed = {k: self._without_repeats(k) for k in every}
        else:
            masks = [k for k in every if _is_mask(self._leaves[k])]
            # A mask decides which rows take part, so what changes with it is not the sample alone.
            changed = self._changed([k for k in every if k not in masks]) or self._changed(masks)
        return [(_plain(self._leaves[k]), shadow) for k, shadow in sorted(changed.items()) if shadow is not None]

    def _changed(self, wanted: list[int]) -> dict[int, Tensor | None]:
        """Change some of the tensors, by other samples where that changes them and by other values where not."""
        changed: dict[int, Tensor | None] = {}
        first: list[Tensor] = []
        # The sample before it comes first, for it is there in the shortest batch too.
        for step in range(1, min(_CANDIDATES + 1, self._size)):
            left = [k for k in wanted if changed.get(k) is None]
            if not left:
                break
            # The same batch, with another sample a second time in this one's place.
            other = (self._sample - step) % self._size
            taken = self._taken(self._every.where(self._every != self._sample, other))
            first = first or taken
            if len(taken) == len(self._leaves):
                changed.update({k: _swapped(self._leaves[k], taken[k]) for k in left})
        changed.update({k: self._tweaked(k, first) for k in wanted if changed.get(k) is None})
        return {k: shadow for k, shadow in changed.items() if shadow is not None}

    def _taken(self, indices: Tensor) -> list[Tensor]:
        return list(_tensors(self._take(self._batch, indices)))

    def _can_repeat(self) -> bool:
        """Tell whether a sample that is asked for twice is given twice; a way to take by masks cannot."""
        index = self._every[self._sample :][:1]
        try:
            once, twice = ([t.shape for t in self._taken(indices)] for indices in (index, index.repeat(2)))
        except Exception:  # it takes whole batches alone; what follows fails by itself where that is a fault
            return True
        return once != twice

    def _without_repeats(self, k: int) -> Tensor | None:
        """Change the rows of a tensor that the batch has with the sample, and has not without it."""
        leaf = self._leaves[k]
        parts = [self._one_less, self._taken(self._every[: self._sample])]
        if not is_real_valued(leaf) or _rows(leaf) is None or any(len(part) != len(self._leaves) for part in parts):
            return None
        shorter, before = (part[k] for part in parts)
        missing = leaf.shape[0] - (_rows(shorter) or 0)
        if leaf.shape[1:] != shorter.shape[1:] or missing < 1:
            return None
        shadow = _copy(leaf)
        start = _rows(before) or 0
        return _changed_at(shadow, shadow[start : start + missing])

    @cached_property
    def _one_less(self) -> list[Tensor]:
        """Take the batch without the sample."""
        return self._taken(self._every[self._every != self._sample])

    def _tweaked(self, k: int, taken: list[Tensor]) -> Tensor | None:
        """Change a sample's own values, where swapping it for another has changed nothing."""
        leaf = self._leaves[k]
        if leaf.is_nested:
            return self._tweaked_nested(leaf)
        # A tensor that comes back as the same object was not indexed: it is shared, or another sample's own.
        if leaf.layout is not torch.strided or any(leaf is kept for kept in taken):
            return None
        aligned = len(taken) == len(self._leaves)
        # An entry of a list that holds this sample alone: another sample's stood in its place, or its shape differs.
        entry = aligned and (taken[k].shape != leaf.shape or any(taken[k] is other for other in self._leaves))
        if entry or (not aligned and not (leaf.dim() and leaf.shape[0] == self._size)):
            return _other_values(_copy(leaf))
        dim = self._batch_dim(k) if aligned else 0
        if dim is None:
            return None
        shadow = _copy(leaf)
        return _changed_at(shadow, shadow.select(dim, self._sample))

    def _tweaked_nested(self, leaf: Tensor) -> Tensor | None:
        if _is_jagged(leaf):
            offsets: Tensor = leaf.offsets()  # type: ignore[attr-defined]  # of NestedTensor
            shadow = _copy(leaf)
            return _changed_at(shadow, shadow[int(offsets[self._sample]) : int(offsets[self._sample + 1])])
        rows = [row.detach() for row in leaf.unbind()]
        values = _other_values(rows[self._sample])
        if values is None:
            return None
        rows[self._sample] = values
        return torch.nested.nested_tensor(rows)

    def _batch_dim(self, k: int) -> int | None:
        """Find the dimension of a tensor that becomes shorter when the batch has a sample less."""
        if len(self._one_less) != len(self._leaves) or self._one_less[k].dim() != self._leaves[k].dim():
            return None
        sizes = zip(self._leaves[k].shape, self._one_less[k].shape, strict=True)
        return next((dim for dim, pair in enumerate(sizes) if pair == (self._size, self._size - 1)), None)


def _rows(tensor: Tensor) -> int | None:
    return tensor.shape[0] if tensor.dim() and is_plain(tensor) else None


def _tensors(part: Any) -> Iterator[Tensor]:
    """Find the tensors of a batch, also those that are attributes of an object that is no container."""
    if not isinstance(part, Tensor) and children_of(part) is None:
        part = {name: value for name, value in getattr(part, "__dict__", {}).items() if isinstance(value, Tensor)}
    return (leaf for leaf in leaves_of(part) if isinstance(leaf, Tensor))


def _swapped(real: Tensor, taken: Tensor) -> Tensor | None:
    """Return the taken tensor where it shows another sample in the same place; otherwise None."""
    if real is taken or real.is_nested:
        return None
    if real.layout is not torch.strided:
        return taken
    if real.shape != taken.shape or real.dtype != taken.dtype or torch.equal(_plain(real), _plain(taken)):
        return None
    return _copy(real).copy_(_plain(taken))


def _other_values(part: Tensor) -> Tensor | None:
    """Return other valid values for a part: numbers are moved, ids change places; None where nothing changes."""
    if is_real_valued(part):
        return part * 1.25 + 0.25  # other than it, zeros too, and of the same size
    flipped = part.flip(tuple(range(part.dim())))  # the ids of the sample itself are valid for it
    if not torch.equal(flipped, part):
        return flipped
    # The same id throughout, as the label of a sample among others of its class: the one below it is valid too.
    is_id = part.dtype in _IDS and part.numel() > 0 and bool((part > 0).all())
    return part - 1 if is_id else None


def _changed_at(shadow: Tensor, part: Tensor) -> Tensor | None:
    """Write other valid values into a part of a shadow, a view of it; return None where nothing changes."""
    values = _other_values(part)
    if values is None:
        return None
    part.copy_(values)
    return shadow


def _copy(tensor: Tensor) -> Tensor:
    return _plain(tensor).clone(memory_format=torch.preserve_format)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph and without a class of its own; of a jagged one, its values."""
    if _is_jagged(tensor):
        tensor = tensor.values()
    return tensor.detach().as_subclass(Tensor) if is_plain(tensor) else tensor


def _is_jagged(tensor: Tensor) -> bool:
    return tensor.is_nested and tensor.layout is torch.jagged


def _is_mask(tensor: Tensor) -> bool:
    """Tell whether a tensor marks places. Such a column of ids (one number a sample) is no mask."""
    if tensor.dtype is torch.bool:
        return True
    if is_real_valued(tensor) or tensor.layout is not torch.strided or tensor.dim() < 2:
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())


def _graph_pairs(batch: Any, assignment: Tensor, sample: int) -> Iterator[Pair]:
    to_dict = getattr(batch, "to_dict", None)
    fields = to_dict() if callable(to_dict) else vars(batch)
    nodes = assignment == sample
    edges = fields.get("edge_index")
    on_edges = nodes[edges[0]] if isinstance(edges, Tensor) and edges.dim() == 2 else None
    for name, value in fields.items():
        # What describes the graphs themselves must stay: with other edges, other samples would change too.
        if not isinstance(value, Tensor) or name in ("batch", "ptr") or "index" in name or not value.dim():
            continue
        rows = next((r for r in (nodes, on_edges) if r is not None and len(r) == len(value)), None)
        if rows is None or not bool(rows.any()) or bool(rows.all()) or _is_mask(value):
            continue
        shadow = _copy(value)
        if is_real_valued(value):
            shadow[rows] = value[rows] * 1.25 + 0.25
        else:  # ids: those of other graphs are valid too
            others = value[~rows]
            shadow[rows] = others[torch.arange(int(rows.sum()), device=value.device) % len(others)]
        yield _plain(value), shadow
