"""Step 4, all watched losses together: add them up, each with what it weighs in the loss that is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ast.core.entries.node_facts import below_ddp
from lightning_ast.core.losses.calls import REMEDY, WatchedCall, fold, widen
from lightning_ast.core.losses.capture import LossCapture, LossRecord
from lightning_ast.core.losses.functions import Elements
from lightning_ast.errors import LossCaptureError

__all__ = ["combine"]

_Weight = Tensor | float
_Part = tuple[WatchedCall, Elements, Tensor]


def combine(capture: LossCapture, loss: Tensor, batch_size: int, *, scale: float | Tensor = 1.0) -> LossRecord:
    """Add the watched losses up, each with what it weighs in the loss that is trained.

    Call it before the backward, and before hooks are placed on the graph: the part of the graph above the watched
    losses is differentiated. Terms that no torch loss function computed are left out.

    Args:
        capture: The capture that watched while the loss was computed.
        loss: A scalar with its graph. A loss without one must be what the one watched loss function returned.
        batch_size: The number of samples B.
        scale: The factor that the loss was multiplied by (of the fp16 scaler, of accumulation); it is taken out.

    Returns:
        Detached losses whose mean is the part of the trained loss that was watched (to first order, where the loss is
        a curved function of them: focal losses). The logits and targets are those of the heaviest loss with class
        outputs; where there are several, the device is waited for.

    Raises:
        LossCaptureError: No watched loss has a part in the trained one, or one that has cannot be taken apart.
    """
    weights = _weights(loss, [call for call in capture.calls if call.counted])
    if not weights:
        raise LossCaptureError(
            "no torch loss function has a part in the loss that is trained (it is written by hand, compiled or "
            f"computed elsewhere), and this significance is made of such losses. {REMEDY}"
        )
    parts: list[_Part] = []
    with torch.no_grad():
        for call, weight in weights:
            elements = call.take_apart(batch_size)
            share = _share(call, elements, weight * batch_size / scale, batch_size)
            parts.append((call, elements, share.to(loss.device)))
        shares = [share for _, _, share in parts]
        losses = shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)
        call, elements, _ = _primary(parts)
    return LossRecord.of(call, elements, losses)


def _weights(loss: Tensor, calls: list[WatchedCall]) -> list[tuple[WatchedCall, _Weight]]:
    """List the calls that have a part in a loss, each with the derivative of the loss by what it returned."""
    if len(calls) == 1 and _is_output(loss, calls[0]):  # the usual case, for which nothing is differentiated
        return [(calls[0], 1.0)]
    if calls and not loss.requires_grad:
        raise LossCaptureError(
            f"the loss has no graph, so what each of the watched losses weighs in it is not known. {REMEDY}"
        )
    # A loss without a graph (of frozen layers alone) adds nothing to the gradient.
    edges = [(call, call.edge) for call in calls if call.edge is not None]
    if not edges:
        return []
    root, seed = below_ddp(loss)
    # The weight is the derivative: none for a loss that is only logged, one for each element of an unreduced loss.
    found = torch.autograd.grad(root, [edge for _, edge in edges], seed, retain_graph=True, allow_unused=True)
    return [(call, widen(weight)) for (call, _), weight in zip(edges, found, strict=True) if weight is not None]


def _is_output(loss: Tensor, call: WatchedCall) -> bool:
    if loss.grad_fn is None or call.edge is None:
        return loss is call.output and not loss.requires_grad
    return loss.grad_fn is call.edge.node


def _share(call: WatchedCall, elements: Elements, factor: _Weight, batch_size: int) -> Tensor:
    """Compute what each sample adds through one call, ``(B,)``."""
    if call.reduction == "none":  # the factor has one number for each element
        return fold(elements.values * factor, batch_size, call.name)
    return fold(elements.values, batch_size, call.name) * factor / call.divisor(elements)


def _primary(parts: list[_Part]) -> _Part:
    """Choose whose logits and targets are kept: those of the heaviest with class outputs."""
    scored = [part for part in parts if part[1].logits is not None and part[1].kind != "regression"] or parts
    if len(scored) == 1:  # without a wait for the device
        return scored[0]
    weights = torch.stack([share.mean().abs() for _, _, share in scored])
    return scored[int(weights.argmax())]
