"""Step 1a, for ``subset``: run a module's training code to look at the losses, and leave no trace of having done so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

__all__ = ["TracelessForward"]

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_ATTENTION_DROPOUT_POSITION = 4


class _NoDropout(TorchFunctionMode):
    """Functional dropout passes its input through; attention keeps every weight."""

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

    Inside: no gradients; torch's random state is forked; dropout is off (modules, functions, attention, recurrent
    layers); normalisation layers use the batch's statistics, as in training, but do not update their running ones.
    Afterwards every flag is as before, and so is every buffer: those that other layers changed in place or replaced
    (spectral norm, codebooks) are found the first time, by their version counters, and restored from then on.
    Not undone: what forward hooks or user code write to other places.

    Ranking samples in evaluation mode instead is near chance in the first steps, because running statistics lag.

    Args:
        module: the module to run. Its layers are listed once, here.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        kinds = (_NormBase, _DropoutNd, nn.MultiheadAttention, nn.RNNBase)
        self._layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
        self._mutated: set[str] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter the context."""
        devices = {p.device for p in self._module.parameters() if p.device.type == "cuda"}
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[d.index or 0 for d in devices]))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_quiet(self._layers))
            stack.enter_context(self._buffers_restored())
            stack.enter_context(_NoDropout())
            yield

    @contextmanager
    def _buffers_restored(self) -> Iterator[None]:
        before = {name: (buffer, buffer._version) for name, buffer in self._module.named_buffers()}
        names = before.keys() if self._mutated is None else self._mutated & before.keys()
        copies: dict[str, Tensor] = {name: before[name][0].clone() for name in names}
        try:
            yield
        finally:
            mutated: set[str] = set(names) if self._mutated is not None else set()
            for name, (buffer, version) in before.items():
                owner, _, leaf = name.rpartition(".")
                holder = self._module.get_submodule(owner)
                if holder._buffers[leaf] is not buffer:
                    holder._buffers[leaf] = buffer
                if buffer._version != version and name in copies:
                    buffer.copy_(copies[name])
                    mutated.add(name)
            self._mutated = mutated


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
            if isinstance(layer, _NormBase) and layer.track_running_stats:
                put(layer, "track_running_stats", False)
            elif isinstance(layer, _DropoutNd):
                put(layer, "training", False)
            elif isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout:
                put(layer, "dropout", 0.0)
        yield
    finally:
        for layer, attribute, value in reversed(changed):
            setattr(layer, attribute, value)
