"""Step 4, the table of torch's loss functions: how each is taken apart.

A rule runs the loss function with ``reduction="none"`` and gives the divisor of its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLASS_LOSSES", "RULES", "Call", "Elements", "OutputKind"]

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


def _probability_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Take binary_cross_entropy apart; it is given probabilities, and the significance wants logits."""
    values = _unreduced(func, call)
    logits = torch.logit(call["input"].detach(), eps=1e-6)  # finite also for probabilities of 0 and 1
    return Elements(values, values.numel(), logits, call["target"], "binary")


def _binary_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    values = _unreduced(func, call)
    return Elements(values, values.numel(), call["input"], call["target"], "binary")


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


RULES: dict[Callable[..., Any], Rule] = {
    F.cross_entropy: _class_rule,
    F.nll_loss: _class_rule,
    F.binary_cross_entropy: _probability_rule,
    F.binary_cross_entropy_with_logits: _binary_rule,
    F.multilabel_soft_margin_loss: _binary_rule,
    F.kl_div: _kl_rule,
    F.mse_loss: _regression_rule,
    F.l1_loss: _regression_rule,
    F.smooth_l1_loss: _regression_rule,
    F.huber_loss: _regression_rule,
    F.gaussian_nll_loss: _regression_rule,
    F.poisson_nll_loss: _regression_rule,
    F.soft_margin_loss: _regression_rule,
    F.hinge_embedding_loss: _regression_rule,
    F.multi_margin_loss: _first_two_rule,
    F.multilabel_margin_loss: _first_two_rule,
    F.margin_ranking_loss: _first_two_rule,
    F.cosine_embedding_loss: _first_two_rule,
    F.triplet_margin_loss: _first_two_rule,
    F.triplet_margin_with_distance_loss: _first_two_rule,
    F.ctc_loss: _ctc_rule,
}
CLASS_LOSSES: set[Callable[..., Any]] = {F.cross_entropy, F.nll_loss}
"""The loss functions whose targets may be class indices."""
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
    RULES[F.linear_cross_entropy] = _linear_class_rule
    CLASS_LOSSES.add(F.linear_cross_entropy)
