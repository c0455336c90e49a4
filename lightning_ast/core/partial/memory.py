"""Step 6, memory that a derivative formula fills: written into, it is a row gradient again.

Formulas that put a gradient into something larger begin with ``gradient.new_zeros(shape)`` and write into it. Row rules
(scatter, index_put) take those zeros as such. Two write through a view of the memory: as_strided's backward, which
adaptive_avg_pool2d(1) in channels_last emits, and CopySlices, the backward of an in-place op on a view (an in-place
Dropout behind a Flatten).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from lightning_ast.core.partial.gradient import RowGradient, go_dense, holds_rows, in_accumulate_grad, in_formula
from lightning_ast.core.partial.registry import RULES, OpArgs, OpKwargs, is_view, rule

__all__ = ["GradientMemory", "densify"]

_Sizes = tuple[int, ...]


@dataclass
class _Shared:
    """What all views of one memory share."""

    base: RowGradient  # the gradient that it was made from
    elements: int
    formula: tuple[int, str, int]  # the derivative formula that made it, see `_formula`
    # A row gradient that was copied in, the shape and strides it was copied to, and whether these are contiguous.
    source: tuple[RowGradient, _Sizes, _Sizes, bool] | None = None
    plain: Tensor | None = None  # ordinary memory, once somebody needed it


class GradientMemory(Tensor):
    """Stands for ``gradient.new_zeros(shape)`` or ``new_empty_strided(shape, strides)`` until it is written or read."""

    shared: _Shared

    @staticmethod
    def __new__(cls, shared: _Shared, shape: _Sizes, stride: _Sizes | None) -> GradientMemory:
        """Make a view of the memory."""
        base = shared.base
        made: GradientMemory = Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, dtype=base.dtype, device=base.device
        )
        made.shared = shared
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def untouched(self) -> bool:
        """Tell whether nothing was written yet."""
        return self.shared.source is None and self.shared.plain is None

    def content(self) -> Tensor:
        """Return what a read finds: the row gradient that was written, if it fits this view, or an ordinary tensor."""
        shared = self.shared
        if shared.plain is None and shared.source is not None:
            rows = _viewed(*shared.source, self)
            if rows is not None:
                return rows
        return self.ordinary("a write into a part of a gradient")

    def ordinary(self, reason: str) -> Tensor:
        """Return an ordinary view of the memory; rows that become full for it are counted under ``reason``."""
        shared = self.shared
        if shared.plain is None:
            # One flat piece of memory, so that all views see what is written into one of them.
            shared.plain = torch.zeros(shared.elements, dtype=self.dtype, device=self.device)
            if shared.source is not None:
                gradient, shape, stride, _ = shared.source
                shared.plain.as_strided(shape, stride).copy_(gradient.dense())
                gradient.rows.dense_ops[reason] += 1
        return shared.plain.as_strided(self.shape, self.stride())

    def _write(self, source: Any) -> bool:
        """Copy a row gradient in; False where it would not replace all that is there."""
        shared = self.shared
        if not holds_rows(source) or source.shape != self.shape or shared.plain is not None:
            return False
        if shared.source is not None and _viewed(*shared.source, self) is None:
            return False
        shared.source = (source, tuple(self.shape), self.stride(), self.is_contiguous())
        return True

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Sequence[type], args: OpArgs = (), kwargs: OpKwargs | None = None
    ) -> Any:
        """Keep views and writes of row gradients; hand everything else what was written."""
        memory = args[0]
        name = func._schema.name
        # Later arguments are only read.
        rest, kwargs = tree_map_only(cls, cls.content, (args[1:], kwargs or {}))
        if type(memory) is not cls:  # it is a later argument, which is only read
            return func(*tree_map_only(cls, cls.content, (memory,)), *rest, **kwargs)
        if memory.shared.plain is None:  # nobody has needed ordinary memory yet
            if name == "aten::as_strided" and not any(rest[2:]):  # without an offset
                return cls(memory.shared, tuple(rest[0]), tuple(rest[1]))
            if name == "aten::copy_" and memory._write(rest[0]):
                return memory
            found = RULES.get(id(func))
            if memory.untouched and found is not None and not found.on_rows and RowGradient in map(type, rest):
                result = found.run(func, memory, *rest, **kwargs)
                if result is not NotImplemented:
                    return result
        if func._schema.is_mutable:  # a write that no rule can keep in rows
            go_dense(func, (memory.ordinary(str(func)), *rest), kwargs)
            return memory
        # What is taken as a view may be written to: by the formula that made the memory, and by the user's code.
        written = is_view(func) and (not in_formula() or _formula() == memory.shared.formula)
        return func(memory.ordinary(str(func)) if written else memory.content(), *rest, **kwargs)


def densify(gradient: Tensor) -> Tensor:
    """Return the ordinary tensor behind a gradient, of the same shape; plain tensors pass through.

    It is for tensor hooks and custom ``torch.autograd.Function``s that need one. As the return value of
    ``tensor.register_hook(densify)`` it makes the rest of the backward below that tensor an ordinary, dense one.
    """
    if isinstance(gradient, GradientMemory):
        gradient = gradient.content()
    return gradient.dense() if isinstance(gradient, RowGradient) else gradient


def _viewed(
    gradient: RowGradient, old_shape: _Sizes, old_stride: _Sizes, was_contiguous: bool, view: GradientMemory
) -> RowGradient | None:
    """Read a gradient that was copied to memory by some strides through a view with others.

    Return None where these differ by more than the order of the dimensions and those of size one.
    """
    place = gradient.place
    shape = tuple(view.shape)
    stride = view.stride()
    if place is None or place.size == 1:
        return None
    if (shape, stride) == (old_shape, old_stride):
        return gradient
    if was_contiguous and view.is_contiguous() and math.prod(shape) == math.prod(old_shape):
        reshaped = torch.ops.aten.view(gradient, shape)
        return reshaped if isinstance(reshaped, RowGradient) else None
    # Dimensions are told by size and stride; where two have both alike, the order cannot be told.
    have = {(n, s): d for d, (n, s) in enumerate(zip(old_shape, old_stride, strict=True)) if n != 1}
    want = {(n, s): d for d, (n, s) in enumerate(zip(shape, stride, strict=True)) if n != 1}
    above_one = sum(n != 1 for n in old_shape), sum(n != 1 for n in shape)
    if have.keys() != want.keys() or above_one != (len(have), len(want)):
        return None
    # The rows are permuted in the same way; their own strides say nothing, for they are fewer than the full tensor's.
    order = [have[k] for k in want] + [d for d, n in enumerate(old_shape) if n == 1]
    dim = want[old_shape[place.dim], old_stride[place.dim]]
    rows = list(shape)
    rows[dim] = gradient.data_rows.shape[place.dim]
    return gradient.moved(gradient.data_rows.permute(order).reshape(rows), dim)


@rule("new_zeros", "new_empty_strided")
def _new_memory(func: OpOverload, base: RowGradient, shape: Sequence[int], *strides: Any, **kwargs: Any) -> Any:
    # Nothing but the gradient's own dtype and device is asked for.
    own = {"dtype": base.dtype, "device": base.device, "layout": torch.strided, "pin_memory": False}
    alike = all(value is None or value == own.get(name) for name, value in kwargs.items())
    stored = bool(strides) and in_accumulate_grad(base.rows)  # a leaf's .grad is an ordinary tensor
    if base.place is None or not in_formula() or stored or not alike:
        return func(base.data_rows, shape, *strides, **kwargs)
    stride = tuple(strides[0]) if strides else None
    elements = math.prod(shape)
    if stride is not None:  # up to the last element that the strides reach
        elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return GradientMemory(_Shared(base, elements, _formula()), tuple(shape), stride)


def _formula() -> tuple[int, str, int]:
    """Name the running derivative formula. Its node itself, held in what becomes a ``.grad``, would never be freed."""
    node = torch._C._current_autograd_node()
    assert node is not None  # asked for in formulas alone
    return torch._C._current_graph_task_id(), node.name(), node._sequence_nr()
