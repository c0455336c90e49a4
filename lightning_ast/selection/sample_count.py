"""What is known of the samples of a batch: how many they are, and what a module's methods tell of them, checked.

Their number is what the module says, else what the DataLoader and the batch's tensors say.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.core.batch.containers import is_listing
from lightning_ast.core.batch.graphs import graphs_in
from lightning_ast.core.batch.samples import batch_size_of, leading_sizes, listed_length, samples_of
from lightning_ast.errors import BatchError, ConfigurationError, EmptyBatchError
from lightning_ast.lightning_internals.fit_loop import loaded_samples, loaders
from lightning_ast.mixin import SparseLossMixin, overrides
from lightning_ast.selection.other_dimension import Doubt, doubt_of

__all__ = ["SampleCount", "told_numbers", "told_weights", "warn_of_unused_methods"]

_BATCH_METHODS = ("count_samples", "sample_indices", "sample_labels", "sample_weights", "select_batch")


class SampleCount:
    """Counts the samples of each batch in the way that the first batch showed."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._own: Any = getattr(module, "count_samples", None) if overrides(module, "count_samples") else None
        self._lists: bool | None = None
        self._position: int | None = None
        self.doubt: Doubt | None = None

    def __call__(self, batch: Any) -> int:
        """Count the samples of a batch, which may be none."""
        # A batch that listed its samples once lists them always, also where it does not show it. The tensor whose
        # leading dimension was the loader's batch size in the first batch counts from then on.
        try:
            return self._counted(batch)
        except EmptyBatchError:
            return 0

    def _counted(self, batch: Any) -> int:
        if self._own is not None:
            return int(self._own(batch))
        if self._lists is None:
            size = self._counted_first(batch)
            if not self._lists and graphs_in(batch) is None:  # neither is counted along a dimension
                self.doubt = doubt_of(batch, size, loaded_samples(self._trainer))
            if self.doubt is not None and self.doubt.is_settled:
                raise BatchError(self.doubt.message)
            return size
        known = self._known(batch)
        if known:
            return known
        listed = listed_length(batch) if self._lists else None
        return batch_size_of(batch) if listed is None else listed

    def _counted_first(self, batch: Any) -> int:
        # What the loader says comes first: sizes alone would take a list of B images for one of channels.
        given = loaders(self._trainer.fit_loop)
        expected: Any = getattr(given[0], "batch_size", None) if len(given) == 1 else None
        is_told = isinstance(expected, int)
        if is_told and samples_of(batch, expected) is not None:
            self._lists = True
            return int(expected)
        size = batch_size_of(batch)
        self._lists = samples_of(batch) is not None
        # A shared tensor (anchors, a vocabulary) may outvote the samples. The tensor that has the loader's number of
        # rows now is the one that counts in every batch, the shorter last one included.
        leading = _leading(batch) if is_told and not self._lists else []
        if expected in leading:
            self._position = leading.index(expected)
            return leading[self._position]
        # The batches of several loaders, combined into a list, are no samples.
        if len(given) == size > 1 and samples_of(batch, size) is not None:
            raise BatchError(
                f"the batch holds those of {size} loaders, which differ in size: expected equal batch sizes. Use "
                "SparseLossMixin and override `count_samples(batch)` and `select_batch(batch, indices)`."
            )
        return size

    def _known(self, batch: Any) -> int | None:
        """Look where the first batch showed its size: the usual case, in a few microseconds."""
        if self._position is None:
            return None
        before = list(batch)[: self._position + 1] if is_listing(batch) else []
        if len(before) > self._position and all(isinstance(part, Tensor) and part.ndim > 0 for part in before):
            return int(before[-1].size(0))
        leading = _leading(batch)
        return None if self._position >= len(leading) else leading[self._position]


def _leading(batch: Any) -> list[int]:
    return leading_sizes(batch, lists=False) or leading_sizes(batch)


def told_numbers(module: pl.LightningModule, name: str, batch: Any, size: int) -> Tensor | None:
    """Return the dataset indices or the classes ``(B,)`` of the samples; None where the module does not tell them."""
    values = getattr(module, name)(batch) if isinstance(module, SparseLossMixin) else None
    if values is None:
        return None
    if not isinstance(values, Tensor) or values.shape != (size,) or values.is_floating_point():
        raise _fault(name, f"an integer tensor of shape ({size},), a number for each sample, or None", values)
    return values


def told_weights(module: pl.LightningModule, batch: Any, size: int) -> Tensor | None:
    """Return the user's weights ``(B,)`` of the samples in double precision on the host; None where there are none."""
    method: Any = module.sample_weights
    weights = method(batch)
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != (size,):
        raise _fault("sample_weights", f"a tensor of shape ({size},), each sample's weight, or None", weights)
    weights = weights.detach().cpu().double()
    good = weights.isfinite() & (weights >= 0)
    if not bool(good.all()):
        position = int((~good).nonzero()[0])
        raise ConfigurationError(
            f"sample_weights must give finite weights of at least 0, got {weights[position]:g} for the sample at "
            f"position {position} of the batch."
        )
    return weights


def _fault(name: str, expected: str, got: object) -> ConfigurationError:
    found = type(got).__name__
    if isinstance(got, Tensor):
        found = f"shape {tuple(got.shape)}, {got.dtype}"
    return ConfigurationError(f"{name} must give {expected}; got {found}.")


def warn_of_unused_methods(module: pl.LightningModule) -> None:
    """Warn of methods that are asked of a ``SparseLossMixin`` alone, where the module is none."""
    names = [name for name in _BATCH_METHODS if hasattr(type(module), name)]
    if names and not isinstance(module, SparseLossMixin):
        rank_zero_warn(
            f"lightning-ast: {type(module).__name__} defines {', '.join(names)}, which SparseSelectionCallback calls "
            "on a SparseLossMixin alone: list it before LightningModule, if they are meant for it."
        )
