"""Replacing a method of one LightningModule for the length of a fit."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

__all__ = ["method_of"]


def method_of(
    module: pl.LightningModule, name: str, original: Callable[..., Any], replacement: Callable[..., Any]
) -> types.MethodType:
    """Make ``replacement`` a method with the name and signature of ``original``, which Lightning inspects.

    A copy of the module that is made within the fit, or a pickled one, has its class's own method.
    """
    own = weakref.ref(module)  # a copy must not keep the original alive
    replace = weakref.WeakMethod(replacement)

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
