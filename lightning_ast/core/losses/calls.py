"""Step 4, one call of a torch loss function: remember it, and take it apart once a score is asked for.

The table ``RULES`` tells how each function is taken apart: a rule runs it with ``reduction="none"`` and gives the
divisor of its mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_ast.core.entries.node_facts import rows_in_order
from lightning_ast.core.partial.registry import OpArgs, OpKwargs
from lightning_ast.errors import LossCaptureError

__all__ = ["REMEDY", "RULES", "Elements", "OutputKind", "WatchedCall", "class_labels", "fold", "widen"]

OutputKind = Literal["multiclass", "binary", "regression"]


@dataclass(frozen=True)
class Elements:
    """The elements of one loss, and what they were computed from."""

    values: Tensor  # (N, ...), unreduced
    # The number, or the summed weight, by which reduction="mean" divides their sum; never 0 where no target is valid.
    divisor: Tensor | int
    logits: Tensor | None  # the prediction; None where it has no row for each element
    targets: Tensor | None  # None where the logits are
    kind: OutputKind  # of the logits
    ignore_index: int | None = None  # the target value that counts for nothing


Call = dict[str, Any]
Rule = Callable[[Callable[..., Tensor], Call], Elements]


def _unreduced(func: Callable[..., Tensor], call: Call) -> Tensor:
    arguments = {k: v for k, v in call.items() if k not in ("size_average", "reduce")}
    return func(**{**arguments, "reduction": "none"})


def _class_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Take cross_entropy and nll_loss apart: the mean divides by the class weights of the valid targets."""
    values = _unreduced(func, call)
    logits = call["input"]
    targets = call["target"]
    if targets.is_floating_point():  # class probabilities: the mean divides by their number, whatever the weights
        return Elements(values, values.numel(), logits, targets, "multiclass")
    ignore = call["ignore_index"]
    weight = call["weight"]
    valid = targets != ignore
    if weight is None:
        divisor = valid.sum().clamp_min(1)
    else:
        # An ignored target is no index: 0 stands in its place, and its weight is taken out again.
        weights = weight[targets.where(valid, torch.zeros_like(targets))] * valid
        divisor = weights.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    return Elements(values, divisor, logits, targets, "multiclass", ignore)


def _linear_class_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Take linear_cross_entropy apart: the cross-entropy of a linear layer's output, of any number of dimensions."""
    weight = call["linear_weight"]
    bias = call["linear_bias"]
    logits = F.linear(call["input"], weight.flatten(0, -2))
    logits = logits.reshape(*logits.shape[:-1], *weight.shape[:-1])
    if bias is not None:
        logits = logits + bias.reshape(*bias.shape, *[1] * (weight.ndim - 1 - bias.ndim))
    ignore = -100 if call["ignore_index"] is None else call["ignore_index"]
    alike = {name: call[name] for name in ("target", "weight", "label_smoothing", "reduction")}
    return _class_rule(F.cross_entropy, {"input": logits, "ignore_index": ignore, **alike})


def _binary_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    values = _unreduced(func, call)
    logits = call["input"]
    if func is F.binary_cross_entropy:  # it is given probabilities, and the significance wants logits
        logits = torch.logit(logits.detach(), eps=1e-6)  # finite also for probabilities of 0 and 1
    return Elements(values, values.numel(), logits, call["target"], "binary")


def _kl_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Take kl_div apart: ``"batchmean"`` divides by the rows. Inputs are log-probabilities."""
    values = _unreduced(func, call)
    targets = call["target"].exp() if call["log_target"] else call["target"]
    divisor = values.shape[0] if call["reduction"] == "batchmean" else values.numel()
    return Elements(values, divisor, call["input"], targets, "multiclass")


def _ctc_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Take ctc_loss apart: its mean divides each sample by the length of its target first. Time is its first axis."""
    values = _unreduced(func, call)
    if call["reduction"] == "mean":
        values = values / torch.as_tensor(call["target_lengths"], device=values.device).clamp_min(1)
    return Elements(values, values.numel(), None, None, "regression")  # its logits have no row for each sample


def _regression_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Take an elementwise regression loss apart; ``weight`` (recent torch) enters both sums of the mean."""
    values = _unreduced(func, call)
    weight = call.get("weight")
    divisor = values.numel() if weight is None else weight.expand_as(values).sum()
    return Elements(values, divisor, call["input"], call["target"], "regression")


def _first_two_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Take a loss of several inputs apart (ranking, embedding, margins); only its values can be a score."""
    values = _unreduced(func, call)
    tensors = [value for value in call.values() if isinstance(value, Tensor)]
    return Elements(values, values.numel(), tensors[0], tensors[1], "regression")


_FUNCTIONS = {
    _class_rule: "cross_entropy nll_loss",
    _linear_class_rule: "linear_cross_entropy",  # torch >= 2.13
    _binary_rule: "binary_cross_entropy binary_cross_entropy_with_logits multilabel_soft_margin_loss",
    _kl_rule: "kl_div",
    _regression_rule: "mse_loss l1_loss smooth_l1_loss huber_loss gaussian_nll_loss poisson_nll_loss soft_margin_loss "
    "hinge_embedding_loss",
    _first_two_rule: "multi_margin_loss multilabel_margin_loss margin_ranking_loss cosine_embedding_loss "
    "triplet_margin_loss triplet_margin_with_distance_loss",
    _ctc_rule: "ctc_loss",
}
RULES: dict[Callable[..., Any], Rule] = {
    getattr(F, name): rule for rule, names in _FUNCTIONS.items() for name in names.split() if hasattr(F, name)
}
_CLASS_RULES = (_class_rule, _linear_class_rule)
"""The rules of the loss functions whose targets may be class indices."""

REMEDY = (
    "Use significance='gradient' (the default), which needs no torch loss function. Or define "
    "`per_sample_loss(self, batch, batch_idx)` on your module, return the unreduced losses, shape (B,), and call it in "
    "training_step."
)
_PARAMETERS = {func: inspect.signature(func).parameters for func in RULES}
_DEFAULTS = {
    func: {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    for func, parameters in _PARAMETERS.items()
}


@dataclass(eq=False)
class WatchedCall:
    """One call of a loss function."""

    func: Callable[..., Tensor]
    args: OpArgs
    kwargs: OpKwargs
    output: Tensor | None  # None where the capture stopped there
    counted: bool  # whether the call may enter a score: it was not under the user's own `torch.no_grad`

    def __post_init__(self) -> None:
        output = self.output
        # Where the gradient of the output enters the graph. It stays the same if the output is changed in place later
        # (`loss += penalty`).
        self.edge = None if output is None or not output.requires_grad else get_gradient_edge(output)
        self._versions = _versions(self.args, self.kwargs)

    @property
    def name(self) -> str:
        """Return the name of the loss function."""
        return self.func.__name__

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Return all arguments by name, in the order of the function's parameters, defaults included."""
        # Signature.bind does the same in ten times the time, and a score is made in every batch.
        names = _PARAMETERS[self.func]
        known = {**_DEFAULTS[self.func], **dict(zip(names, self.args, strict=False)), **self.kwargs}
        return {name: known[name] for name in names if name in known}

    @property
    def reduction(self) -> str:
        """Return the reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``."""
        return str(self.arguments["reduction"])

    @property
    def changed(self) -> bool:
        """Tell whether a tensor among the arguments was changed in place after the call."""
        return self._versions != _versions(self.args, self.kwargs)

    def labels(self, batch_size: int) -> Tensor | None:
        """Return the class indices ``(B,)`` that the loss was given, -1 for those to ignore; None where it has none."""
        if RULES[self.func] not in _CLASS_RULES or self.changed:  # targets that were changed since are others
            return None
        ignore_index = self.arguments["ignore_index"]
        return class_labels(self.arguments["target"], -100 if ignore_index is None else ignore_index, batch_size)

    def take_apart(self, batch_size: int) -> Elements:
        """Compute the elements that the call reduced, in at least 32 bits; with a graph where gradients are enabled.

        Raise LossCaptureError if they cannot be had, or if it is not known which sample each belongs to.
        """
        if self.arguments.get("size_average") is not None or self.arguments.get("reduce") is not None:
            raise LossCaptureError(
                f"`{self.name}` was called with the deprecated size_average/reduce: use `reduction=` instead."
            )
        if self.changed:
            raise LossCaptureError(
                f"a tensor that `{self.name}` was given was changed in place after it: change a copy. Or: {REMEDY}"
            )
        # autocast would have computed these losses in float32, and it is not on any more
        elements = RULES[self.func](self.func, {name: widen(value) for name, value in self.arguments.items()})
        # Several rows a sample, as of tokens: how they lie cannot be told from their number.
        if elements.values.ndim > 0 and elements.logits is not None and elements.values.shape[0] != batch_size:
            given = next(iter(self.arguments.values()))
            if not rows_in_order(given, batch_size):
                raise LossCaptureError(
                    f"the several rows a sample that `{self.name}` is given were picked by an index or a mask, or do "
                    "not lie together (views joined along the batch, time first, ensembles, chunks). Keep all rows and "
                    f"use `ignore_index`; flatten with the samples outermost, `(B, T, C)` to `(B * T, C)`. Or: {REMEDY}"
                )
        return elements

    def divisor(self, elements: Elements) -> Tensor | int:
        """Return what the call's own reduction divides the sum of its elements by: 1 for ``"sum"``."""
        if self.reduction == "sum":
            return 1
        return elements.values.numel() if self.reduction == "none" else elements.divisor


def widen(value: Any) -> Any:
    """Turn a tensor of 16 bits into one of 32, and leave everything else."""
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value


def fold(values: Tensor, batch_size: int, name: str) -> Tensor:
    """Add the elements ``(N, ...)`` of each sample up, to ``(B,)``; N is B or B * T with the samples outermost."""
    if values.ndim == 0 or values.shape[0] == 0 or values.shape[0] % batch_size != 0:
        raise LossCaptureError(
            f"expected the losses of `{name}` to have a leading dimension of {batch_size} (the batch size) or a "
            f"multiple of it (tokens), got shape {tuple(values.shape)}. {REMEDY}"
        )
    return values if values.shape == (batch_size,) else values.reshape(batch_size, -1).sum(1)


def class_labels(targets: Tensor, ignore_index: int | None, batch_size: int) -> Tensor | None:
    """Return ``targets`` if they are class indices ``(B,)``, with -1 in place of ``ignore_index``; otherwise None."""
    if targets.shape != (batch_size,) or targets.is_floating_point():
        return None
    if ignore_index is None:
        return targets
    return targets.where(targets != ignore_index, torch.full_like(targets, -1))


def _versions(args: OpArgs, kwargs: OpKwargs) -> tuple[int, ...]:
    """Count the changes in place of the tensors; inference tensors do not count theirs."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)
