"""Step 1, the table behind it: how each of torch's loss functions is taken apart.

A rule runs the loss function with ``reduction="none"`` and says what its mean divides by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["REFUSED", "RULES", "Call", "Elements", "OutputKind"]

OutputKind = Literal["multiclass", "binary", "regression"]


@dataclass(frozen=True)
class Elements:
    """Unreduced loss elements ``(N, ...)``, their weights in the mean (None: ones), and what was predicted."""

    values: Tensor
    weights: Tensor | None
    logits: Tensor
    targets: Tensor
    kind: OutputKind
    ignore_index: int | None = None


Call = dict[str, Any]
Rule = Callable[[Callable[..., Tensor], Call], Elements]


def _unreduced(func: Callable[..., Tensor], call: Call) -> Tensor:
    arguments = {k: v for k, v in call.items() if k not in ("size_average", "reduce")}
    return func(**{**arguments, "reduction": "none"})


def _class_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """cross_entropy and nll_loss: the mean divides by the class weights of the valid targets.

    With class probabilities as targets it divides by their number. Source: torch.nn.CrossEntropyLoss.
    """
    values, logits, targets = _unreduced(func, call), call["input"], call["target"]
    if targets.is_floating_point():
        return Elements(values, None, logits, targets, "multiclass")
    ignore, weight = call["ignore_index"], call["weight"]
    valid = targets != ignore
    if weight is None:
        counts = valid.to(values.dtype)
    else:
        counts = weight[targets.where(valid, torch.zeros_like(targets))].to(values.dtype) * valid
    return Elements(values, counts, logits, targets, "multiclass", ignore)


def _probability_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """binary_cross_entropy takes probabilities: turn them back into logits for the significance."""
    values, p = _unreduced(func, call), call["input"]
    return Elements(values, None, torch.logit(p.detach(), eps=1e-6), call["target"], "binary")


def _binary_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    return Elements(_unreduced(func, call), None, call["input"], call["target"], "binary")


def _kl_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """kl_div: ``"batchmean"`` divides by the rows, ``"mean"`` by the elements. Inputs are log-probabilities."""
    values = _unreduced(func, call)
    targets = call["target"].exp() if call["log_target"] else call["target"]
    weights = None
    if call["reduction"] == "batchmean":
        weights = torch.full_like(values, values.shape[0] / values.numel())
    return Elements(values, weights, call["input"], targets, "multiclass")


def _regression_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Elementwise regression losses; ``weight`` (recent torch) enters both sums of the mean."""
    values, weight = _unreduced(func, call), call.get("weight")
    weights = None if weight is None else weight.expand_as(values)
    return Elements(values, weights, call["input"], call["target"], "regression")


def _first_two_rule(func: Callable[..., Tensor], call: Call) -> Elements:
    """Losses of several inputs (ranking, embedding, margins): score by the loss alone."""
    tensors = [value for value in call.values() if isinstance(value, Tensor)]
    return Elements(_unreduced(func, call), None, tensors[0], tensors[1], "regression")


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
}
REFUSED: dict[Any, str] = {F.ctc_loss: "ctc_loss"}
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
    REFUSED[F.linear_cross_entropy] = "linear_cross_entropy"
