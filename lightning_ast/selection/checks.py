"""What is looked at once, at the first batch: that what is selected from is what is trained on, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_ast.core.batch.samples import samples_of
from lightning_ast.core.partial.rows import Place
from lightning_ast.errors import BatchError, ConfigurationError, LossCaptureError

__all__ = [
    "check_indices",
    "check_listing",
    "check_order",
    "check_scores",
]


def check_indices(indices: Any, size: int) -> None:
    """Check that ``sample_indices`` gives ``(B,)`` integers, or None."""
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.shape != (size,) or indices.is_floating_point():
        got = (
            f"shape {tuple(indices.shape)}, {indices.dtype}" if isinstance(indices, Tensor) else type(indices).__name__
        )
        raise ConfigurationError(
            [f"sample_indices must give an integer tensor of shape ({size},), each sample's index, or None; got {got}."]
        )


def check_listing(batch: Any, size: int, loaders: list[Any]) -> None:
    """Check that a first batch which lists its samples was not taken for rows.

    Args:
        batch: The batch as loaded.
        size: The samples that were counted in it.
        loaders: The user's loaders.

    Raises:
        BatchError: Its entries are the batches of several loaders, which differ in size.
    """
    if len(loaders) == size > 1 and samples_of(batch, size) is not None:
        raise BatchError(
            f"the batch holds those of {size} loaders, which differ in size: expected equal batch sizes. Use "
            "SparseLossMixin and override `count_samples(batch)` and `select_batch(batch, indices)`."
        )


def check_order(places: Iterable[Place], size: int) -> None:
    """Check that rows which a loss function is given can be told from the samples, for scores that are made of losses.

    Args:
        places: Where the samples lie in the tensors through which the gradient enters the network.
        size: The number of samples.

    Raises:
        LossCaptureError: The samples are not outermost, and what is outermost is as many.
    """
    for place in places:
        outer = place.shape[0] if place.dim else place.pre
        if size > 1 and outer == size and (place.dim or place.pre > 1):
            raise LossCaptureError(
                f"the network gives a tensor of shape {place.shape} with {size} time steps (or the like) ahead of as "
                f"many samples, so the rows that a loss function is given do not show which sample each belongs to. "
                "Use significance='gradient', or a batch of another size."
            )


def check_scores(values: Tensor, *, first: bool) -> str | None:
    """Check the scores that a significance function of the user's own gives the samples of a batch.

    The gate counts a score that is negative, NaN or infinite as 0. Where all scores are 0, it selects at random.

    Args:
        values: ``(n,)`` scores of the samples whose losses are finite; n is at least 1.
        first: Whether this is the first batch.

    Returns:
        The text of a warning, or None.

    Raises:
        ConfigurationError: This is the first batch, some scores count as 0 for their value, and none is above 0.
    """
    finite = values.isfinite()
    negative = int((finite & (values < 0)).sum())
    broken = int((~finite).sum())
    useful = bool((finite & (values > 0)).any())
    if negative + broken == 0 and (useful or not first or values.numel() == 1):
        return None
    if negative + broken == 0:
        return (
            f"lightning-ast: the significance of all {values.numel()} samples of the first batch is 0: samples that "
            "are all alike are selected at random. Expected larger values for samples that matter more."
        )
    message = (
        "significance must give a finite value of at least 0 for each sample, a larger one for samples that matter "
        f"more. Of {values.numel()} values, {negative} are negative and {broken} are NaN or infinite"
    )
    remedy = "subtract the smallest possible value or take exp(), and mend what gives NaN or infinity"
    if first and not useful:
        raise ConfigurationError([f"{message}, and none is above 0: selection would be random. So {remedy}."])
    return f"lightning-ast: {message}. These count as 0, and such samples are hardly ever selected: {remedy}."
