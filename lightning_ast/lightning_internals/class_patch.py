"""Give one object a class of its own for a time: methods and properties that its class does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["change_class", "put_on"]


def change_class(instance: Any, parts: dict[str, Any]) -> Callable[[], None]:
    """Give one object a class of its own, with other methods and properties; copies and pickles have the first class.

    Returns:
        A function that puts the first class back.
    """
    # A property can only stand in a class, and a method put on the instance would be copied and pickled with it.
    own: Any = type(instance)

    def reduce(self: Any, protocol: Any) -> Any:
        _, _, *state = own.__reduce_ex__(self, protocol)
        return own.__new__, (own,), *state

    instance.__class__ = type(own.__name__, (own,), {**parts, "__reduce_ex__": reduce})

    def undo() -> None:
        instance.__class__ = own

    return undo


def put_on(instance: Any, name: str, value: Any) -> Callable[[], None]:
    """Put a value on an instance, before that of its class; return a function that leaves the instance as it was."""
    own: dict[str, Any] = instance.__dict__  # not setattr, by which a torch module would register a value of its kinds
    had = name in own
    before = own.get(name)
    own[name] = value

    def take_off() -> None:
        if had:
            own[name] = before
        else:
            del own[name]

    return take_off
