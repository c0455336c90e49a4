"""Beside the steps of a batch, for ``subset``: run a module's training code to score samples, without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

__all__ = ["TracelessForward"]

# A tuple: with a set, torch.compile (of torch 2.6) breaks its graph at every function.
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_ATTENTION_DROPOUT_POSITION = 4
_SMALL = 2**16  # elements of a buffer that is cheap to copy in every pass


class _NoDropout(TorchFunctionMode):
    """Switches functional dropout off: it passes its input through, and attention keeps every weight."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > _ATTENTION_DROPOUT_POSITION:
                args = (*args[:_ATTENTION_DROPOUT_POSITION], 0.0, *args[_ATTENTION_DROPOUT_POSITION + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


class TracelessForward:
    """Context in which a module in training mode can be run without changing it.

    Inside: no graph, unless it is asked for; torch's random state is forked; dropout is off (modules, functions,
    attention, recurrent layers); normalisation layers use the batch's statistics, but do not update their running ones.
    Afterwards every flag is as before, and so are the buffers that other layers change in place or replace (spectral
    norm, codebooks). Of a buffer of more than 65,536 elements, the first change in a later use is undone only from the
    next one on, and a warning says so. Not undone: what hooks or user code write elsewhere.

    Args:
        module: The module to run. Its layers are listed once, when this object is made.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = [(f"{name}." if name else "", layer) for name, layer in module.named_modules()]
        kinds = (_NormBase, _DropoutNd, nn.MultiheadAttention, nn.RNNBase)
        self._layers = [layer for _, layer in self._modules if isinstance(layer, kinds)]
        stock = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        norms = [(n, m) for n, m in self._modules if isinstance(m, _BatchNorm) and type(m).forward in stock]
        # Running statistics, which the normalisation layers do not touch in here.
        self._left_alone = {name + leaf for name, m in norms for leaf in m._buffers}
        self._mutated: set[str] = set()
        self._first = True

    @contextmanager
    def __call__(self, *, grad: bool = False) -> Iterator[None]:
        """Enter the context; with ``grad`` a graph is made where a parameter requires it."""
        parameters = (p for _, m in self._modules for p in m._parameters.values() if p is not None)
        devices = {p.device for p in parameters if p.is_cuda}
        with ExitStack() as stack:
            # The devices are named: forking all of them, which is the default, would wake up GPUs of other jobs.
            stack.enter_context(torch.random.fork_rng(devices=[d.index or 0 for d in devices]))
            stack.enter_context(torch.set_grad_enabled(grad))
            for layer in self._layers:
                _quieten(layer, stack)
            stack.enter_context(self._buffers_restored())
            stack.enter_context(_NoDropout())
            yield

    @contextmanager
    def _buffers_restored(self) -> Iterator[None]:
        before = [
            (name + leaf, holder, leaf, buffer, buffer._version)
            for name, holder in self._modules
            for leaf, buffer in holder._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]
        # Copies of large buffers are made only while it is not known that nothing changes them.
        copies = {
            name: buffer.clone()
            for name, _, _, buffer, _ in before
            if name not in self._left_alone and (self._first or buffer.numel() <= _SMALL or name in self._mutated)
        }
        try:
            yield
        finally:
            for name, holder, leaf, buffer, version in before:
                holder._buffers[leaf] = buffer  # the layer may have put another tensor in its place
                if buffer._version == version:
                    continue
                self._mutated.add(name)
                if name in copies:
                    buffer.copy_(copies[name])
                else:
                    text = f"scoring changed the buffer {name!r} once; it is restored from now on."
                    warnings.warn(text, stacklevel=2)
            self._first = False


def _quieten(layer: nn.Module, undo: ExitStack) -> None:
    """Let a layer in training mode compute without dropout, and by the statistics of the batch; ``undo`` ends it."""
    change: tuple[str, Any] | None = None
    # Batch statistics, and none are kept: the running ones, which lag, would rank samples near chance in the first
    # steps.
    if isinstance(layer, _NormBase) and layer.track_running_stats:
        change = "track_running_stats", False
    elif isinstance(layer, _DropoutNd):
        change = "training", False
    elif isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout:
        change = "dropout", 0.0
    if change is not None and layer.training:
        undo.callback(setattr, layer, change[0], getattr(layer, change[0]))
        setattr(layer, *change)
