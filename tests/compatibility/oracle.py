"""The matrix's oracle: a plain PyTorch loop, written by hand, in one process, without the package.

It is given what each rank trained on, micro-batch by micro-batch, and which samples were selected with which weights;
it trains the same network with the same optimizers on "one large batch" for every optimizer step.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Micro", "network", "optimizers_of", "replay", "windows"]

SHARP = 4.0
"""Factor on the last layer's weights: an untrained network's losses would be all alike, and so would be the weights."""


@dataclass
class Micro:
    """A micro-batch of one rank, as it was trained on.

    Attributes:
        epoch: it belongs to.
        x: ``(B, 1, 8, 8)`` images, as the network got them.
        y: ``(B,)`` labels.
        indices: ``(k,)`` positions of the selected samples, or None where the step was an ordinary one.
        weights: ``(k,)``, or None for 1.
    """

    epoch: int
    x: Tensor
    y: Tensor
    indices: Tensor | None
    weights: Tensor | None


def network(batchnorm: bool = False) -> nn.Sequential:
    """The network of all cells; the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8) if batchnorm else nn.GroupNorm(2, 8)
        net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    with torch.no_grad():
        net[-1].weight.mul_(SHARP)
    return net


def optimizers_of(cell: Any, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """The optimizers of a cell: one, or two over two parts of the network."""
    if cell.optimization == "lbfgs":
        # in bfloat16 one iteration a batch: the curvature between two is rounding, and so is the loss's change
        rounded = cell.precision == "bf16-true"
        options = {"max_iter": 2, "tolerance_change": 0.0} if rounded else {"max_iter": 3}
        return [torch.optim.LBFGS(parameters, lr=1.0, **options)]
    if cell.optimization == "two":
        return [torch.optim.SGD(parameters[:-2], lr=0.05, momentum=0.9), torch.optim.SGD(parameters[-2:], lr=0.1)]
    return [torch.optim.SGD(parameters, lr=0.05, momentum=0.9)]


def windows(micros: list[Micro], accumulation: int) -> list[list[Micro]]:
    """The micro-batches of each optimizer step; an epoch's end ends a step."""
    found: list[list[Micro]] = []
    for micro in micros:
        if not found or len(found[-1]) == accumulation or found[-1][-1].epoch != micro.epoch:
            found.append([])
        found[-1].append(micro)
    return found


def replay(ranks: list[list[Micro]], cell: Any, *, dense: bool = False, device: str = "cpu") -> list[Tensor]:
    """Train as the cell was to train.

    Args:
        ranks: what each rank trained on.
        cell: the set-up.
        dense: train on all samples without weights instead, for comparison.
        device: to train on.

    Returns:
        The parameters at the end.
    """
    net = network(cell.batchnorm != "none").to(device, torch.bfloat16 if cell.precision == "bf16-true" else None)
    optimizers = optimizers_of(cell, list(net.parameters()))
    scaler = torch.amp.GradScaler(device, enabled=cell.precision == "16-mixed")
    if dense:
        ranks = [[Micro(micro.epoch, micro.x, micro.y, None, None) for micro in micros] for micros in ranks]
    for step in zip(*(windows(micros, int(cell.accumulation)) for micros in ranks), strict=True):

        def closure(step: Any = step) -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = _loss(net, step, cell, device)
            scaler.scale(loss).backward()
            return loss.detach()

        if cell.optimization == "lbfgs":
            optimizers[0].step(closure)
            continue
        closure()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return [parameter.detach().float().cpu() for parameter in net.parameters()]


def _loss(net: nn.Module, step: tuple[list[Micro], ...], cell: Any, device: str) -> Tensor:
    """The loss of an optimizer step: of the micro-batches of all ranks, as of one large batch.

    A short last window of an epoch keeps the share that Lightning gives it: its micro-batches by
    ``accumulate_grad_batches``.
    """
    micros = [micro for window in step for micro in window]
    losses = [_losses(net, micro, cell, device) for micro in micros]
    share = len(step[0]) / int(cell.accumulation)
    if all(micro.indices is None for micro in micros):  # an ordinary step: the mean of the means
        return share * torch.stack([each.mean() for each in losses]).mean()
    assert all(micro.indices is not None for micro in micros)
    ones = [torch.ones(each.numel(), device=device) for each in losses]
    factors = [one if m.weights is None else m.weights.to(device).float() for one, m in zip(ones, micros)]
    total = sum((factor * each).sum() for factor, each in zip(factors, losses))
    divisor = sum(m.y.numel() for m in micros) if cell.weighting == "unbiased" else sum(f.sum() for f in factors)
    return share * total / divisor


def _losses(net: nn.Module, micro: Micro, cell: Any, device: str) -> Tensor:
    """``(k,)`` losses of the selected samples: of a forward on those alone in ``subset``, of the whole batch's else."""
    x, y, kept = micro.x.to(device, next(net.parameters()).dtype), micro.y.to(device), micro.indices
    kept = torch.arange(y.numel(), device=device) if kept is None else kept.to(device)
    types = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.half}
    mixed: Any = contextlib.nullcontext()
    if cell.precision in types:
        mixed = torch.autocast(device, dtype=types[cell.precision], cache_enabled=False)
    with mixed:
        if cell.mode == "subset":
            return F.cross_entropy(net(x[kept]), y[kept], reduction="none").float()
        return F.cross_entropy(net(x), y, reduction="none").float()[kept]
