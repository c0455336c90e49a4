"""What a module tells of the samples of a batch by the methods of ``SparseLossMixin``, checked."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.errors import ConfigurationError
from lightning_ast.mixin import SparseLossMixin

__all__ = ["told_numbers", "told_weights", "warn_of_unused_methods"]

_BATCH_METHODS = ("count_samples", "sample_indices", "sample_labels", "sample_weights", "select_batch")


def told_numbers(module: pl.LightningModule, name: str, batch: Any, size: int) -> Tensor | None:
    """Return the dataset indices or the classes ``(B,)`` of the samples; None where the module does not tell them."""
    values = getattr(module, name)(batch) if isinstance(module, SparseLossMixin) else None
    if values is None:
        return None
    if not isinstance(values, Tensor) or values.shape != (size,) or values.is_floating_point():
        raise _fault(name, f"an integer tensor of shape ({size},), a number for each sample, or None", values)
    return values


def told_weights(module: pl.LightningModule, batch: Any, size: int) -> Tensor | None:
    """Return the user's weights ``(B,)`` of the samples in double precision on the host; None where there are none."""
    method: Any = module.sample_weights
    weights = method(batch)
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != (size,):
        raise _fault("sample_weights", f"a tensor of shape ({size},), each sample's weight, or None", weights)
    weights = weights.detach().cpu().double()
    good = weights.isfinite() & (weights >= 0)
    if not bool(good.all()):
        position = int((~good).nonzero()[0])
        raise ConfigurationError(
            [
                f"sample_weights must give finite weights of at least 0, got {weights[position]:g} for the sample at "
                f"position {position} of the batch."
            ]
        )
    return weights


def _fault(name: str, expected: str, got: object) -> ConfigurationError:
    found = type(got).__name__
    if isinstance(got, Tensor):
        found = f"shape {tuple(got.shape)}, {got.dtype}"
    return ConfigurationError([f"{name} must give {expected}; got {found}."])


def warn_of_unused_methods(module: pl.LightningModule) -> None:
    """Warn of methods that are asked of a ``SparseLossMixin`` alone, where the module is none."""
    names = [name for name in _BATCH_METHODS if hasattr(type(module), name)]
    if names and not isinstance(module, SparseLossMixin):
        rank_zero_warn(
            f"lightning-ast: {type(module).__name__} defines {', '.join(names)}, which SparseSelectionCallback calls "
            "on a SparseLossMixin alone: list it before LightningModule, if they are meant for it."
        )
