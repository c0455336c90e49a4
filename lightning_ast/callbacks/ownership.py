"""Who may use a callback object: one Trainer takes one of a kind, and one object serves one fit at a time."""

from __future__ import annotations

import threading
import weakref
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_ast.errors import ConfigurationError

__all__ = ["begin_use", "duplicate_faults", "end_use", "serves"]

# The Trainer of the running fit, by the object that the fit changes. Weak on both sides: neither a finished Trainer nor
# a dropped callback must be kept alive by having met.
_users: WeakKeyDictionary[object, weakref.ref[pl.Trainer]] = WeakKeyDictionary()
_lock = threading.Lock()  # two Trainers may run in two threads


def begin_use(trainer: pl.Trainer, *parts: object) -> None:
    """Keep objects for one fit, until :func:`end_use`; refusing a second fit does not touch the first.

    A Trainer whose fit was interrupted has no claim, even where it did not come to its end.
    """
    wanted = [part for part in parts if part is not None]
    with _lock:
        for part in wanted:
            user = _users[part]() if part in _users else None
            if user is not None and user.state.status == TrainerStatus.RUNNING:
                name = type(part).__name__
                raise ConfigurationError(
                    f"this {name} object belongs to a fit that is still running, and one object serves one fit at "
                    f"a time: give each Trainer a {name} of its own."
                )
        for part in wanted:
            _users[part] = weakref.ref(trainer)  # all or none: a refused fit must not take the controller along


def serves(part: object, trainer: pl.Trainer) -> bool:
    """Tell whether an object is kept for the fit of this Trainer."""
    user = None if part is None else _users.get(part)
    return user is not None and user() is trainer


def end_use(part: object, trainer: pl.Trainer) -> bool:
    """Give an object back; tell whether the fit of this Trainer had it, which one that was refused did not."""
    with _lock:
        own = serves(part, trainer)
        if own:
            del _users[part]
        return own


def duplicate_faults(trainer: pl.Trainer, kind: type[Callback]) -> list[str]:
    """Find more than one callback of a kind, its subclasses included."""
    count = sum(isinstance(c, kind) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return [f"expected one {kind.__name__}, got {count}: keep one."] if count > 1 else []
