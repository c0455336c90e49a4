"""Systematic sampling: a draw with exact inclusion probabilities whose count hardly varies."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["drawn", "generator_of", "on_host", "systematic_sample"]


def systematic_sample(probability: Tensor, generator: torch.Generator) -> Tensor:
    """Draw samples with the given inclusion probabilities, at ascending positions ``(k,)``.

    Each sample is kept with exactly its probability; the count differs from the sum of the probabilities by less than
    1, where independent draws would scatter by its square root.
    Source: W. G. Madow, On the theory of systematic sampling, II, Ann. Math. Statist. 20 (1949) 333-354.
    """
    return torch.from_numpy(drawn(on_host(probability), generator)).to(probability.device)


def drawn(probability: np.ndarray[Any, Any], generator: torch.Generator) -> np.ndarray[Any, Any]:
    """Draw as :func:`systematic_sample` does, on the host."""
    # The samples are laid end to end in random order, each as long as its probability; a comb of unit spacing with a
    # random offset picks those it hits. Drawn on the CPU, they are the same for every device.
    noise = torch.rand(len(probability) + 1, generator=generator, dtype=torch.float64).numpy()
    order = noise[:-1].argsort()
    ends = np.zeros(len(noise))
    np.floor(probability[order].cumsum(dtype=np.float64) + noise[-1], out=ends[1:])
    kept = order[ends[1:] > ends[:-1]]
    kept.sort()
    return kept


def on_host(values: Tensor) -> np.ndarray[Any, Any]:
    """Bring a batch's values to the host: there, many small operations take a tenth of a device's time."""
    values = values.detach().cpu()
    if values.dtype is torch.bfloat16:  # which numpy does not know
        values = values.float()
    return values.numpy().astype(np.float64, copy=False)


def generator_of(seed: int, rank: int, step: int) -> torch.Generator:
    """Make the generator of one step alone: there is nothing to save, and every process draws its own."""
    # A hash makes one seed of three numbers, and keeps neighbouring steps from drawing alike.
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # to fit into 63 bits
