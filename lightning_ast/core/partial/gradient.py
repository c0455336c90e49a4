"""The row gradient: a tensor of the batch's full shape that holds the selected rows alone.

The autograd engine checks shapes, adds gradients and calls every layer's own derivative formula. Each ATen op of those
formulas lands in :meth:`RowGradient.__torch_dispatch__`, which looks for a row rule; without one it makes the gradient
full (zeros, and the rows in their places) and runs the op as it is: exact, only slower, and counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from lightning_ast.core.partial.registry import RULES, runs_by_parts
from lightning_ast.core.partial.rows import Place, Rows, place_of

__all__ = ["RowGradient", "densify", "go_dense", "in_accumulate_grad", "wrap"]

_make_wrapper = Tensor._make_wrapper_subclass
_COMPILED = "a torch.compile'd region"


class RowGradient(Tensor):
    """A gradient that is zero but for the rows of the selected samples.

    Attributes:
        data_rows: the rows, ``place.shape`` with ``pre * k * post`` in the place of ``pre * B * post``; or, once
            something was written into it that no rule could do, the full tensor.
        rows: which samples.
        place: where they lie; None where ``data_rows`` is the full tensor.
    """

    data_rows: Tensor
    rows: Rows
    place: Place | None

    __slots__ = ("data_rows", "place", "rows")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Without the contents."""
        return f"RowGradient({tuple(self.shape)}, {self.rows.count} of {self.rows.batch_size} samples, {self.dtype})"

    def like(self, data: Tensor) -> RowGradient:
        """New rows in the same place: same dimension from the end, same groups."""
        place = self.place
        assert place is not None
        if data.shape == self.data_rows.shape:
            return wrap(data, self.rows, place)
        dim = data.dim() + place.from_end
        return wrap(data, self.rows, _grown(data.shape, dim, place))

    def moved(self, data: Tensor, dim: int) -> RowGradient:
        """New rows, in dimension ``dim``."""
        assert self.place is not None
        return wrap(data, self.rows, _grown(data.shape, dim, self.place))

    def rows_of(self, full: Tensor, dim: int) -> Tensor:
        """The selected rows of a plain tensor whose dimension ``dim`` lies as this one's rows do."""
        assert self.place is not None
        return self.rows.gather(full, dim, self.place.pre, self.place.post)

    def packed(self) -> Tensor:
        """The rows in the memory format that this tensor claims to have, for kernels that do not look again."""
        claimed = torch.contiguous_format if self.is_contiguous() else torch.channels_last
        return self.data_rows.contiguous(memory_format=claimed)

    def lies_as(self, other: RowGradient) -> bool:
        """Whether both hold the same samples in the same place, counted from the end."""
        a, b = self.place, other.place
        if a is b and a is not None:
            return self.rows is other.rows
        if a is None or b is None or self.rows is not other.rows:
            return False
        return a.from_end == b.from_end and a.pre == b.pre and a.post == b.post

    def dense(self) -> Tensor:
        """The full, ordinary tensor."""
        return self.data_rows if self.place is None else self.rows.scatter(self.data_rows, self.place)

    def __coerce_same_metadata_as_tangent__(self, metadata: Any, expected_type: Any = None) -> Tensor:
        """AOTAutograd asks for what a compiled backward can take: a plain tensor."""
        self.rows.dense_ops[_COMPILED] += 1
        return self.dense()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op over the rows if it has a rule, by its parts if it is made of others, densely if not."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                return result
        elif runs_by_parts(func):
            return func.decompose(*args, **kwargs)
        return go_dense(func, args, kwargs)


def wrap(data: Tensor, rows: Rows, place: Place) -> RowGradient:
    """A row gradient around the selected rows; no data is copied.

    Args:
        data: the rows, as :class:`RowGradient` holds them.
        rows: which samples.
        place: where they lie.
    """
    shape = place.shape
    strides = None  # contiguous, or channels_last where the data is: spares a copy by .contiguous()
    if len(shape) == 4 and shape[1] > 1 and data.stride(1) == 1 and place.dim == 0:
        _, c, h, w = shape
        strides = (c * h * w, 1, w * c, c)
    made: RowGradient = _make_wrapper(RowGradient, shape, strides=strides, dtype=data.dtype, device=data.device)
    made.data_rows, made.rows, made.place = data, rows, place
    return made


def _grown(shape: tuple[int, ...], dim: int, place: Place) -> Place:
    """The place whose rows have this shape."""
    return place_of((*shape[:dim], place.size, *shape[dim + 1 :]), dim, place.pre, place.post)


def densify(gradient: Tensor) -> Tensor:
    """The ordinary tensor behind a gradient, for hooks and custom backwards that need one.

    Args:
        gradient: what a tensor hook or a custom ``torch.autograd.Function`` was given; plain tensors pass through.

    Returns:
        A tensor of the same shape. As the return value of ``tensor.register_hook(densify)`` it makes the rest of
        the backward below that tensor an ordinary, dense one.
    """
    return gradient.dense() if isinstance(gradient, RowGradient) else gradient


def go_dense(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op over all rows and count it."""
    first = args[0] if args else None
    gradients = [g for g in _gradients((args, kwargs)) if g.place is not None]
    if gradients:
        gradients[0].rows.dense_ops[str(func)] += 1
    result = func(*tree_map_only(RowGradient, densify, args), **tree_map_only(RowGradient, densify, kwargs))
    if func._schema.is_mutable and isinstance(first, RowGradient):  # written to in place: it is full from now on
        first.data_rows, first.place = result, None
        return first
    return result


def _gradients(tree: Any) -> list[RowGradient]:
    found: list[RowGradient] = []
    tree_map_only(RowGradient, found.append, tree)
    return found


def in_accumulate_grad(rows: Rows) -> bool:
    """Whether the engine is about to store a gradient in the ``.grad`` of a leaf of the user's graph.

    Not so in a backward inside the backward (reentrant checkpointing): it hands its leaves' gradients on.
    """
    node = torch._C._current_autograd_node()
    if node is None or node.name() != "torch::autograd::AccumulateGrad":
        return False
    return torch._C._current_graph_task_id() == rows.graph_task
