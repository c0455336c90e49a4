"""A training step that is compiled as a whole: for a fit it runs as it was written, over networks that are compiled."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_ast.lightning_internals.class_patch import put_on

__all__ = ["open_compiled_step"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward: what they hold is compiled


def open_compiled_step(module: pl.LightningModule) -> Callable[[], None]:
    """Let a compiled ``training_step`` run as it was written, and compile its networks in its place.

    In a compiled step the network and the loss are one function, and nothing shows where the gradient enters the
    network. Do nothing to a module whose step is not compiled. Return a function that undoes it; it may be called
    twice.
    """
    undo = ExitStack()
    step = _as_written(module)
    if step is None:
        return undo.close
    undo.callback(put_on(module, "training_step", step))
    compiler: Any = getattr(module, "_compiler_ctx", None)
    compiled = []
    for name, network in _networks(module) if compiler is not None else ():
        undo.callback(put_on(network, "_compiled_call_impl", compiler["dynamo_ctx"](network._call_impl)))
        compiled.append(name)
    rank_zero_info(
        "lightning-ast: the training step is compiled together with its loss. So that samples can be selected, it "
        f"runs as it was written; compiled in its place: {', '.join(compiled) or 'nothing'}."
    )
    return undo.close


def _as_written(module: pl.LightningModule) -> Callable[..., Any] | None:
    """Return the step that a compiled one was made of; None where it is not compiled."""
    step = module.training_step
    if not hasattr(step, "get_compiler_config"):
        return None
    from torch._dynamo.eval_frame import innermost_fn  # it takes seconds, and is there where something is compiled

    written: Any = innermost_fn(step)
    # The function of a class that was decorated is no method of the module yet.
    return types.MethodType(written, module) if inspect.ismethod(step) and not inspect.ismethod(written) else written


def _networks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost parts of a module with parameters that are not compiled yet: no losses, no metrics."""
    for name, part in module.named_children():
        if isinstance(part, _CONTAINERS):
            yield from ((f"{name}.{inner}", each) for inner, each in _networks(part))
        elif part._compiled_call_impl is None and next(part.parameters(), None) is not None:
            yield name, part
