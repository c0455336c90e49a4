"""What the monitor shows beyond its usual line: metrics by name, time and memory of an epoch, and the convergence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_ast.monitoring.text import format_seconds

__all__ = ["epoch_details", "milestones"]

_SHARES = (0.9, 0.95, 0.99)


def epoch_details(
    names: Iterable[str], metrics: Mapping[str, Tensor], *, seconds: float | None, device: torch.device
) -> list[str]:
    """Return further fields of an epoch's line, as they are shown.

    Args:
        names: The names of the metrics to show; one that is not logged yet is left out.
        metrics: The metrics by name.
        seconds: The wall time of the epoch, validation included; None leaves time and memory out.
        device: The device of the training; a CUDA GPU has its highest memory so far shown.

    Example:
        >>> epoch_details(["val_top5"], {"val_top5": torch.tensor(0.5)}, seconds=75.0, device=torch.device("cpu"))
        ['val_top5: 0.5', 'Time: 1m 15s']
    """
    fields = [f"{name}: {float(metrics[name]):.4g}" for name in names if name in metrics]
    if seconds is not None:
        fields.append(f"Time: {format_seconds(seconds)}")
        if device.type == "cuda":
            fields.append(f"GPU: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    return fields


def milestones(accuracies: Mapping[int, float]) -> dict[float, int]:
    """Return the first epochs in which 90, 95 and 99 % of the best accuracy were reached: how a run converged.

    Args:
        accuracies: The validation accuracy in [0, 1] of each epoch that had one, by epoch from 0.

    Example:
        >>> milestones({0: 0.5, 1: 0.75, 2: 0.79, 3: 0.8})
        {0.9: 1, 0.95: 2, 0.99: 3}
    """
    if not accuracies:
        return {}
    best = max(accuracies.values())
    return {share: min(e for e, reached in accuracies.items() if reached >= share * best) for share in _SHARES}
