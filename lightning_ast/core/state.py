"""Beside the steps of a batch: what the saved states of all callbacks share, a version and the way to read one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from lightning_ast.errors import CheckpointError, ConfigurationError

__all__ = ["known_fields", "reading", "stamped"]

T = TypeVar("T")

_VERSION = 1


def stamped(state: dict[str, Any]) -> dict[str, Any]:
    """Add the version to a state that is about to be saved."""
    # It counts changes of meaning alone. A release that only adds keys keeps it: it reads them with a default, and
    # earlier releases pass them over.
    return {"version": _VERSION, **state}


@contextmanager
def reading(state: Any, *, owner: str) -> Iterator[None]:
    """Refuse the state of a callback that a later release wrote, and one that the block cannot read.

    Raises:
        CheckpointError: It is refused; the error that the block met is its cause.
    """
    try:
        if state.get("version", _VERSION) > _VERSION:  # the first release wrote none
            raise CheckpointError(owner, "a later release of lightning-ast wrote it: update lightning-ast")
        yield
    except (CheckpointError, ConfigurationError):  # they tell what is wrong themselves
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"it is damaged, or not one of lightning-ast's ({type(error).__name__}: {error})"
        raise CheckpointError(owner, reason) from error


def known_fields(cls: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Make a dataclass of the values that it has fields for; leave out those that a later release has added."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in names})
