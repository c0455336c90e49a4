"""Step 1 of a batch: count its samples, and take some of them.

A batch may be any nesting of tensors of any layout, arrays, lists, tuples, named tuples, dicts, ``UserDict``,
dataclasses, attrs classes and TensorDicts. It may also list its samples one by one, as in detection and for sequences
of several lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_ast.core.batch.containers import Slicer, are_images, children_of, is_listing, leaves_of, row_count
from lightning_ast.core.batch.graphs import graph_count, graphs_in
from lightning_ast.errors import BatchError, EmptyBatchError

__all__ = ["batch_size_of", "leading_sizes", "listed_length", "listings_of", "samples_of", "select_batch"]


def batch_size_of(batch: Any) -> int:
    """Count the samples of a batch, at least 1.

    Their number is the most common leading dimension of its tensors and arrays (ties: the first one's), those inside
    lists only where there are no others. A list of samples, each a dict, tuple or the like of the same form, holds one
    sample an entry where the entries hold scalars or tensors whose leading dimensions differ; so do lists side by side
    (images of several sizes, and their targets). A torch_geometric batch holds its graphs.

    Args:
        batch: Any nesting of tensors; tensors without dimensions are ignored.

    Raises:
        EmptyBatchError: The leading dimension is 0, or there is nothing in the batch.
        BatchError: No tensor with a leading dimension was found, or it is a list of tensors of several lengths.

    Example:
        >>> import torch
        >>> batch_size_of({"image": torch.zeros(8, 3, 4, 4), "label": torch.zeros(8), "scale": torch.tensor(2.0)})
        8
    """
    graphs = graph_count(graphs_in(batch))
    if graphs is not None:
        return graphs
    samples = samples_of(batch)  # before the tensors: boxes of an image have a leading dimension, too
    if samples is not None:
        return len(samples)
    # A list beside tensors holds features of several layers, or texts: its tensors count where there are no others.
    leading = leading_sizes(batch, lists=False) or leading_sizes(batch)
    if not leading:
        empty = isinstance(batch, (list, tuple, Mapping)) and len(batch) == 0
        raise (EmptyBatchError if empty else BatchError)(
            f"expected a batch that holds tensors of shape (B, ...), got {type(batch).__name__} without any. Use "
            "SparseLossMixin and override `count_samples(batch)` and `select_batch(batch, indices)`."
        )
    alike = leading.count(leading[0]) == len(leading)  # the usual case, which needs no Counter
    size = leading[0] if alike else Counter(leading).most_common(1)[0][0]
    if size == 0:
        raise EmptyBatchError("expected at least one sample in the batch, got a leading dimension of 0.")
    if not alike and _is_ragged(batch):
        raise BatchError(
            f"cannot tell whether a {type(batch).__name__} of {len(batch)} tensors with leading dimensions "
            f"{', '.join(map(str, leading[:8]))} holds a sample an entry. Use SparseLossMixin and override "
            "`count_samples(batch)` and `select_batch(batch, indices)`; or pad the tensors, or load dicts that hold an "
            "index beside each."
        )
    return size


def select_batch(batch: Any, indices: Tensor, *, batch_size: int | None = None) -> Any:
    """Take the samples ``indices`` out of ``batch``, keeping its structure.

    Tensors and arrays whose leading dimension is the batch size are indexed. So are lists and tuples of B entries of
    which fewer than half (of the batch itself: none) hold such a tensor: names, paths, one dict or one ragged tensor a
    sample. Numbers, strings, other tensors and objects without tensors are passed through. A tensor whose batch
    dimension is not the first (time-major sequences) and packed sequences need an override of ``select_batch`` (and
    ``count_samples``) on the module; of graphs, those of torch_geometric do not.

    Args:
        batch: Any nesting of tensors (sparse and nested ones keep their layout), arrays, lists, tuples, named tuples,
            dicts, ``UserDict``, dataclasses, attrs classes and TensorDicts. It is not changed.
        indices: ``(k,)`` integer positions in the batch.
        batch_size: The number of samples B, where it is known; None takes :func:`batch_size_of`.

    Raises:
        BatchError: No tensor has a leading dimension, or the batch holds what cannot be indexed: a ``PackedSequence``,
            an iterator, an object that can be moved to a device and is no container (a graph), a block-sparse tensor.

    Example:
        >>> import torch
        >>> select_batch((torch.arange(4), ["a", "b", "c", "d"], 7), torch.tensor([2, 0]))
        (tensor([2, 0]), ['c', 'a'], 7)
    """
    size = batch_size_of(batch) if batch_size is None else batch_size
    return Slicer(batch, size, indices, listings_of(batch, size)).take(batch)


def samples_of(batch: Any, size: int | None = None) -> list[Any] | None:
    """List the samples of a batch that holds them one by one; return None where they are the rows of its tensors."""
    found = _listing(batch, size)
    return None if found is None else found[0]


def listings_of(batch: Any, size: int) -> frozenset[int]:
    """Return the ids of the sequences in a batch of a known size that have one entry for each sample."""
    found = _listing(batch, size)
    return frozenset() if found is None else frozenset(map(id, found[1]))


def _listing(batch: Any, size: int | None) -> tuple[list[Any], Sequence[Any]] | None:
    """Find the samples of a batch that lists them one by one, and the sequences that list them."""
    try:
        entries = _entries(batch)
        # A list of containers of one form: samples, or the tensors of the whole batch in several containers. Scalars
        # tell samples, for a whole batch's dict has none; else tensors that do not agree on a leading dimension do.
        if entries is not None and size in (None, len(entries)):
            scalars = len(entries) > 1 and all(map(_has_scalar, entries))
            one_dict = size is None and len(entries) == 1
            if scalars or not (one_dict or _agree_on_rows(entries, size)):
                return entries, [batch]
        if size is not None and _lists_tensors(batch, size):
            return list(batch), [batch]
        # Lists side by side, as a collate function that transposes its samples makes them: images, then targets.
        columns = _parallel_lists(batch)
        if columns is not None and size in (None, len(columns[0])):
            entries = list(zip(*columns, strict=True))
            if (size is not None and any(map(are_images, columns))) or not _agree_on_rows(entries, size):
                return entries, columns
    except BatchError:  # a packed sequence: it lists nothing
        pass
    return None


def _lists_tensors(batch: Any, size: int) -> bool:
    """Tell whether a batch is a list of one tensor for each of B samples, none of which has B rows."""
    is_one = is_listing(batch) and len(batch) == size and all(map(_is_leaf, batch))
    return is_one and size not in leading_sizes(batch) and _is_uniform(batch)


def listed_length(batch: Any) -> int | None:
    """Count the samples of a batch that lists them, as earlier batches did; return None where it does not."""
    if is_listing(batch) and batch and all(map(_is_leaf, batch)):
        return len(batch)
    try:
        entries = _entries(batch) or next(iter(_parallel_lists(batch) or ()), None)
    except BatchError:
        return None
    return None if entries is None else len(entries)


def _entries(batch: Any) -> list[Any] | None:
    """List the entries of a batch that is a list of containers of one form; return None for any other."""
    is_one = is_listing(batch) and len(batch) > 0 and not any(map(_is_leaf, batch)) and _is_uniform(batch)
    return list(batch) if is_one else None


def _parallel_lists(batch: Any) -> list[Sequence[Any]] | None:
    """Find the lists of one length that a batch consists of; return None where there are tensors beside them."""
    children = None if _is_leaf(batch) else children_of(batch)
    if not children:
        return None
    columns: list[Sequence[Any]] = [child for child in children if is_listing(child)]
    beside = [child for child in children if not is_listing(child)]
    if not columns or len({len(column) for column in columns}) > 1 or any(map(leading_sizes, beside)):
        return None
    # Lists of tensors of several forms are the outputs of several layers, and no samples.
    if len(columns[0]) == 0 or not all(_is_uniform(column) for column in columns if leading_sizes(column)):
        return None
    return columns


def leading_sizes(part: Any, *, lists: bool = True) -> list[int]:
    """Collect the leading dimensions of the tensors and arrays in a part of a batch, with or without lists in it."""
    parts = part if is_listing(part) else [part]
    sizes = (row_count(leaf) for each in parts for leaf in leaves_of(each, lists=lists))
    return [size for size in sizes if size is not None]


def _is_uniform(entries: Sequence[Any]) -> bool:
    first = _form(entries[0])
    return first is not None and all(_form(entry) == first for entry in entries)


def _is_ragged(batch: Any) -> bool:
    """Tell whether a batch is a list of tensors that differ only in length, where no length is that of most of them."""
    if not is_listing(batch) or not all(isinstance(entry, Tensor) and not entry.is_nested for entry in batch):
        return False
    forms = {(entry.dtype, entry.shape[1:]) for entry in batch}
    lengths = Counter(entry.shape[0] for entry in batch if entry.ndim > 0)
    return len(forms) == 1 and not (lengths and 2 * max(lengths.values()) > lengths.total())


def _agree_on_rows(entries: list[Any], size: int | None) -> bool:
    """Tell whether the tensors in the entries of a list have one row for each sample, so that no entry is a sample."""
    sizes = [leading_sizes(entry) for entry in entries]
    every = [each for own in sizes for each in own]
    # Strings and numbers alone: where B is known, as many entries are its samples.
    if not every:
        return size is None
    common = Counter(every).most_common(1)[0][0] if size is None else size
    if common == 0:  # samples of which many have nothing in them
        return not any(every)
    # More than half, because a whole batch's dict may hold a few tensors without a batch dimension.
    return all(2 * own.count(common) > len(own) for own in sizes)


def _form(entry: Any) -> Any:
    """Describe the form of an entry, for comparison with others; return None for what is no part of a sample."""
    if isinstance(entry, (Tensor, np.ndarray)):  # the sizes may differ from sample to sample
        return type(entry), entry.dtype, entry.ndim
    if isinstance(entry, Mapping):
        return Mapping, frozenset(entry.keys())
    if is_listing(entry):
        return type(entry), tuple(_form(part) or type(part) for part in entry)
    return None if children_of(entry) is None else type(entry)


def _is_leaf(part: Any) -> bool:
    return isinstance(part, (Tensor, np.ndarray))


def _has_scalar(entry: Any) -> bool:
    values = children_of(entry) or ()
    return any(isinstance(v, (int, float, str)) or (isinstance(v, Tensor) and v.ndim == 0) for v in values)
