"""Beside the steps of a batch, for ``subset``: run a module's training code to score samples, without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

__all__ = ["TracelessForward"]

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
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
    attention, recurrent layers); normalisation layers use the batch's statistics, as in training, but do not update
    their running ones. Afterwards every flag is as before, and so are the buffers that other layers change in place or
    replace (spectral norm, codebooks). A buffer of more than 65,536 elements that is changed for the first time in a
    later use cannot be restored that once: a warning says so, and it is from then on. Not undone: what hooks or user
    code write elsewhere.

    Ranking samples in evaluation mode instead is near chance in the first steps, because running statistics lag.

    Args:
        module: The module to run. Its layers are listed once, when this object is made.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = [(f"{name}." if name else "", layer) for name, layer in module.named_modules()]
        kinds = (_NormBase, _DropoutNd, nn.MultiheadAttention, nn.RNNBase)
        self._layers = [layer for _, layer in self._modules if isinstance(layer, kinds)]
        stock = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        norms = [(n, m) for n, m in self._modules if isinstance(m, _BatchNorm) and type(m).forward in stock]
        self._left_alone = {name + leaf for name, m in norms for leaf in m._buffers}
        self._mutated: set[str] = set()
        self._first = True

    @contextmanager
    def __call__(self, *, grad: bool = False) -> Iterator[None]:
        """Enter the context.

        Args:
            grad: Whether a graph is made where a parameter requires it.
        """
        parameters = (p for _, m in self._modules for p in m._parameters.values() if p is not None)
        devices = {p.device for p in parameters if p.is_cuda}
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[d.index or 0 for d in devices]))
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(_quiet(self._layers))
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
        copies = {name: buffer.clone() for name, _, _, buffer, _ in before if self._worth_copying(name, buffer)}
        try:
            yield
        finally:
            for name, holder, leaf, buffer, version in before:
                holder._buffers[leaf] = buffer  # the layer may have put another tensor in its place
                if buffer._version != version:
                    self._restore(name, buffer, copies.get(name))
            self._first = False

    def _worth_copying(self, name: str, buffer: Tensor) -> bool:
        if name in self._left_alone:  # running statistics, which the normalisation layers do not touch in here
            return False
        # Copies of large buffers are made only while it is not known that nothing changes them.
        return self._first or buffer.numel() <= _SMALL or name in self._mutated

    def _restore(self, name: str, buffer: Tensor, copy: Tensor | None) -> None:
        self._mutated.add(name)
        if copy is not None:
            buffer.copy_(copy)
        else:
            warnings.warn(f"scoring changed the buffer {name!r} once; it is restored from now on.", stacklevel=2)


@contextmanager
def _quiet(layers: Sequence[nn.Module]) -> Iterator[None]:
    changed: list[tuple[nn.Module, str, Any]] = []

    def put(layer: nn.Module, attribute: str, value: Any) -> None:
        changed.append((layer, attribute, getattr(layer, attribute)))
        setattr(layer, attribute, value)

    try:
        for layer in layers:
            if not layer.training:
                continue
            if isinstance(layer, _NormBase) and layer.track_running_stats:  # batch statistics, and none are kept
                put(layer, "track_running_stats", False)
            elif isinstance(layer, _DropoutNd):
                put(layer, "training", False)
            elif isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout:
                put(layer, "dropout", 0.0)
        yield
    finally:
        for layer, attribute, value in reversed(changed):
            setattr(layer, attribute, value)
