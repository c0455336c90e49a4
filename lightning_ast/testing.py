"""Checks for a user's own model: is partial backward exact on it, and what did it really compute?"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ast.core.batch import batch_size_of
from lightning_ast.core.execution import mask_rows
from lightning_ast.core.losses import LossCapture, LossReached, check_losses
from lightning_ast.core.partial import BackwardFlops, BatchNormBackward, compiled_parts, keep_rows, uncounted
from lightning_ast.mixin import SparseLossMixin, overrides
from lightning_ast.words import counted

__all__ = ["PartialBackwardCheck", "check_partial_backward"]

Losses = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class PartialBackwardCheck:
    """Partial backward against exact masking on one batch.

    Attributes:
        batch_size: samples of the batch.
        selected: samples whose losses were kept.
        relative_error: L2 norm of the difference of all parameter gradients over that of the exact ones.
        cosine: cosine between the two, over all parameters.
        relative_error_by_parameter: the same for each parameter that requires gradients.
        dense_ops: backward ops that ran over all rows, and how often.
        flops_share: FLOPs that the partial backward ran, as a share of the dense backward's; None for a module with
            compiled parts or dense recurrent layers, which torch does not count. ``selected / batch_size`` where every
            op ran on rows.
    """

    batch_size: int
    selected: int
    relative_error: float
    cosine: float
    relative_error_by_parameter: dict[str, float]
    dense_ops: dict[str, int] = field(default_factory=dict)
    flops_share: float | None = None

    def __str__(self) -> str:
        """A few lines to read: the worst parameters first."""
        worst = sorted(self.relative_error_by_parameter.items(), key=lambda item: -item[1])[:5]
        dense = ", ".join(f"{name} (x{calls})" for name, calls in self.dense_ops.items()) or "none"
        share = "not counted" if self.flops_share is None else f"{self.flops_share:.1%}"
        return "\n".join(
            [
                f"{self.selected} of {counted(self.batch_size, 'sample')} selected",
                f"relative error of the gradients {self.relative_error:.1e}, cosine {self.cosine:.6f}",
                f"backward FLOPs, as a share of dense: {share} (selected: {self.selected / self.batch_size:.1%})",
                f"ops over all rows: {dense}",
                *(f"  {error:.1e}  {name}" for name, error in worst),
            ]
        )


def check_partial_backward(
    module: nn.Module,
    batch: Any,
    *,
    indices: Tensor | None = None,
    losses: Losses | None = None,
    batchnorm: BatchNormBackward = "exact",
    seed: int = 0,
) -> PartialBackwardCheck:
    """Compare the parameter gradients of a partial backward with those of exact masking, on your own model.

    Both run forward and backward on the same batch with the same random state. The module's gradients, buffers and
    torchmetrics and the global random state are left as they were.

    Args:
        module: a LightningModule, or any module together with ``losses``, in the mode you train it in.
        batch: as ``training_step`` gets it, on the module's device.
        indices: ``(k,)`` int64 positions of the samples to keep; None keeps a random 40 %.
        losses: ``(module, batch) -> (B,)`` per-sample losses. None takes the module's ``per_sample_loss``, or captures
            what its ``training_step`` would average: give them for manual optimization and for steps that need a
            Trainer.
        batchnorm: ``"exact"`` to check the rules; ``"selected"`` to see how far the approximation is off.
        seed: of the random 40 % and of dropout.

    Returns:
        The comparison; ``print`` it.

    Raises:
        LossCaptureError: the losses cannot be captured or have the wrong shape; the message names the remedy.
        TypeError: the module has no ``training_step`` and ``losses`` was not given.
        ValueError: no parameter requires gradients, or ``indices`` are not positions in the batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(10, 4), torch.randint(0, 3, (10,))
        >>> def losses(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> check = check_partial_backward(model, batch, losses=losses)
        >>> check.relative_error < 1e-5, check.flops_share, check.dense_ops
        (True, 0.4, {})
    """
    size = _count(module, batch)
    if indices is None:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(size, generator=generator)[: max(1, round(0.4 * size))].sort().values
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(f"expected indices of the batch's {counted(size, 'sample')}, got {indices.tolist()}.")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"no parameter of {type(module).__name__} requires gradients: nothing to compare.")
    dense_ops: Counter[str] = Counter()
    flops = None if compiled_parts(module) else BackwardFlops()
    compute = _losses_of(module) if losses is None else losses

    def partial(full: Tensor) -> Tensor:
        return keep_rows(full, indices.to(full.device), batchnorm=batchnorm, dense_ops=dense_ops)

    def exact(full: Tensor) -> Tensor:
        return mask_rows(full, indices.to(full.device))

    want = _gradients(module, batch, compute, seed, exact, nullcontext())
    got = _gradients(module, batch, compute, seed, partial, flops or nullcontext())
    all_want, all_got = (torch.cat([g.flatten().double() for g in each.values()]) for each in (want, got))
    return PartialBackwardCheck(
        batch_size=size,
        selected=indices.numel(),
        relative_error=_relative(all_want, all_got),
        cosine=float(torch.nn.functional.cosine_similarity(all_want, all_got, dim=0)),
        relative_error_by_parameter={name: _relative(want[name], got[name]) for name in want},
        dense_ops=dict(dense_ops),
        flops_share=None if flops is None or uncounted(dense_ops) else flops.executed_share,
    )


def _real(gradient: Tensor) -> Tensor:
    """An ordinary real tensor with the same norm."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _relative(want: Tensor, got: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; the plain norm where that is zero."""
    scale = float(want.norm())
    return float((want - got).norm()) / (scale if scale > 0 else 1.0)


def _count(module: Any, batch: Any) -> int:
    return module.count_samples(batch) if isinstance(module, SparseLossMixin) else batch_size_of(batch)


def _losses_of(module: Any) -> Losses:
    if overrides(module, "per_sample_loss"):
        return lambda module, batch: module.per_sample_loss(batch, 0)
    if not hasattr(module, "training_step"):
        raise TypeError(
            f"{type(module).__name__} has no training_step: pass `losses=lambda module, batch: ...`, which returns the "
            "per-sample losses, shape (B,)."
        )
    return _captured


def _captured(module: Any, batch: Any) -> Tensor:
    with LossCapture(stop=True) as capture, suppress(LossReached), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*self.log.*")  # no trainer is attached
        module.training_step(batch, 0)
    losses: Tensor = capture.record(_count(module, batch)).losses
    return losses


def _gradients(
    module: nn.Module,
    batch: Any,
    losses: Losses,
    seed: int,
    keep: Callable[[Tensor], Tensor],
    count: AbstractContextManager[Any],
) -> dict[str, Tensor]:
    """Gradients by parameter of one forward and backward that leave the module as it was."""
    before = {name: p.grad for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    metrics = [(m, {n: deepcopy(vars(m)[n]) for n in _state_of(m)}) for m in module.modules() if isinstance(m, Metric)]
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
            module.zero_grad(set_to_none=True)
            loss = keep(check_losses(losses(module, batch), _count(module, batch))).sum()
            with count:
                loss.backward()  # type: ignore[no-untyped-call]
        return {
            name: torch.zeros_like(p) if p.grad is None else _real(p.grad)
            for name, p in module.named_parameters()
            if p.requires_grad
        }
    finally:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.grad = before[name]
            for name, b in module.named_buffers():
                if name in buffers:  # not one that the forward made
                    b.copy_(buffers[name])
        for metric, state in metrics:
            vars(metric).update(state)


def _state_of(metric: Metric) -> list[str]:
    """The attributes of a metric that an update changes."""
    return [*metric.metric_state, "_update_count", "_computed"]
