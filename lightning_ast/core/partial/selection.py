"""Step 6 without a gate: losses whose backward starts with the selected rows alone."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Variable

from lightning_ast.core.partial.gradient import wrap
from lightning_ast.core.partial.memory import densify
from lightning_ast.core.partial.rows import BatchNormBackward, Rows, place_of

__all__ = ["keep_rows", "select_rows"]


class _KeepRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, indices: Tensor, factors: Tensor | None, batchnorm: BatchNormBackward, dense_ops: Any
    ) -> Tensor:
        ctx.size = losses.shape[0]
        ctx.batchnorm = batchnorm
        ctx.dense_ops = dense_ops
        picked = losses[indices]  # not multiplied by 0 and 1: a loss of NaN that is not selected must stay out
        ctx.save_for_backward(indices, factors, picked if ctx.needs_input_grad[2] else None)
        return torch.zeros_like(losses).index_add_(0, indices, picked if factors is None else picked * factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        indices, factors, picked = ctx.saved_tensors
        gradient = densify(gradients[0])[indices]  # a RowGradient where it was selected from a selection
        data = gradient if factors is None else gradient * factors
        of_factors = None if picked is None else gradient * picked
        if torch.is_grad_enabled() or indices.numel() >= ctx.size:  # a second derivative is wanted; nothing to save
            full: Tensor = data.new_zeros(ctx.size).index_add(0, indices, data)
            return full, None, of_factors, None, None
        # From here on every derivative formula finds a RowGradient, as behind the gate.
        rows = Rows(indices, ctx.size, batchnorm=ctx.batchnorm, dense_ops=ctx.dense_ops)
        # A gradient of the user's may hold the rows long after this backward, but not all that was gathered in it.
        Variable._execution_engine.queue_callback(rows.forget)
        return wrap(data, rows, place_of((ctx.size,), 0)), None, of_factors, None, None


def keep_rows(
    losses: Tensor,
    indices: Tensor,
    factors: Tensor | None = None,
    *,
    batchnorm: BatchNormBackward = "selected",
    dense_ops: Counter[str] | None = None,
) -> Tensor:
    """Set the losses of the other samples to zero, ``(B,)``, and run their backward over the selected rows only.

    Arguments are those of :func:`select_rows`, with ``factors`` for ``weights``.

    Raises:
        ValueError: The shapes do not fit, nothing is selected, or ``batchnorm`` is unknown.
    """
    if losses.dim() != 1:
        raise ValueError(f"expected per-sample losses of shape (B,), got {tuple(losses.shape)}.")
    if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32) or indices.numel() == 0:
        raise ValueError(
            f"expected indices of shape (k,), k >= 1, and type int64, got {tuple(indices.shape)}, {indices.dtype}."
        )
    if factors is not None:
        if factors.shape != indices.shape:
            raise ValueError(f"expected weights of shape {tuple(indices.shape)}, got {tuple(factors.shape)}.")
        factors = factors.to(losses.dtype)
    if batchnorm not in ("selected", "exact"):
        raise ValueError(f"expected batchnorm 'selected' or 'exact', got {batchnorm!r}.")
    counter: Counter[str] = Counter() if dense_ops is None else dense_ops
    return cast(Tensor, _KeepRows.apply(losses, indices, factors, batchnorm, counter))


def select_rows(
    losses: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    *,
    batchnorm: BatchNormBackward = "selected",
    dense_ops: Counter[str] | None = None,
) -> Tensor:
    """Compute ``sum_i weights[i] * losses[indices[i]]``, a scalar, whose backward costs what the selected rows cost.

    The forward that made ``losses`` ran on the whole batch; ``.backward()`` computes over k of its B rows. Parameter
    gradients, accumulation, AMP scaling and DDP see ordinary tensors. The result equals the gradient of the same sum
    with the other losses masked out, where the model treats every sample alone; ops that mix samples, and ops without
    a row rule, run over the full batch, exactly. Tensor hooks on activations and ``torch.autograd.grad`` are given a
    :class:`RowGradient` (:func:`densify` makes it ordinary). A backward with ``create_graph=True`` is dense.

    Args:
        losses: ``(B,)`` with its graph.
        indices: ``(k,)`` int64 positions of the selected samples, on the losses' device, in any order. A position that
            occurs twice counts twice; one outside the batch is torch's error.
        weights: ``(k,)``, or None for 1. They may require gradients.
        batchnorm: The backward of BatchNorm in training mode, which mixes the samples. ``"selected"`` takes it over the
            k rows, and the other rows get none: an approximation, see
            :mod:`lightning_ast.core.partial.rules.normalization`. ``"exact"`` runs there, and in every layer before it,
            over all rows, at about the cost of a full backward. The forward is the full batch's in both.
        dense_ops: A counter that the backward fills with the names of ops that ran over all rows, and how often.

    Raises:
        ValueError: The arguments are not what :func:`keep_rows` expects.

    Example:
        >>> layer = torch.nn.Linear(3, 1)
        >>> losses = layer(torch.eye(3)).squeeze(1).square()
        >>> select_rows(losses, torch.tensor([0, 2])).backward()
        >>> layer.weight.grad[0, 1]  # the second sample was not selected
        tensor(0.)
    """
    return keep_rows(losses, indices, weights, batchnorm=batchnorm, dense_ops=dense_ops).sum()
