"""The loader that Lightning makes of the user's loaders, where another one takes its place."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES
from torch.utils.data import DataLoader

__all__ = ["copied_loader", "copy_combined", "lend_iterator", "make_iterator", "same_mode", "take_iterator_away"]


def copied_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Copy a DataLoader without its iterator and workers, with attributes that it refuses to be assigned."""
    copied = copy.copy(loader)
    copied.__dict__.update(_iterator=None, **changes)
    return copied


def copy_combined(given: CombinedLoader, loaders: list[Any]) -> CombinedLoader:
    """Copy what combines loaders, to combine others in the same way; it has no iterator."""
    copied = copy.copy(given)
    copied._iterator = None
    copied.flattened = loaders
    return copied


def same_mode(given: CombinedLoader) -> Any:
    """Return the mode in which the loaders are combined, for another CombinedLoader."""
    return given._mode


def lend_iterator(given: CombinedLoader, running: CombinedLoader) -> None:
    """Let the user's loader have the iterator of the one that runs in its place."""
    # Lightning asks the user's loader for the length of an epoch, which needs an iterator to tell.
    given._iterator = running._iterator


def make_iterator(given: CombinedLoader) -> None:
    """Give the user's loader an iterator that is not started; it tells the length of an epoch."""
    kind: Any = _SUPPORTED_MODES[given._mode]["iterator"]
    given._iterator = kind(given.flattened, given.limits)


def take_iterator_away(given: CombinedLoader) -> None:
    """Leave the user's loader without an iterator, as before it was started."""
    given._iterator = None
