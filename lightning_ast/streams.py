"""Streams in mode ``prune``: data sets without an index, and those that have one but are read as a stream."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

__all__ = ["BlockShuffle", "IndexedStream", "SampleFilter"]


class IndexedStream(Dataset[Any]):
    """A map-style dataset over a stream that has an index, such as the ``StreamingDataset`` of LitData or MosaicML.

    Samples are read as ``stream[index]``, in the order of the DataLoader's sampler: the stream's own shuffle, its
    division among workers and its own checkpoint are not used. :class:`BlockShuffle` keeps neighbours together.

    Args:
        stream: The dataset, with ``__getitem__`` for all indices from 0 on.
        size: The number of samples in the whole stream. None asks the stream: for its ``size``, else for its length.
            With several processes it is needed where the stream has no ``size``, because the length may be that of one
            process's part.

    Raises:
        TypeError: The stream has no index.
        ValueError: The size is not known, or is not at least 1.

    Example:
        >>> class Numbers:
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         return index * 10
        >>> dataset = IndexedStream(Numbers())
        >>> len(dataset), dataset[3]
        (4, 30)
    """

    def __init__(self, stream: Any, *, size: int | None = None) -> None:
        if not self.fits(stream):
            raise TypeError(
                f"expected a stream with an index (`__getitem__`), got {type(stream).__name__}: "
                "use SampleFilter, which knows samples by a key."
            )
        self.stream = stream
        self._size = _size_of(stream) if size is None else size
        if self._size < 1:
            raise ValueError(f"expected a stream of at least 1 sample, got size={self._size}.")

    @staticmethod
    def fits(stream: Any) -> bool:
        """Tell whether a dataset has an index."""
        # torch's Dataset has a method that does nothing but raise, and every IterableDataset inherits it.
        return getattr(type(stream), "__getitem__", Dataset.__getitem__) is not Dataset.__getitem__

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Any:
        return self.stream[index]


def _size_of(stream: Any) -> int:
    size = getattr(stream, "size", None)
    if isinstance(size, int):
        return size
    # A loader may be made before the processes talk to each other.
    if max(_processes()[1], int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"expected size=, the number of samples of the whole stream: with several processes the length of a "
            f"{type(stream).__name__} may be that of one process's part."
        )
    return len(stream)


class BlockShuffle(DistributedSampler[int]):
    """A sampler that shuffles blocks of neighbouring samples, and the samples of a few blocks among each other.

    Samples of one shard (a chunk, a file) have neighbouring indices: in this order an epoch opens the shards one after
    the other, and not a random one for each sample. Several processes take turns. The order depends on the seed and
    the epoch, which Lightning tells the sampler, and on nothing else.

    Args:
        dataset: The dataset; only its length is used.
        block_size: The number of samples in a block: about those of a shard.
        blocks_together: The number of blocks whose samples are shuffled among each other. More mix better, and keep
            more shards open at a time.
        seed: The seed of the order.

    Raises:
        ValueError: ``block_size`` or ``blocks_together`` is below 1.

    Example:
        >>> order = list(BlockShuffle(range(12), block_size=3, blocks_together=2))
        >>> sorted(order) == list(range(12)), len({index // 3 for index in order[:6]})
        (True, 2)
    """

    def __init__(self, dataset: Sized, *, block_size: int, blocks_together: int = 4, seed: int = 0) -> None:
        # The number of processes is asked for in each epoch and not here: a loader may be made before they are.
        if min(block_size, blocks_together) < 1:
            raise ValueError(f"expected at least 1, got block_size={block_size} and blocks_together={blocks_together}.")
        self.dataset = dataset  # type: ignore[assignment]
        self.block_size = block_size
        self.blocks_together = blocks_together
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / _processes()[1])  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        rank, processes = _processes()
        size = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        blocks = torch.arange(size).split(self.block_size)  # type: ignore[no-untyped-call]
        parts = []
        shuffled = torch.randperm(len(blocks), generator=generator).tolist()
        for start in range(0, len(shuffled), self.blocks_together):
            indices = torch.cat([blocks[block] for block in shuffled[start : start + self.blocks_together]])
            parts.append(indices[torch.randperm(len(indices), generator=generator)])
        order = torch.cat(parts)
        # As torch's own does: the first samples come once more, so that every process has as many.
        positions = torch.arange(rank, processes * len(self), processes) % size
        yield from order[positions].tolist()


def _processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that train together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class SampleFilter:
    """A filter for a stream without an index: only the samples of the running epoch's plan pass.

    Put it in front of what decodes the samples, as ``webdataset.WebDataset(...).select(sample_filter)``, as
    ``stream.filter(sample_filter)`` of Hugging Face, or as ``if sample_filter(number)`` in an ``IterableDataset`` of
    your own; and give it to ``SparseSelectionCallback(mode="prune", sample_filter=sample_filter)``. Outside of such a
    fit every sample passes. Worker processes see the plan through shared memory: 1 byte a sample.

    Args:
        size: The number of samples in the whole stream.
        key: A function that takes a sample as it is in front of the filter, and returns its number in [0, size), the
            same in every epoch. None where the filter is called with the number itself.

    Raises:
        ValueError: ``size`` is below 1; in a call, the key is no number in the range.

    Example:
        >>> sample_filter = SampleFilter(size=3, key=lambda sample: int(sample["__key__"]))
        >>> sample_filter({"__key__": "0002"})  # every sample passes where nothing is pruned
        True
    """

    def __init__(self, *, size: int, key: Callable[[Any], int] | None = None) -> None:
        if size < 1:
            raise ValueError(f"size: expected the number of samples in the stream, got {size!r}.")
        self.size = size
        self.key = key
        self._passes = torch.ones(size, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __call__(self, sample: Any) -> bool:
        """Tell whether a sample is a part of the running epoch."""
        given = sample if self.key is None else self.key(sample)
        try:
            number = operator.index(given)
        except TypeError:
            number = -1
        if not 0 <= number < self.size:
            raise ValueError(
                f"expected each sample's number in [0, {self.size}), got {given!r}: the key has to return an int that "
                "is the same in every epoch, and size has to count the whole stream."
            )
        return bool(self._passes[number])

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleFilter:
        """Return the filter itself: a copied pipeline has to see the same plan."""
        return self

    def unshare(self) -> None:
        """Take memory of this process's own, where the filter was made before the process was started."""
        self._passes = self._passes.clone().share_memory_()

    def allow(self, numbers: Tensor | None) -> None:
        """Let these samples pass from now on, ``(k,)`` int64; None lets every sample pass."""
        self._passes.fill_(numbers is None)
        if numbers is not None:
            self._passes[numbers] = True
