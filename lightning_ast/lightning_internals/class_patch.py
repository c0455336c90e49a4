"""Give one object methods and properties of its own for a time, which its copies do not have."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, SupportsIndex

import lightning.pytorch as pl

__all__ = ["change_class", "method_of", "put_on"]


def change_class(instance: Any, parts: dict[str, Any]) -> Callable[[], None]:
    """Give one object a class of its own, with other methods and properties; return what puts the first one back."""
    # A property can only stand in a class, and a method put on the instance would be copied and pickled with it.
    own: Any = type(instance)

    # Pickles and copies have the first class: the other one exists in this process alone.
    def reduce(self: Any, protocol: SupportsIndex) -> Any:
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


def method_of(
    module: pl.LightningModule, name: str, original: Callable[..., Any], replacement: Callable[..., Any]
) -> types.MethodType:
    """Make ``replacement`` a method with the name and signature of ``original``, which Lightning inspects."""
    own = weakref.ref(module)  # a copy must not keep the original alive
    replace = weakref.WeakMethod(replacement)

    # A copy of the module that is made within the fit, or a pickled one, has its class's own method.
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        replaced = replace() if self is own() else None
        return getattr(type(self), name)(self, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)

    functools.update_wrapper(call, original)
    del call.__wrapped__  # type: ignore[attr-defined]
    call.__name__ = name
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    rest = inspect.signature(original).parameters.values()
    call.__signature__ = inspect.Signature([first, *rest])  # type: ignore[attr-defined]
    return types.MethodType(call, module)
