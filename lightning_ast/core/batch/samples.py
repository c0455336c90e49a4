"""Step 1 of a batch: count its samples, and take some of them.

A batch may be any nesting of tensors of any layout, arrays, lists, tuples, named tuples, dicts, ``UserDict``,
dataclasses, attrs classes and TensorDicts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ast.core.batch.containers import Slicer
from lightning_ast.core.batch.graphs import graph_count, graphs_in
from lightning_ast.core.batch.listing import first_floats, is_ragged, leading_sizes, listings_of, samples_of
from lightning_ast.core.batch.rows import is_plain
from lightning_ast.errors import BatchError, EmptyBatchError

__all__ = ["batch_size_of", "first_input", "select_batch"]


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
    if not alike and is_ragged(batch):
        raise BatchError(
            f"cannot tell whether a {type(batch).__name__} of {len(batch)} tensors with leading dimensions "
            f"{', '.join(map(str, leading[:8]))} holds a sample an entry. Use SparseLossMixin and override "
            "`count_samples(batch)` and `select_batch(batch, indices)`; or pad the tensors, or load dicts that hold an "
            "index beside each."
        )
    return size


def first_input(batch: Any, batch_size: int) -> Tensor | None:
    """Find the first floating-point tensor with leading dimension ``batch_size``, e.g. the images; None without one."""
    leaf = first_floats(batch, batch_size)
    return leaf if isinstance(leaf, Tensor) and is_plain(leaf) else None


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
