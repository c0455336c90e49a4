"""Step 1 for a batch that lists its samples one by one, as in detection and for sequences of several lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_ast.core.batch.containers import are_images, children_of, is_listing, leaves_of
from lightning_ast.core.batch.rows import holds_floats, row_count
from lightning_ast.errors import BatchError

__all__ = [
    "first_floats",
    "is_ragged",
    "is_uniform",
    "leading_sizes",
    "listed_length",
    "listings_of",
    "parallel_lists",
    "samples_of",
]


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
        columns = parallel_lists(batch)
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
    return is_one and size not in leading_sizes(batch) and is_uniform(batch)


def listed_length(batch: Any) -> int | None:
    """Count the samples of a batch that lists them, as earlier batches did; return None where it does not."""
    if is_listing(batch) and batch and all(map(_is_leaf, batch)):
        return len(batch)
    try:
        entries = _entries(batch) or next(iter(parallel_lists(batch) or ()), None)
    except BatchError:
        return None
    return None if entries is None else len(entries)


def _entries(batch: Any) -> list[Any] | None:
    """List the entries of a batch that is a list of containers of one form; return None for any other."""
    is_one = is_listing(batch) and len(batch) > 0 and not any(map(_is_leaf, batch)) and is_uniform(batch)
    return list(batch) if is_one else None


def parallel_lists(batch: Any) -> list[Sequence[Any]] | None:
    """Find the lists of one length that a batch consists of; return None where there are tensors beside them."""
    children = None if _is_leaf(batch) else children_of(batch)
    if not children:
        return None
    columns: list[Sequence[Any]] = [child for child in children if is_listing(child)]
    beside = [child for child in children if not is_listing(child)]
    if not columns or len({len(column) for column in columns}) > 1 or any(map(leading_sizes, beside)):
        return None
    # Lists of tensors of several forms are the outputs of several layers, and no samples.
    if len(columns[0]) == 0 or not all(is_uniform(column) for column in columns if leading_sizes(column)):
        return None
    return columns


def leading_sizes(part: Any, *, lists: bool = True) -> list[int]:
    """Collect the leading dimensions of the tensors and arrays in a part of a batch, with or without lists in it."""
    parts = part if is_listing(part) else [part]
    sizes = (row_count(leaf) for each in parts for leaf in leaves_of(each, lists=lists))
    return [size for size in sizes if size is not None]


def first_floats(batch: Any, size: int) -> Tensor | np.ndarray[Any, Any] | None:
    """Find the first floating-point tensor or array whose rows are the samples; None where there is none."""
    if samples_of(batch, size) is not None:
        return None
    try:
        return next((leaf for leaf in leaves_of(batch) if row_count(leaf) == size and holds_floats(leaf)), None)
    except BatchError:
        return None


def is_uniform(entries: Sequence[Any]) -> bool:
    """Tell whether the entries of a sequence are of one form."""
    first = _form(entries[0])
    return first is not None and all(_form(entry) == first for entry in entries)


def is_ragged(batch: Any) -> bool:
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
