"""``SparseLossMixin``: methods with working defaults, to override where a module is out of the ordinary."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_ast.core.batch.samples import batch_size_of, select_batch
from lightning_ast.core.losses.capture import LossCapture, LossReached
from lightning_ast.core.significance import el2n, loss
from lightning_ast.errors import LossCaptureError

__all__ = ["SparseLossMixin", "overrides"]


class SparseLossMixin:
    """Makes any LightningModule give per-sample losses. List it before ``LightningModule``.

    Without overrides it changes nothing: it offers :meth:`per_sample_loss` on a module whose loss is a standard torch
    one. Override :meth:`per_sample_loss` where the score is made of losses and the loss is written by hand,
    :meth:`significance` for a score of your own, :meth:`select_batch` and :meth:`count_samples` for batches whose
    samples do not lie along the first dimension, :meth:`sample_indices` where ``collate_fn`` changes their order,
    :meth:`sample_weights` for weights of your own, :meth:`sample_labels` where no torch loss is told the classes.

    Example:
        >>> import torch, lightning as L
        >>> class Net(SparseLossMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1)
        ...
        ...     def per_sample_loss(self, batch, batch_idx):
        ...         x, y = batch
        ...         return (self.layer(x).squeeze(1) - y).abs().pow(1.5)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return self.per_sample_loss(batch, batch_idx).mean()
        >>> Net().per_sample_loss((torch.zeros(3, 2), torch.zeros(3)), 0).shape
        torch.Size([3])
    """

    _capturing = False

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the unreduced losses of a batch.

        The default runs ``training_step`` as far as its first torch loss function and gives what that would have
        averaged: the mean is its value (with ``reduction="sum"`` the sum is). What stands before the loss in
        ``training_step`` takes effect. An override must be called by ``training_step``, which averages its result:
        ``self.per_sample_loss(batch, batch_idx).mean()``.

        Args:
            batch: The batch as ``training_step`` gets it.
            batch_idx: The index of the batch in its epoch.

        Returns:
            ``(B,)`` with gradient.

        Raises:
            LossCaptureError: The training step calls no torch loss function, or one that cannot be taken apart.
        """
        if self._capturing:  # the step that the default runs below calls this method: it would never end
            raise LossCaptureError(
                "training_step calls `self.per_sample_loss`, which the module does not define: override "
                "`per_sample_loss(self, batch, batch_idx)` and return the unreduced losses, shape (B,)."
            )
        self._capturing = True
        try:
            with LossCapture(stop=True) as capture, suppress(LossReached):
                self.training_step(batch, batch_idx)  # type: ignore[attr-defined]  # LightningModule's
        finally:
            self._capturing = False
        return capture.record(self.count_samples(batch)).losses

    def significance(
        self, losses: Tensor, logits: Tensor | None, inputs: Tensor | None, targets: Tensor | None
    ) -> Tensor:
        """Tell how much each sample matters now. An override takes the place of the callback's ``significance``.

        Without an override the callback's own counts. For use in an override this returns EL2N for class indices, and
        the loss for everything else.

        Args:
            losses: ``(B,)``, detached.
            logits: The prediction that the loss was given, or None where it is not known.
            inputs: The batch's first floating-point tensor ``(B, ...)``, or None.
            targets: The target that the loss was given, or None.

        Returns:
            ``(B,)``, non-negative.
        """
        if targets is None or targets.is_floating_point():
            return loss(losses)
        return el2n(losses, logits, inputs, targets)

    def select_batch(self, batch: Any, indices: Tensor) -> Any:
        """Take the samples ``indices (k,)`` out of a batch; see :func:`lightning_ast.core.select_batch`."""
        return select_batch(batch, indices, batch_size=self.count_samples(batch))

    def sample_indices(self, batch: Any) -> Tensor | None:
        """Return the dataset indices ``(B,)`` of a batch's samples, for ``mode="prune"``; None for the order drawn.

        Override it where ``collate_fn`` changes the order within a batch (it may sort by length), and let the dataset
        return each sample's index.
        """
        return None

    def sample_weights(self, batch: Any) -> Tensor | None:
        """Return the weights ``(B,)`` of a batch's samples, finite and at least 0; None where all weigh 1.

        An override makes the gradient of every step that of the weighted mean ``sum(u * loss) / sum(u)`` over the
        samples trained on, in warmup and cooldown too, and over all processes and micro-batches. The loss that
        ``training_step`` returns stays a plain mean: weights that it has already must not be given again.
        """
        return None

    def sample_labels(self, batch: Any) -> Tensor | None:
        """Return the class indices ``(B,)`` of a batch's samples; None for those that torch's loss function is told."""
        return None

    def count_samples(self, batch: Any) -> int:
        """Count the samples B in a batch; see :func:`lightning_ast.core.batch_size_of`."""
        return batch_size_of(batch)


def overrides(module: object, name: str) -> bool:
    """Tell whether ``module`` brings its own version of a :class:`SparseLossMixin` method.

    ``per_sample_loss`` counts on any module; the others only on one that uses the mixin.
    """
    own = getattr(type(module), name, None)  # of the class: a fit puts wrappers of its own on the instance
    if own is None or own is getattr(SparseLossMixin, name):
        return False
    return name == "per_sample_loss" or isinstance(module, SparseLossMixin)
