"""Checks for a user's own model: is partial backward exact on it, and what did it really compute?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ast.core.batch.samples import batch_size_of
from lightning_ast.core.dependence.order import OrderedTrace
from lightning_ast.core.entries.finder import EntryFinder, entry_error
from lightning_ast.core.gradient_gate import BatchGate, Execution, Kept
from lightning_ast.core.losses.capture import check_losses
from lightning_ast.core.partial.flops import BackwardFlops, compiled_parts, uncounted
from lightning_ast.core.partial.rows import BatchNormBackward
from lightning_ast.core.partial.rules.normalization import FEWEST_VALUES, is_batchnorm
from lightning_ast.lightning_internals.still_metrics import state_of
from lightning_ast.mixin import SparseLossMixin, overrides
from lightning_ast.words import counted

__all__ = ["PartialBackwardCheck", "check_partial_backward"]

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class PartialBackwardCheck:
    """Partial backward against exact masking on one batch.

    Attributes:
        batch_size: The number of samples of the batch.
        selected: The number of samples whose rows of the gradient were kept.
        relative_error: The L2 norm of the difference of all parameter gradients over that of the exact ones.
        cosine: The cosine between the two, over all parameters.
        relative_error_by_parameter: The relative error of each parameter that requires gradients.
        dense_ops: The backward ops that ran over all rows, and how often.
        flops_share: The FLOPs that the partial backward ran, as a share of the dense backward's; None for a module with
            compiled parts or dense recurrent layers, which torch does not count. ``selected / batch_size`` where every
            op ran on rows.
        batchnorm: The backward of BatchNorm in training mode.
        selected_flops_share: The same share with ``batchnorm="selected"``, as a run has it by default; None where
            ``"exact"`` has run no BatchNorm over all rows, and where it is not counted.
    """

    batch_size: int
    selected: int
    relative_error: float
    cosine: float
    relative_error_by_parameter: dict[str, float]
    dense_ops: dict[str, int] = field(default_factory=dict)
    flops_share: float | None = None
    batchnorm: BatchNormBackward = "exact"
    selected_flops_share: float | None = None

    def __str__(self) -> str:
        """Write the comparison out in a few lines, the worst parameters first."""
        worst = sorted(self.relative_error_by_parameter.items(), key=lambda item: -item[1])[:5]
        dense = ", ".join(f"{name} (x{calls})" for name, calls in self.dense_ops.items()) or "none"
        share = _percent(self.flops_share)
        return "\n".join(
            [
                f"{self.selected} of {counted(self.batch_size, 'sample')} selected",
                f"relative error of the gradients {self.relative_error:.1e}, cosine {self.cosine:.6f}",
                f"backward FLOPs, as a share of dense: {share} (selected: {self.selected / self.batch_size:.1%})",
                f"ops over all rows: {dense}",
                *self._of_batchnorm(),
                *(f"  {error:.1e}  {name}" for name, error in worst),
            ]
        )

    def _of_batchnorm(self) -> list[str]:
        """Tell why a BatchNorm ran over all rows, and what else it would cost."""
        if not any(map(is_batchnorm, self.dense_ops)):
            return []
        why = f"fewer than {FEWEST_VALUES} values a channel among the selected rows: check more samples"
        if self.batchnorm == "exact":
            why = "batchnorm='exact' costs that; with 'selected', the default of a run, the share of the FLOPs is "
            why += _percent(self.selected_flops_share)
        return [f"  BatchNorm, and all that lies before it: {why}"]


def _percent(share: float | None) -> str:
    return "not counted" if share is None else f"{share:.1%}"


def check_partial_backward(
    module: nn.Module,
    batch: Any,
    *,
    indices: Tensor | None = None,
    loss: Loss | None = None,
    losses: Loss | None = None,
    batchnorm: BatchNormBackward = "exact",
    seed: int = 0,
) -> PartialBackwardCheck:
    """Compare the parameter gradients of a partial backward with those of exact masking, on your own model.

    Both run forward and backward on the same batch with the same random state, and keep the same samples' rows where
    the gradient of the loss enters the network. The module's gradients, buffers and torchmetrics and the global random
    state are left as they were.

    Args:
        module: A LightningModule, or any module together with ``loss``, in the mode you train it in.
        batch: The batch as ``training_step`` gets it, on the module's device.
        indices: ``(k,)`` int64 positions of the samples to keep; None keeps a random 40 %.
        loss: ``(module, batch) -> scalar``, of any form. None takes what ``training_step`` returns: give it for manual
            optimization and for steps that need a Trainer.
        losses: ``(module, batch) -> (B,)`` per-sample losses in place of ``loss``; their mean is taken.
        batchnorm: ``"exact"`` to check the rules; ``"selected"`` to see how far the approximation is off. A module
            with BatchNorm runs a third time with ``"exact"``, to tell what ``"selected"`` would cost.
        seed: The seed of the random 40 % and of dropout.

    Returns:
        The comparison; ``print`` it.

    Raises:
        EntryError: It cannot be told which rows of the gradient belong to which sample.
        LossCaptureError: ``losses`` are not of shape ``(B,)``.
        TypeError: There is no loss: the module has no ``training_step``, or that returns none.
        ValueError: No parameter requires gradients, or ``indices`` are not positions in the batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(10, 4), torch.randint(0, 3, (10,))
        >>> def loss(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> check = check_partial_backward(model, batch, loss=loss)
        >>> check.relative_error < 1e-5, check.flops_share, check.dense_ops
        (True, 0.4, {})
    """
    size = module.count_samples(batch) if isinstance(module, SparseLossMixin) else batch_size_of(batch)
    if indices is None:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(size, generator=generator)[: max(1, round(0.4 * size))]
    indices = indices.sort().values
    if indices.numel() and not 0 <= int(indices[0]) <= int(indices[-1]) < size:
        raise ValueError(f"expected indices of the batch's {counted(size, 'sample')}, got {indices.tolist()}.")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"no parameter of {type(module).__name__} requires gradients: nothing to compare.")
    compute = loss or (_mean_of(losses, size) if losses is not None else _loss_of(module))
    want, got, dense_ops, share, selected_share = _both_ways(module, batch, compute, size, indices, batchnorm, seed)
    all_want, all_got = (torch.cat([g.flatten().double() for g in each.values()]) for each in (want, got))
    return PartialBackwardCheck(
        batch_size=size,
        selected=indices.numel(),
        relative_error=_relative(all_want, all_got),
        cosine=float(torch.nn.functional.cosine_similarity(all_want, all_got, dim=0)),
        relative_error_by_parameter={name: _relative(want[name], got[name]) for name in want},
        dense_ops=dict(dense_ops),
        flops_share=share,
        batchnorm=batchnorm,
        selected_flops_share=selected_share,
    )


def _both_ways(
    module: nn.Module, batch: Any, compute: Loss, size: int, indices: Tensor, batchnorm: BatchNormBackward, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Counter[str], float | None, float | None]:
    """Return the gradients by masking and those over rows, the ops that ran over all of them, and the shares of FLOPs.

    The backward runs a third time where BatchNorm is exact, to count what it would cost.
    """
    finder = EntryFinder()
    take = module.select_batch if overrides(module, "select_batch") else None
    trace = OrderedTrace(batch, size, take=take)  # type: ignore[arg-type]

    def run(execution: Execution, how: BatchNormBackward) -> tuple[dict[str, Tensor], Counter[str], float | None]:
        ops = Counter[str]()
        flops = None if execution == "mask" or compiled_parts(module) else BackwardFlops()
        kept = Kept(indices.to(next(module.parameters()).device))
        gate = BatchGate(size, lambda norms: kept, execution=execution, batchnorm=how, dense_ops=ops)
        gate.settle(kept)  # the same samples in both
        with _left_as_it_was(module, seed):
            with nullcontext() if finder.proved else trace:
                value = compute(module, batch)
            found = finder.locate(value, size, None if finder.proved else trace)
            if not found.entries:
                raise entry_error(found.unclear, size)
            gate.open(value, found.entries)
            with flops or nullcontext():
                value.backward()  # type: ignore[no-untyped-call]
            gate.close()
            trace.release()  # of use for the first alone: the graph of the second has the same form
            got = {name: _real(p) for name, p in module.named_parameters() if p.requires_grad}
        return got, ops, None if flops is None or uncounted(ops) else flops.executed_share

    masked, _, _ = run("mask", batchnorm)
    partial, dense_ops, share = run("partial", batchnorm)
    needs_third = batchnorm == "exact" and any(map(is_batchnorm, dense_ops))
    return masked, partial, dense_ops, share, run("partial", "selected")[2] if needs_third else None


def _relative(want: Tensor, got: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted; the plain norm where that is zero."""
    scale = float(want.norm())
    return float((want - got).norm()) / (scale if scale > 0 else 1.0)


def _mean_of(losses: Loss, size: int) -> Loss:
    return lambda module, batch: check_losses(losses(module, batch), size).mean()


def _loss_of(module: Any) -> Loss:
    """Take the loss of the module's own training step."""
    automatic = getattr(module, "automatic_optimization", True)
    if not automatic or not hasattr(module, "training_step"):
        reason = "has no training_step" if automatic else "runs its own backward"
        raise TypeError(
            f"{type(module).__name__} {reason}: pass `loss=lambda module, batch: ...`, which returns the scalar loss."
        )
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def compute(module: Any, batch: Any) -> Tensor:
        output = module.training_step(*((batch, 0) if takes_index else (batch,)))
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"expected training_step of {type(module).__name__} to return a loss, got {type(loss).__name__}: pass "
                "`loss=lambda module, batch: ...`, which returns the scalar loss."
            )
        return loss

    return compute


def _real(parameter: nn.Parameter) -> Tensor:
    """Return the gradient as an ordinary real tensor with the same norm."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


@contextmanager
def _left_as_it_was(module: nn.Module, seed: int) -> Iterator[None]:
    """Begin without gradients; restore them, buffers, torchmetrics and random state; log nothing meanwhile."""
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    gradients = {name: p.grad for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    metrics = [(m, state_of(m)) for m in module.modules() if isinstance(m, Metric)]
    stubs = {"log", "log_dict"} - vars(module).keys() if isinstance(module, pl.LightningModule) else set()
    vars(module).update(dict.fromkeys(stubs, lambda *_, **__: None))
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
            module.zero_grad(set_to_none=True)
            yield
    finally:
        for name in stubs:
            del vars(module)[name]
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.grad = gradients[name]
            for name, b in module.named_buffers():
                if name in buffers:  # not one that the forward made
                    b.copy_(buffers[name])
        for metric, state in metrics:
            vars(metric).update(state)
