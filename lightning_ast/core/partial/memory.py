"""Memory that a derivative formula fills: written into, it is a row gradient again.

Formulas that put a gradient into something larger begin with ``gradient.new_zeros(shape)`` and write into it. Row rules
(scatter, index_put) take those zeros as such. Two write through a view of the memory: as_strided's backward, which
adaptive_avg_pool2d(1) in channels_last emits, and CopySlices, the backward of an in-place op on a view (an in-place
Dropout behind a Flatten).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.partial.gradient import RowGradient, go_dense, in_accumulate_grad
from lightning_ast.core.partial.registry import RULES, rule

__all__ = ["GradientMemory"]


@dataclass
class _Shared:
    """What all views of one memory share.

    Attributes:
        base: the gradient that it was made from.
        elements: its length.
        source: a row gradient that was copied in, and the shape and strides it was copied to.
        plain: ordinary memory, once somebody needed it.
    """

    base: RowGradient
    elements: int
    source: tuple[RowGradient, tuple[int, ...], tuple[int, ...]] | None = None
    plain: Tensor | None = None


class GradientMemory(Tensor):
    """Stands for ``gradient.new_zeros(shape)`` or ``gradient.new_empty_strided(shape, strides)``.

    What is not a write of a row gradient finds ordinary zeros, or the row gradient that was written.
    """

    shared: _Shared

    @staticmethod
    def __new__(cls, shared: _Shared, shape: tuple[int, ...], stride: tuple[int, ...] | None) -> GradientMemory:
        """A view of the memory."""
        base = shared.base
        made: GradientMemory = Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, dtype=base.dtype, device=base.device
        )
        made.shared = shared
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def untouched(self) -> bool:
        """Nothing was written yet."""
        return self.shared.source is None and self.shared.plain is None

    def content(self, *, writable: bool = False) -> Tensor:
        """What a read finds: a row gradient where one was written and fits this view, else an ordinary tensor.

        Args:
            writable: an ordinary view of the shared memory is needed.
        """
        shared = self.shared
        if shared.plain is None and shared.source is not None and not writable:
            rows = _viewed(*shared.source, tuple(self.shape), self.stride())
            if rows is not None:
                return rows
        if shared.plain is None:
            shared.plain = torch.zeros(shared.elements, dtype=self.dtype, device=self.device)
            if shared.source is not None:
                gradient, shape, stride = shared.source
                shared.plain.as_strided(shape, stride).copy_(gradient.dense())
        return shared.plain.as_strided(self.shape, self.stride())

    def _write(self, source: Any) -> bool:
        """Copy a row gradient in; False where it would not replace all that is there."""
        shape, stride, shared = tuple(self.shape), self.stride(), self.shared
        if type(source) is not RowGradient or source.place is None or source.shape != shape or shared.plain is not None:
            return False
        if shared.source is not None and _viewed(*shared.source, shape, stride) is None:
            return False
        shared.source = (source, shape, stride)
        return True

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep views and writes of row gradients; hand everything else what was written."""
        kwargs, memory, name = kwargs or {}, args[0], func._schema.name
        args = (memory, *(a.content() if type(a) is cls else a for a in args[1:]))
        if type(memory) is cls:
            if name == "aten::as_strided" and not any(args[3:]) and memory.shared.plain is None:
                return cls(memory.shared, tuple(args[1]), tuple(args[2]))
            if name == "aten::copy_" and memory._write(args[1]):
                return memory
            if memory.untouched and func in RULES and RowGradient in map(type, args):
                result = RULES[func](func, args, kwargs)
                if result is not NotImplemented:
                    return result
            args = (memory.content(writable=func._schema.is_mutable), *args[1:])
            if func._schema.is_mutable:
                go_dense(func, args, kwargs)
                return memory
        return func(*args, **kwargs)


def _viewed(
    gradient: RowGradient,
    old_shape: tuple[int, ...],
    old_stride: tuple[int, ...],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> RowGradient | None:
    """The gradient, copied to memory by the old strides and read by the new ones.

    None where these differ by more than the order of the dimensions and those of size one.
    """
    place = gradient.place
    if place is None or place.size == 1:
        return None
    if (shape, stride) == (old_shape, old_stride):
        return gradient
    have = {(n, s): d for d, (n, s) in enumerate(zip(old_shape, old_stride, strict=True)) if n != 1}
    want = {(n, s): d for d, (n, s) in enumerate(zip(shape, stride, strict=True)) if n != 1}
    above_one = sum(n != 1 for n in old_shape), sum(n != 1 for n in shape)
    if have.keys() != want.keys() or above_one != (len(have), len(want)):
        return None
    order = [have[k] for k in want] + [d for d, n in enumerate(old_shape) if n == 1]
    dim = want[old_shape[place.dim], old_stride[place.dim]]
    rows = list(shape)
    rows[dim] = gradient.data_rows.shape[place.dim]
    return gradient.moved(gradient.data_rows.permute(order).reshape(rows), dim)


@rule("new_zeros")
def _new_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, shape = args[0], tuple(args[1])
    if base.place is None or not _of_its_kind(base, kwargs):
        return func(base.data_rows, shape, **kwargs)
    return GradientMemory(_Shared(base, math.prod(shape)), shape, None)


@rule("new_empty_strided")
def _new_empty_strided(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, shape, stride = args[0], tuple(args[1]), tuple(args[2])
    if base.place is None or in_accumulate_grad(base.rows) or not _of_its_kind(base, kwargs):
        return func(base.data_rows, shape, stride, **kwargs)
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return GradientMemory(_Shared(base, elements), shape, stride)


def _of_its_kind(base: RowGradient, kwargs: dict[str, Any]) -> bool:
    """Whether nothing but the gradient's own dtype and device is asked for."""
    own = {"dtype": base.dtype, "device": base.device, "layout": torch.strided, "pin_memory": False}
    return all(value is None or value == own.get(name) for name, value in kwargs.items())
