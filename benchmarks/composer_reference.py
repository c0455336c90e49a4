"""What Composer's Selective Backprop selects, recorded from its own package, for a test of ours.

In an environment of its own, because mosaicml 0.32.1 needs an older torch:

    pip install mosaicml==0.32.1
    python benchmarks/composer_reference.py

The record is `benchmarks/records/composer-selective-backprop.json`.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECORD = Path(__file__).parent / "records" / "composer-selective-backprop.json"
KEEPS = (0.25, 0.5, 0.8)
SEEDS = range(5)
SIZE = 12
DURATIONS = (0.0, 0.49, 0.5, 0.7, 0.89, 0.9)
BATCHES = range(4)
INTERRUPTS = (0, 2, 3)


def _losses(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    return output


def selected(losses: Tensor, keep: float, seed: int) -> list[int]:
    """Return which samples Composer selects, in its order, with numpy's generator seeded."""
    from composer.algorithms.selective_backprop import select_using_loss

    np.random.seed(seed)
    _, kept = select_using_loss(losses, torch.arange(len(losses)), lambda x: x, _losses, keep)
    indices: list[int] = kept.tolist()
    return indices


def record() -> dict[str, Any]:
    """Record selections of random batches, and in which batches of a run it selects."""
    from composer.algorithms.selective_backprop.selective_backprop import should_selective_backprop

    draws = []
    for keep in KEEPS:
        for seed in SEEDS:
            losses = torch.rand(SIZE, generator=torch.Generator().manual_seed(seed))
            draws.append(
                {"keep": keep, "seed": seed, "losses": losses.tolist(), "selected": selected(losses, keep, seed)}
            )
    batches = [
        {
            "done": done,
            "batch": batch,
            "interrupt": each,
            "selects": should_selective_backprop(done, batch, 0.5, 0.9, each),
        }
        for done in DURATIONS
        for batch in BATCHES
        for each in INTERRUPTS
    ]
    return {
        "benchmark": "composer-reference",
        "versions": {name: version(name) for name in ("mosaicml", "torch", "numpy")},
        "draws": draws,
        "batches": batches,
    }


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record()) + "\n")
