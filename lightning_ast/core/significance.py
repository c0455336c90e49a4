"""Step 4 for scores that are made of losses: turn losses, logits, inputs and targets into significance ``(B,)``.

The default score, ``"gradient"``, is taken where the gradient enters the network and needs none of this. Each score
takes the arguments that a user's own callable takes, and two more by name:

- ``losses``: ``(B,)``.
- ``logits``: ``(B, C)``, ``(B, C, d1, ...)`` or ``(B*T, C)`` class scores, binary scores shaped as the targets, or the
  output of a regression; None where they are not known.
- ``inputs``: The first floating-point tensor of the batch, ``(B, ...)``, or None.
- ``targets``: Class indices, class probabilities of the logits' shape, or values; None where the logits are.
- ``kind``: What the logits are; None takes it from the targets (integers: multiclass).
- ``ignore_index``: The class index that counts for nothing, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_ast.core.losses.calls import OutputKind
from lightning_ast.core.losses.capture import LossRecord

__all__ = [
    "SIGNIFICANCE",
    "SignificanceFn",
    "SignificanceName",
    "compute_significance",
    "confidence",
    "el2n",
    "loss",
    "loss_entropy",
    "loss_intensity",
]

SignificanceName = Literal["gradient", "el2n", "loss", "loss_entropy", "loss_intensity", "confidence"]
Given = Tensor | None
Kind = OutputKind | None
SignificanceFn = Callable[[Tensor, Given, Given, Given], Tensor]


def loss(losses: Tensor, *_: Given, **__: object) -> Tensor:
    """Return the loss itself, in its own unit; where a batch has negative ones, what each is above the smallest.

    It is defined for every loss: that of a density (a Gaussian likelihood) has no zero of its own. It is unbounded: one
    outlier can take a large share of a batch.
    Source: Selective Backprop, arXiv 1910.00762.
    """
    return losses - losses.min().clamp_max(0)


def el2n(
    losses: Tensor, logits: Given, inputs: Given, targets: Given, *, kind: Kind = None, ignore_index: int | None = None
) -> Tensor:
    """Return the norm of the error vector, ``||p - y||``: for plain cross-entropy, that of its gradient at the logits.

    It is defined for classification: class indices or class probabilities (``p`` is the softmax), and binary or
    multi-label scores (``p`` is the sigmoid). With many predictions a sample (tokens, pixels) it is the mean over the
    valid ones. For a regression loss, and where no logits are known, it is **the loss itself**: a documented
    substitute. For class indices it lies in [0, sqrt(2)].
    Source: EL2N, arXiv 2107.07075, equation 3.
    """
    kind = _kind(kind, logits, targets)
    if logits is None or targets is None or kind == "regression":
        return loss(losses)
    error = _probabilities(logits, kind)
    if targets.is_floating_point():
        error = error - targets
        return _per_sample(error.abs() if error.ndim == 1 else error.norm(dim=1), losses)
    index, valid = _class_index(targets, ignore_index)
    # One is taken off the probability of the true class; a tensor of one-hot targets is not made.
    error = error.scatter_add(1, index, -torch.ones_like(index, dtype=error.dtype))
    return _per_sample(error.norm(dim=1), losses, valid)


def loss_entropy(
    losses: Tensor, logits: Given, inputs: Given, targets: Given, *, kind: Kind = None, **_: object
) -> Tensor:
    """Return ``0.7 * loss + 0.3 * entropy of the prediction`` in nats, raw: the original package's score.

    It is defined for multi-class and binary outputs. The entropy ignores which targets are valid.
    Source: adaptive-sparse-training 1.0, ``SundewAlgorithm.compute_significance``.
    """
    kind = _kind(kind, logits, targets)
    p = _probabilities(_need_classes(logits, kind, "loss_entropy"), kind)
    if kind == "binary":
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    else:
        entropy = -torch.xlogy(p, p).sum(1)  # 0 where p is, which p.log() would make NaN
    return 0.7 * loss(losses) + 0.3 * _per_sample(entropy, losses)


def loss_intensity(losses: Tensor, logits: Given, inputs: Given, *_: Given, **__: object) -> Tensor:
    """Return ``0.7 * loss / mean(loss) + 0.3 * s / mean(s)``; ``s`` is the standard deviation of a sample's input.

    It is defined for every loss where the batch holds a floating-point input, and meant for images. It is relative to
    the batch: its mean is always 1. Source: the README of adaptive-sparse-training ("loss + intensity").

    Raises:
        ValueError: There is no floating-point input, or it has a single value a sample.
    """
    if inputs is None or inputs[0].numel() < 2:
        raise ValueError(
            "significance 'loss_intensity' needs a floating-point input tensor (B, ...) with at least two values a "
            "sample in the batch, found none. Choose significance='loss' or 'el2n'."
        )
    # Each part is divided by its mean, so that neither outweighs the other by its unit.
    spread = inputs.flatten(1).float().std(dim=1)
    positive = loss(losses)
    tiny = torch.finfo(losses.dtype).tiny
    relative_loss = positive / positive.mean().clamp_min(tiny)
    return 0.7 * relative_loss + 0.3 * (spread / spread.mean().clamp_min(tiny)).to(losses.dtype)


def confidence(
    losses: Tensor, logits: Given, inputs: Given, targets: Given, *, kind: Kind = None, ignore_index: int | None = None
) -> Tensor:
    """Return one minus the probability of the true class, in [0, 1].

    It is the mean over tokens or pixels, and over the labels of binary outputs. It is defined for classification; with
    class probabilities as targets the true class's probability is their inner product.
    Source: KAKURENBO, arXiv 2310.10102, prediction confidence.
    """
    kind = _kind(kind, logits, targets)
    scores = _need_classes(logits, kind, "confidence")
    assert targets is not None  # logits come with their targets
    p = _probabilities(scores, kind)
    if kind == "binary":
        return _per_sample((p - targets).abs(), losses)
    if targets.is_floating_point():
        return _per_sample(1 - (p * targets).sum(1), losses)
    index, valid = _class_index(targets, ignore_index)
    return _per_sample(1 - p.gather(1, index).squeeze(1), losses, valid)


SIGNIFICANCE: dict[str, Callable[..., Tensor]] = {
    "el2n": el2n,
    "loss": loss,
    "loss_entropy": loss_entropy,
    "loss_intensity": loss_intensity,
    "confidence": confidence,
}


def compute_significance(
    significance: SignificanceName | SignificanceFn,
    record: LossRecord | None,
    losses: Tensor,
    inputs: Tensor | None,
    *,
    check: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Score a batch by its losses, with a built-in or the user's own significance.

    Args:
        significance: A name from :data:`SIGNIFICANCE` or a callable ``(losses, logits, inputs, targets) -> (B,)``.
        record: What the loss was computed from; None where only the losses are known.
        losses: ``(B,)``.
        inputs: The model's input ``(B, ...)``, or None.
        check: Called with the values ``(B,)`` as the score gave them, which may be negative, NaN or infinite.

    Returns:
        ``(B,)`` detached, non-negative; values that are not finite become 0 (they are never worth selecting).

    Raises:
        ValueError: The result is not a real tensor of shape ``(B,)``, or the score is not defined for this loss.
    """
    if not callable(significance) and significance not in SIGNIFICANCE:
        known = f"a callable or a score that is made of losses ({', '.join(SIGNIFICANCE)})"
        raise ValueError(f"expected {known}, got {significance!r}: 'gradient' is taken where it enters the network.")
    losses = losses.detach().nan_to_num(0.0, 0.0, 0.0)  # one bad sample must not reach the mean of the batch
    logits = None if record is None else record.logits
    targets = None if record is None else record.targets
    if callable(significance):
        scores = significance(losses, logits, inputs, targets)
    else:
        kind = None if record is None else record.kind
        ignore_index = None if record is None else record.ignore_index
        scores = SIGNIFICANCE[significance](losses, logits, inputs, targets, kind=kind, ignore_index=ignore_index)
    if not isinstance(scores, Tensor) or scores.shape != losses.shape or scores.is_complex():
        got = f"shape {tuple(scores.shape)}, {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"expected significance of shape {tuple(losses.shape)}, one value a sample, got {got}.")
    # Whatever the score was computed in: selection compares scores of batches under autocast and without.
    scores = scores.detach().to(losses.device, torch.float32)
    if check is not None:
        check(scores)
    return scores.nan_to_num(0.0, 0.0, 0.0).clamp_min(0)


def _kind(kind: Kind, logits: Given, targets: Given) -> OutputKind:
    if kind is not None:
        return kind
    if logits is None or targets is None:
        return "regression"
    if targets.is_floating_point():
        raise ValueError(
            "floating-point targets do not say what the logits are: pass kind='multiclass', 'binary' or 'regression'."
        )
    return "multiclass"


def _need_classes(logits: Tensor | None, kind: OutputKind, name: str) -> Tensor:
    if logits is None or kind == "regression":
        raise ValueError(
            f"significance {name!r} is defined for classification losses with known logits, got a regression loss "
            "or an explicit `per_sample_loss` that calls no torch classification loss. Choose significance='loss'."
        )
    return logits


def _probabilities(logits: Tensor, kind: OutputKind) -> Tensor:
    logits = logits.float()
    return logits.sigmoid() if kind == "binary" else logits.softmax(1)


def _class_index(targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Return class indices ``(N, 1, ...)`` that are safe to gather with, and which are valid; None for all."""
    if ignore_index is None:
        return targets.unsqueeze(1), None
    valid = targets != ignore_index  # an ignored target is no index: 0 stands in its place
    return targets.where(valid, torch.zeros_like(targets)).unsqueeze(1), valid


def _per_sample(values: Tensor, losses: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average the valid values of each sample: ``(N, ...)`` to ``(B,)``, with N = B or B * T, samples outermost."""
    # Tokens lie with the samples outermost (other orders were refused), so each row of the reshape is one sample's.
    values = values.reshape(losses.shape[0], -1)
    if valid is None:
        return values.mean(1)
    mask = valid.reshape(losses.shape[0], -1)
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)
