"""Step 6, the row gradient: a tensor of the batch's full shape that holds the selected rows alone.

The autograd engine checks shapes, adds gradients and calls every layer's own derivative formula. Each ATen op of those
formulas lands in :meth:`RowGradient.__torch_dispatch__`, which looks for a row rule; without one it makes the gradient
full (zeros, and the rows in their places) and runs the op as it is: exact, only slower, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_ast.core.partial.registry import RULES, OpArgs, OpKwargs, is_view, runs_by_parts
from lightning_ast.core.partial.rows import Place, Rows, place_of

__all__ = ["HeldRows", "RowGradient", "go_dense", "holds_rows", "in_accumulate_grad", "in_formula", "wrap"]

_make_wrapper = Tensor._make_wrapper_subclass


class RowGradient(Tensor):
    """A gradient that is zero but for the rows of the selected samples.

    Attributes:
        data_rows: The rows, ``place.shape`` with ``pre * k * post`` in the place of ``pre * B * post``; or, once
            something was written into it that no rule could do, the full tensor.
        rows: The selected samples.
        place: Where they lie; None where ``data_rows`` is the full tensor.
        origin: The row gradient that this one is a view of, and the op and its arguments; None for what is no view.
    """

    data_rows: Tensor
    rows: Rows
    place: Place | None
    origin: tuple[RowGradient, Callable[..., Any], OpArgs, OpKwargs] | None

    __slots__ = ("data_rows", "origin", "place", "rows")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RowGradient({tuple(self.shape)}, {self.rows.count} of {self.rows.batch_size} samples, {self.dtype})"

    def like(self, data: Tensor) -> RowGradient:
        """Wrap new rows that lie in the same place: the same dimension from the end, the same groups."""
        assert self.place is not None
        if data.shape == self.data_rows.shape:
            return wrap(data, self.rows, self.place)
        return self.moved(data, data.dim() + self.place.from_end)

    def moved(self, data: Tensor, dim: int) -> RowGradient:
        """Wrap new rows that lie in dimension ``dim``."""
        place = self.place
        assert place is not None
        shape = (*data.shape[:dim], place.size, *data.shape[dim + 1 :])
        return wrap(data, self.rows, place_of(shape, dim, place.pre, place.post))

    def rows_of(self, full: Tensor, dim: int) -> Tensor:
        """Gather the selected rows of a plain tensor whose dimension ``dim`` lies as this one's rows do."""
        assert self.place is not None
        return self.rows.gather(full, dim, self.place.pre, self.place.post)

    @property
    def memory_format(self) -> torch.memory_format:
        """Return the memory format that this tensor claims to have."""
        return torch.contiguous_format if self.is_contiguous() else torch.channels_last

    def packed(self) -> Tensor:
        """Return the rows in the memory format that this tensor claims to have, for kernels that do not look again."""
        return self.data_rows.contiguous(memory_format=self.memory_format)

    def lies_as(self, other: RowGradient) -> bool:
        """Tell whether both hold the same samples in the same place, counted from the end."""
        own = self.place
        its = other.place
        if own is None or its is None or self.rows is not other.rows:
            return False
        # Places alike are mostly one object, see `place_of`; dimensions in front of the samples' may still differ.
        return own is its or (own.from_end, own.pre, own.post) == (its.from_end, its.pre, its.post)

    def dense(self) -> Tensor:
        """Return the full, ordinary tensor."""
        if self.place is None:
            return self.data_rows
        return self.rows.scatter(self.data_rows, self.place, self.memory_format)

    def become_dense(self) -> Tensor:
        """Hold the full tensor from now on, and return it; of a view, a view of what it is a view of."""
        if self.place is not None:
            if self.origin is None:
                self.data_rows = self.dense()
            else:  # the view is taken anew, of the base's full tensor: what is written into one is seen by both
                base, view, args, kwargs = self.origin
                self.data_rows = view(base.become_dense(), *args, **kwargs)
            self.place = None
        return self.data_rows

    def shares_memory(self) -> bool:
        """Tell whether a write into the rows reaches what this is a view of (a reshape may have copied)."""
        gradient = self
        while gradient.origin is not None:
            base = gradient.origin[0]
            memories = [each.data_rows.untyped_storage().data_ptr() for each in (base, gradient)]
            if base.place is None or memories[0] != memories[1]:
                return False
            gradient = base
        return True

    def __coerce_same_metadata_as_tangent__(self, metadata: Any, expected_type: Any = None) -> Tensor:
        """Return what a compiled backward can take, as AOTAutograd asks for it: a plain tensor."""
        self.rows.dense_ops["a torch.compile'd region"] += 1
        return self.dense()

    # Functions of torch's Python API come to the dispatch below as the ops that they are made of.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Sequence[type], args: OpArgs = (), kwargs: OpKwargs | None = None
    ) -> Any:
        """Run an op over the rows if it has a rule, by its parts if it is made of others, densely if not."""
        kwargs = kwargs or {}
        rule = RULES.get(id(func))
        if rule is not None:
            first = args[0]
            place = first.place if rule.on_rows and type(first) is RowGradient else None  # None where it is dense
            if not rule.on_rows or (place is not None and rule.dim in (None, place.dim)):
                result = rule.run(func, *args, **kwargs)
                if result is not NotImplemented:  # which stands for: this call mixes samples
                    if rule.is_view:  # what is written into the view later must reach its base too
                        _remember(func, args, kwargs, result)
                    return result
        elif runs_by_parts(func):  # each part comes here again, and may have a rule
            return func.decompose(*args, **kwargs)
        return go_dense(func, args, kwargs)


class HeldRows(RowGradient):
    """The type, for type checkers alone, of a row gradient that still holds rows alone: its place is known."""

    place: Place


def holds_rows(gradient: Any) -> TypeGuard[HeldRows]:
    """Tell whether an argument of a backward op is a row gradient that still holds rows alone."""
    return type(gradient) is RowGradient and gradient.place is not None


def wrap(data: Tensor, rows: Rows, place: Place) -> RowGradient:
    """Make a row gradient of the selected samples, and where they lie, around their rows; no data is copied."""
    shape = place.shape
    strides = None  # contiguous, or channels_last where the data is: spares a copy by .contiguous()
    if len(shape) == 4 and shape[1] > 1 and data.stride(1) == 1 and place.dim == 0:
        _, c, h, w = shape
        strides = (c * h * w, 1, w * c, c)
    # A wrapper claims a shape and has no memory: the engine compares shapes, and never looks inside.
    made: RowGradient = _make_wrapper(RowGradient, shape, strides=strides, dtype=data.dtype, device=data.device)
    made.data_rows = data
    made.rows = rows
    made.place = place
    made.origin = None
    return made


def go_dense(func: OpOverload, args: OpArgs, kwargs: OpKwargs) -> Any:
    """Run an op over all rows and count it."""
    first = args[0] if args else None
    gradient = next(filter(holds_rows, tree_leaves((args, kwargs))), None)
    if gradient is not None and not in_accumulate_grad(gradient.rows):  # a leaf's .grad has to be dense
        gradient.rows.dense_ops[str(func)] += 1
    # What a write changes, or a view shares, must be the one full tensor that all later readers see.
    if isinstance(first, RowGradient) and (func._schema.is_mutable or is_view(func)):
        first.become_dense()
    args, kwargs = tree_map_only(RowGradient, RowGradient.dense, (args, kwargs))
    result = func(*args, **kwargs)
    return first if func._schema.is_mutable and isinstance(first, RowGradient) else result


def _remember(func: OpOverload, args: OpArgs, kwargs: OpKwargs, result: Any) -> None:
    """Record what the results of a view are views of."""
    if type(result) is RowGradient:
        result.origin = (args[0], func, args[1:], kwargs)
        return
    for position, part in enumerate(result):  # `at` holds the position of this part, not the loop's last
        part.origin = (args[0], lambda *a, at=position, **k: func(*a, **k)[at], args[1:], kwargs)


def in_formula() -> bool:
    """Tell whether one of torch's own derivative formulas is running, and not a hook or a custom backward."""
    node = torch._C._current_autograd_node()
    return node is not None and not isinstance(node, torch.autograd.function.BackwardCFunction)


def in_accumulate_grad(rows: Rows) -> bool:
    """Tell whether the engine is about to store a gradient in the ``.grad`` of a leaf of the user's graph."""
    node = torch._C._current_autograd_node()
    if node is None or node.name() != "torch::autograd::AccumulateGrad":
        return False
    # A backward inside the backward (reentrant checkpointing) hands its inputs' gradients on: those of its leaves that
    # are no parameters.
    return torch._C._current_graph_task_id() == rows.graph_task or isinstance(node.variable, nn.Parameter)  # type: ignore[attr-defined]
