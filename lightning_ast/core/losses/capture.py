"""Step 4 for scores that are made of losses: watch torch's loss functions while the user's unmodified code runs.

Nothing is changed and nothing is computed. ``combine`` adds the watched losses up once a score is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from lightning_ast.core.entries.node_facts import below_ddp
from lightning_ast.core.losses.calls import REMEDY, RULES, Elements, OutputKind, WatchedCall, class_labels, fold, widen
from lightning_ast.core.partial.registry import OpArgs, OpKwargs
from lightning_ast.errors import LossCaptureError

__all__ = ["LossCapture", "LossReached", "LossRecord", "check_losses", "combine"]

_Weight = Tensor | float
_Part = tuple[WatchedCall, Elements, Tensor]


class LossReached(BaseException):
    """Raised by a capture with ``stop=True`` at the loss, so that nothing behind it runs."""


@dataclass(frozen=True)
class LossRecord:
    """The losses of a batch, and what the heaviest of its loss functions was given.

    Attributes:
        name: The name of that loss function, e.g. ``"cross_entropy"``.
        losses: ``(B,)`` loss of each sample.
        logits: The prediction that it was given: class scores, binary scores or a regression output; None where that
            has no row for each sample.
        targets: The target that it was given; None where the logits are.
        kind: The kind of the logits.
        ignore_index: The target value that counts for nothing, or None.
    """

    name: str
    losses: Tensor
    logits: Tensor | None
    targets: Tensor | None
    kind: OutputKind
    ignore_index: int | None = None

    @property
    def labels(self) -> Tensor | None:
        """Return the class indices ``(B,)``, -1 for those to ignore; None where not every sample has one."""
        if self.kind != "multiclass" or self.targets is None:
            return None
        return class_labels(self.targets, self.ignore_index, len(self.losses))

    @classmethod
    def of(cls, call: WatchedCall, elements: Elements, losses: Tensor) -> LossRecord:
        """Keep the losses, which may have a graph, and what ``call`` was given, without one."""
        logits = None if elements.logits is None else elements.logits.detach()
        targets = None if elements.targets is None else elements.targets.detach()
        return cls(call.name, losses, logits, targets, elements.kind, elements.ignore_index)


class LossCapture(TorchFunctionMode):
    """Remembers the calls of torch's loss functions; what they return is not changed, and nothing is computed.

    Covers ``cross_entropy``, ``nll_loss``, ``binary_cross_entropy`` (with and without logits), ``kl_div``,
    ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``, ``huber_loss``, ``gaussian_nll_loss``, ``poisson_nll_loss``,
    ``ctc_loss``, ``linear_cross_entropy`` and the margin, hinge, ranking, embedding and triplet losses, called as
    functions or as modules, with any reduction. Token losses ``(B*T, C)`` are folded back to ``(B,)`` with the samples
    outermost: what ``view(-1, C)`` of ``(B, T, C)`` gives. Losses inside a ``torch.compile``d function are not seen.
    The calls keep the graph of their step alive until :meth:`clear`.

    Args:
        stop: Whether :class:`LossReached` is raised at the first loss instead of returning to the user's code.

    Attributes:
        calls: The calls that were watched, in order.

    Example:
        >>> with LossCapture() as capture:
        ...     x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
        ...     loss = torch.nn.functional.mse_loss(x, torch.zeros(3, 2))
        >>> capture.record(3).losses
        tensor([1., 4., 0.])
    """

    def __init__(self, *, stop: bool = False) -> None:
        super().__init__()
        self._stop = stop
        self._entered = False
        self._graded = True
        self.calls: list[WatchedCall] = []

    def __enter__(self) -> LossCapture:
        if not self._entered:
            self._entered = True
            self._graded = torch.is_grad_enabled()
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop watching; modes that were entered later stay on, and leaving twice does no harm."""
        # It is entered in one hook and left in another, so that others may be entered in between; and torch pops its
        # newest mode whatever its name. So take those above off, and put them back.
        above = []
        while self._entered and _len_torch_function_stack():
            mode = _pop_mode()  # type: ignore[no-untyped-call]
            if mode is self:
                self._entered = False
            else:
                above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: OpArgs = (), kwargs: OpKwargs | None = None
    ) -> Any:
        """Pass everything through and remember the loss functions."""
        kwargs = kwargs or {}
        # Under a compiler a call here would become a part of the compiled graph.
        if func not in RULES or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        # A loss under the user's own no_grad is only logged; under ours (a scoring pass) every loss counts.
        counted = torch.is_grad_enabled() or not self._graded
        if self._stop and counted:
            self.calls.append(WatchedCall(func, args, kwargs, None, counted=True))
            raise LossReached
        output = func(*args, **kwargs)
        self.calls.append(WatchedCall(func, args, kwargs, output, counted=counted))
        return output

    def clear(self) -> None:
        """Forget the calls and the graph that they keep alive."""
        self.calls.clear()

    def record(self, batch_size: int) -> LossRecord:
        """Return the losses of the one loss that was called; with a graph where gradients are enabled.

        Their mean is what the call returned; with ``reduction="sum"`` their sum is, and with ``"none"`` they are the
        means of each sample's elements. ``batch_size`` is the number of samples B.

        Raises:
            LossCaptureError: No loss or more than one was called, or it cannot be taken apart.
        """
        counted = [call for call in self.calls if call.counted]
        if not counted:
            raise LossCaptureError(
                "no torch loss function was called in the training step: the loss is written by hand, compiled, "
                f"computed elsewhere, or the step returned before it. {REMEDY}"
            )
        if len(counted) > 1:
            called = f"{len(counted)} losses were called ({', '.join(call.name for call in counted)})"
            raise LossCaptureError(f"{called}: which of them makes a sample matter is not known. {REMEDY}")
        call = counted[0]
        elements = call.take_apart(batch_size)
        losses = fold(elements.values, batch_size, call.name)
        if call.reduction != "sum":
            losses = losses * batch_size / call.divisor(elements)
        return LossRecord.of(call, elements, losses)

    def labels(self, batch_size: int) -> Tensor | None:
        """Return the class indices ``(B,)`` of the samples, -1 for those to ignore; nothing is computed for it.

        They are those of the first classification loss that has one a sample, rather one with a gradient; None without.
        """
        found = (call.labels(batch_size) for call in sorted(self.calls, key=lambda call: not call.counted))
        return next((labels for labels in found if labels is not None), None)


def check_losses(losses: Any, batch_size: int) -> Tensor:
    """Return the losses that a user's function gives, if they are ``(B,)``; raise LossCaptureError if not."""
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,) or not losses.is_floating_point():
        got = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise LossCaptureError(
            f"expected per-sample losses, a floating-point tensor of shape ({batch_size},), got {got}. "
            "Use reduction='none' and average everything but the batch dimension."
        )
    return losses


def combine(capture: LossCapture, loss: Tensor, batch_size: int, *, scale: float | Tensor = 1.0) -> LossRecord:
    """Add the watched losses up, each with what it weighs in ``loss``; raise LossCaptureError where none has a part.

    The loss is a scalar with its graph; one without must be what the only watched function returned. Call it before the
    backward, and before hooks are placed on the graph: the part above the watched losses is differentiated. ``scale``
    is the factor of the loss (of the fp16 scaler, of accumulation); it is taken out.

    The mean of the detached losses is the part of the trained loss that was watched (to first order, where that is a
    curved function of them: focal losses). The logits and targets are those of the heaviest loss with class outputs;
    where there are several, the device is waited for.
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
            factor = weight * batch_size / scale
            if call.reduction == "none":  # the factor has one number for each element
                share = fold(elements.values * factor, batch_size, call.name)
            else:
                share = fold(elements.values, batch_size, call.name) * factor / call.divisor(elements)
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


def _primary(parts: list[_Part]) -> _Part:
    """Choose whose logits and targets are kept: those of the heaviest with class outputs."""
    scored = [part for part in parts if part[1].logits is not None and part[1].kind != "regression"] or parts
    if len(scored) == 1:  # without a wait for the device
        return scored[0]
    weights = torch.stack([share.mean().abs() for _, _, share in scored])
    return scored[int(weights.argmax())]
