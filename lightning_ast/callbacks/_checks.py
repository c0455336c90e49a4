"""What is looked at once, at the first batch: that what is selected from is what is trained on, sample by sample."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_ast.callbacks._faults import ConfigurationError
from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.callbacks._scoring import ScoringPass
from lightning_ast.core.batch import BatchError, unclear_listing
from lightning_ast.core.listing import samples_of
from lightning_ast.core.losses import LossCaptureError, LossRecord
from lightning_ast.words import counted

__all__ = [
    "check_indices",
    "check_listing",
    "check_scorable",
    "check_scores",
    "check_scoring",
    "failed_on_subset",
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
        BatchError: A list in it has as many entries as the only loader puts samples into a batch, and the count
            differs; or its entries are the batches of several loaders, which differ in size.
    """
    if len(loaders) == size > 1 and samples_of(batch, size) is not None:
        raise BatchError(
            f"the batch holds those of {size} loaders, which differ in size: expected equal batch sizes. Use "
            "SparseLossMixin and override `count_samples(batch)` and `select_batch(batch, indices)`."
        )
    expected = getattr(loaders[0], "batch_size", None) if len(loaders) == 1 else None
    if isinstance(expected, int) and unclear_listing(batch, size, expected):
        raise BatchError(
            f"the batch is a {type(batch).__name__} that seems to list {expected} samples, as many as the DataLoader "
            f"puts into a batch, and its tensors have {size} rows. Use SparseLossMixin and override "
            "`count_samples(batch)` and `select_batch(batch, indices)`; or load dicts that hold a number beside each "
            "sample, as its index."
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


def check_scorable(plan: BatchPlan, record: LossRecord, passed_over: int) -> None:
    """Check, in ``subset``, that the loss of the selected samples alone is computed as that of the whole batch.

    Args:
        plan: The plan of the batch.
        record: The record of its loss.
        passed_over: The number of losses without gradient that were computed before it.
    """
    if not record.mean:
        raise LossCaptureError(
            f"`{record.name}` was called with reduction='sum'. In mode='subset' the step sees fewer samples, so "
            "what it divides the sum by is not known: use reduction='mean', or mode='mask'."
        )
    if passed_over:
        raise LossCaptureError(
            "training_step computes a loss without gradient before the one it trains on, and scoring stops at the "
            "first: move it behind the training loss."
        )
    if plan.elements is not None and record.elements > plan.elements:
        raise LossCaptureError(
            f"the selected samples have {counted(record.elements, 'loss element')} each where the whole batch had "
            f"{plan.elements}: the batch was not sliced as a whole. Use SparseLossMixin and override "
            "`select_batch(batch, indices)`."
        )


def check_scoring(
    module: pl.LightningModule, score: ScoringPass, batch: Any, batch_idx: int, size: int
) -> tuple[Tensor, LossRecord | None] | None:
    """Score the first batch, even where it is dense: an error of scoring must not wait for the end of the warmup.

    Args:
        module: The module, whose parameters must not change.
        score: The scoring pass.
        batch: The batch to train on.
        batch_idx: The index of the batch.
        size: The number of its samples.

    Returns:
        What ``score`` returns.
    """
    before = {name: p._version for name, p in module.named_parameters()}
    scored = score(batch, batch_idx, size)
    changed = [name for name, p in module.named_parameters() if p._version != before[name]]
    if changed:
        raise LossCaptureError(
            f"what stands before the loss in training_step changes parameters ({', '.join(changed[:3])}), and "
            "mode='subset' runs it twice. Move it to on_train_batch_end, or use mode='partial'."
        )
    return scored


def failed_on_subset(plan: BatchPlan, error: Exception) -> LossCaptureError:
    """Make the error for a training step that cannot run on the first selected samples alone."""
    return LossCaptureError(
        f"training_step failed on the {counted(plan.forwarded, 'selected sample')} alone "
        f"({type(error).__name__}: {error}): perhaps it keeps a state of the full batch's size (the hidden state of "
        "a recurrent layer), or the batch is not sliced as a whole. Use mode='partial', or "
        "override SparseLossMixin.select_batch."
    )
