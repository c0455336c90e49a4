"""Step 1 of a batch: the per-sample losses behind the one number a training step averages.

:class:`LossCapture` intercepts torch's loss functions while the user's unmodified code runs, and keeps what they
would have averaged: per sample, the sum of its elements and their weight in the user's own mean.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ast.core.graph import row_order
from lightning_ast.core.loss_functions import REFUSED, RULES, Call, OutputKind

__all__ = ["LossCapture", "LossCaptureError", "LossReached", "LossRecord", "check_losses", "mean_without"]

REMEDY = (
    "Define `per_sample_loss(self, batch, batch_idx)` on your module: return the unreduced losses, shape (B,), and let "
    "`training_step` use `self.per_sample_loss(batch, batch_idx).mean()`. (A loss that only the batch as a whole has, "
    "contrastive, adversarial or a statistic, cannot be selected from.)"
)


class LossCaptureError(RuntimeError):
    """Per-sample losses cannot be taken from this training step; the message names the remedy."""


class LossReached(BaseException):
    """Raised by a capture with ``stop=True`` at the loss, so that nothing behind it runs."""


@dataclass(frozen=True)
class LossRecord:
    """One intercepted loss of a batch.

    Attributes:
        name: the loss function's name, e.g. ``"cross_entropy"``.
        sums: ``(B,)`` sum of each sample's (class-weighted) loss elements, with its graph.
        counts: ``(B,)`` each sample's share of the denominator of the user's mean: its elements, class-weighted where
            the loss is, without those of ``ignore_index``. Ones where the user sums.
        mean: whether the user's reduction divides by the counts (``"mean"``, ``"batchmean"``) or not (``"sum"``).
        logits: what the loss was given as prediction; class scores, binary scores or a regression output.
        targets: what it was given as target.
        kind: what the logits are.
        ignore_index: target value that counts for nothing, or None.
        elements: loss elements of a sample: 1, its tokens, its pixels.
        dtype: of the loss that the user's call returns; the sums are at least float32.
    """

    name: str
    sums: Tensor
    counts: Tensor
    mean: bool
    logits: Tensor
    targets: Tensor
    kind: OutputKind
    ignore_index: int | None = None
    elements: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def losses(self) -> Tensor:
        """``(B,)`` what the user's loss function returns for each sample alone (0 where it has no valid element)."""
        return self.sums / self.counts.where(self.counts > 0, torch.ones_like(self.counts))

    @property
    def total(self) -> Tensor:
        """Scalar: the user's own loss of the whole batch, ``sum(sums) / sum(counts)``, or the plain sum."""
        return self.sums.sum() / self.counts.sum() if self.mean else self.sums.sum()

    @property
    def labels(self) -> Tensor | None:
        """``(B,)`` class indices where each sample has one, else None; -1 where it is to be ignored."""
        hard = self.kind == "multiclass" and self.targets.ndim == 1 and not self.targets.is_floating_point()
        if not hard or len(self.targets) != len(self.sums):
            return None
        if self.ignore_index is None:
            return self.targets
        return self.targets.where(self.targets != self.ignore_index, torch.full_like(self.targets, -1))

    def without(self, left_out: Tensor | None) -> LossRecord:
        """The same batch without some of its samples: they sum and count to 0.

        Args:
            left_out: ``(B,)`` bool, or None for none.
        """
        if left_out is None:
            return self
        keep = ~left_out.to(self.sums.device)
        zero = self.sums.new_zeros(())
        counts = self.counts.where(keep, zero.to(self.counts.dtype))
        return replace(self, sums=self.sums.where(keep, zero), counts=counts)


_SIGNATURES = {func: inspect.signature(func) for func in RULES}


def _check_rows(values: Tensor, logits: Tensor, batch_size: int, name: str) -> None:
    if values.ndim == 0 or values.shape[0] == batch_size:
        return
    order = row_order(logits, batch_size)
    if order == "picked":
        raise LossCaptureError(
            f"the rows that `{name}` is given were picked by an index or a mask, so which sample each belongs to is "
            f"not known: keep all rows and use `ignore_index`. Or: {REMEDY}"
        )
    if order == "joined":
        raise LossCaptureError(
            f"`{name}` is given several rows a sample that do not lie together (views joined along the batch, time "
            f"first, ensembles, chunks): flatten with the samples outermost, `(B, T, C)` to `(B * T, C)`. Or: {REMEDY}"
        )


def _fold(values: Tensor, batch_size: int, name: str) -> Tensor:
    """``(N, ...)`` elements to ``(B,)`` sums, where N is B or B * T with the samples outermost."""
    if values.ndim == 0 or values.shape[0] % batch_size != 0:
        raise LossCaptureError(
            f"expected the losses of `{name}` to have a leading dimension of {batch_size} (the batch size) or a "
            f"multiple of it (tokens), got shape {tuple(values.shape)}. {REMEDY}"
        )
    wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype
    return values.reshape(batch_size, -1).sum(1, dtype=wide)


def _record(
    func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Call, batch_size: int, *, unreduced: bool = False
) -> LossRecord:
    if func in REFUSED:
        raise LossCaptureError(f"`{REFUSED[func]}` has no per-sample form that can be captured. {REMEDY}")
    bound = _SIGNATURES[func].bind(*args, **kwargs)
    bound.apply_defaults()
    call, name = dict(bound.arguments), func.__name__
    reduction = call["reduction"]
    if call.get("size_average") is not None or call.get("reduce") is not None:
        raise LossCaptureError(
            f"`{name}` was called with the deprecated size_average/reduce: use `reduction=` instead."
        )
    if reduction == "none" and not unreduced:
        raise LossCaptureError(f"`{name}` was called with reduction='none' and averaged by hand. {REMEDY}")
    elements = RULES[func](func, call)
    _check_rows(elements.values, elements.logits, batch_size, name)
    sums = _fold(elements.values, batch_size, name)
    mean = reduction != "sum"
    if not mean:
        counts = torch.ones_like(sums)
    elif elements.weights is None:
        counts = torch.full_like(sums, elements.values.numel() / batch_size)
    else:
        counts = _fold(elements.weights.detach(), batch_size, name)
    return LossRecord(
        name=name,
        sums=sums,
        counts=counts.detach(),
        mean=mean,
        logits=elements.logits.detach(),
        targets=elements.targets.detach(),
        kind=elements.kind,
        ignore_index=elements.ignore_index,
        elements=elements.values.numel() // batch_size,
        dtype=elements.values.dtype,
    )


class LossCapture(TorchFunctionMode):
    """Intercept torch's loss functions inside a ``with`` block.

    Covers ``cross_entropy``, ``nll_loss``, ``binary_cross_entropy`` (with and without logits), ``kl_div``,
    ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``, ``huber_loss``, ``gaussian_nll_loss``, ``poisson_nll_loss`` and the
    margin, hinge, ranking, embedding and triplet losses, called as functions or as modules, with ``reduction="mean"``,
    ``"sum"`` or ``"batchmean"``. Token losses ``(B*T, C)`` are folded back to ``(B,)`` with the samples outermost:
    what ``view(-1, C)`` of ``(B, T, C)`` gives; time-major models and stacked views (``cat([z1, z2])``) need an
    explicit ``per_sample_loss``. Losses under the user's own ``torch.no_grad`` (for logging) are passed over.
    It does not see losses computed inside a ``torch.compile``d function.

    Args:
        batch_size: number of samples B in the batch.
        rewrite: ``(record, compute, graded) -> scalar`` gives what the user's call returns; ``compute()`` is what it
            would have, ``graded()`` the record with its graph. None only watches.
        stop: raise :class:`LossReached` at the first loss instead of returning to the user's code.
        detached: the records need no graph: their losses are computed without one.
        unreduced: for code that returns its own losses: accept ``reduction="none"``, and pass over what cannot be
            taken apart.

    Attributes:
        records: what was captured, in order.
        passed_over: losses without gradient that stood before the first captured one.

    Raises:
        LossCaptureError: at the loss, when it cannot be taken apart (CTC, ``reduction="none"``, wrong leading
            dimension).

    Example:
        >>> with LossCapture(batch_size=3) as capture:
        ...     x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
        ...     loss = torch.nn.functional.mse_loss(x, torch.zeros(3, 2))
        >>> capture.record().losses
        tensor([1., 4., 0.])
    """

    def __init__(
        self,
        batch_size: int,
        *,
        rewrite: Callable[[LossRecord, Callable[[], Tensor], Callable[[], LossRecord]], Tensor] | None = None,
        stop: bool = False,
        detached: bool = False,
        unreduced: bool = False,
    ) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._rewrite = rewrite
        self._stop = stop
        self._detached = detached
        self._unreduced = unreduced
        self.records: list[LossRecord] = []
        self.passed_over = 0
        self._graded = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything through but the loss functions."""
        kwargs = kwargs or {}
        if func not in RULES and (func not in REFUSED or self._unreduced):
            return func(*args, **kwargs)
        if self._graded and not torch.is_grad_enabled():
            self.passed_over += not self.records
            return func(*args, **kwargs)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detached):
                self.records.append(_record(func, args, kwargs, self._batch_size, unreduced=self._unreduced))
        except LossCaptureError:
            if not self._unreduced:
                raise
            return func(*args, **kwargs)
        if self._stop:
            raise LossReached
        compute = functools.partial(func, *args, **kwargs)
        if self._rewrite is None:
            return compute()
        graded = functools.partial(_record, func, args, kwargs, self._batch_size)
        return self._rewrite(self.records[-1], compute, graded)

    def record(self) -> LossRecord:
        """The one captured loss.

        Raises:
            LossCaptureError: no loss or more than one was captured.
        """
        if not self.records:
            raise LossCaptureError(
                "no torch loss function was called in the training step: the loss is written by hand, compiled, "
                f"computed elsewhere, or the step returned before it. {REMEDY}"
            )
        if len(self.records) > 1:
            names = ", ".join(record.name for record in self.records)
            raise LossCaptureError(
                f"{len(self.records)} losses were captured ({names}): which of them makes a sample matter is yours to "
                f"say. {REMEDY}"
            )
        return self.records[0]


def mean_without(losses: Tensor, left_out: Tensor | None) -> Tensor:
    """Mean of the losses ``(B,)`` but for those that are left out, ``(B,)`` bool or None; 0 where all are."""
    if left_out is None:
        return losses.mean()
    keep = ~left_out.to(losses.device)
    return losses.where(keep, losses.new_zeros(())).sum() / keep.sum().clamp_min(1)


def check_losses(losses: Any, batch_size: int) -> Tensor:
    """Check explicit per-sample losses.

    Args:
        losses: expected a tensor of shape ``(B,)``.
        batch_size: B.

    Returns:
        The same tensor.

    Raises:
        LossCaptureError: it is not a floating-point tensor of shape ``(B,)``.
    """
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,) or not losses.is_floating_point():
        got = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise LossCaptureError(
            f"expected per-sample losses, a floating-point tensor of shape ({batch_size},), got {got}. "
            "Use reduction='none' and average everything but the batch dimension."
        )
    return losses
