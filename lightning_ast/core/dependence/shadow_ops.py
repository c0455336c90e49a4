"""Step 2, facts about operations: how each is run a second time on shadows, and which must not be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_ast.core.partial.registry import OpArgs, OpKwargs

__all__ = ["Facts", "OpClass", "facts_of", "quiet", "random_states", "restored", "tensors_in"]


class OpClass(Enum):
    """How an operation is carried over to shadows."""

    AGAIN = auto()  # run once more on the shadows
    PLAIN = auto()  # its results count as independent of its arguments
    EMPTY = auto()  # it allocates without writing
    CHOICE = auto()  # its results are positions, whose order or length changes as a whole, or anything
    SORT = auto()  # it returns values and their positions
    SELECT = auto()  # a mask among its arguments decides how many rows there are
    ONE_OF_MANY = auto()  # it chooses one place of a row; all but argmax and argmin return its value too
    BATCH_NORM = auto()  # in training or not


_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "_dtensor", "fsdp")
_OPERATIONS = {
    # These read the shape and the dtype of their argument alone.
    "zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_ones new_full": OpClass.PLAIN,
    # BatchNorm over the batches of several processes: its statistics are those of the real run, so that the rows of
    # other samples do not change.
    "batch_norm_stats batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_update_stats": (
        OpClass.PLAIN
    ),
    "collective": OpClass.PLAIN,
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided _empty_affine_quantized": (
        OpClass.EMPTY
    ),
    # What is found by these positions follows the real run's choice.
    "nonzero nonzero_static _unique _unique2 unique_dim unique_consecutive nms": OpClass.CHOICE,
    "sort topk": OpClass.SORT,
    "index index_put index_put_ _unsafe_index masked_select masked_scatter masked_scatter_": OpClass.SELECT,
    "argmax argmin max min": OpClass.ONE_OF_MANY,
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional _batch_norm_with_update "
    "_batch_norm_with_update_functional cudnn_batch_norm miopen_batch_norm": OpClass.BATCH_NORM,
}
_CLASSES = {name: op_class for names, op_class in _OPERATIONS.items() for name in names.split()}
# The operators that take functions, and are known to write nothing; they have no schema to read names from.
_PURE_OPERATORS = frozenset(("flex_attention", "flex_attention_backward"))
_ANY_ARGUMENTS = tuple(str(position) for position in range(32))
# These change a random state, which their schema does not declare.
_UNDECLARED_WRITES = {"_cudnn_rnn": ("dropout_state",), "miopen_rnn": ("dropout_state",)}


@dataclass(frozen=True)
class Facts:
    """What has to be known about an operation before it is run again."""

    name: str
    op_class: OpClass
    writes: frozenset[str]  # names of arguments that it changes
    arguments: tuple[str, ...]  # names of positional arguments
    is_random: bool
    moves_views_only: bool  # transpose_ and the like: the values stay where they are


@cache
def facts_of(func: Any) -> Facts:
    """Read the facts of an operation from its schema and tags."""
    if not isinstance(func, torch._ops.OpOverload):  # an operator that takes functions, which may do anything
        name = str(func)
        op_class = OpClass.AGAIN if name in _PURE_OPERATORS else OpClass.CHOICE
        return Facts(name, op_class, frozenset(), _ANY_ARGUMENTS, is_random=False, moves_views_only=False)
    schema = func._schema
    name = "collective" if func.namespace in _COLLECTIVES else schema.name.split("::")[1]
    # In a schema, an argument that is written to has an alias that is marked so.
    writes = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    writes |= set(_UNDECLARED_WRITES.get(name, ()))
    returns_tensors = bool(writes) or any("Tensor" in str(r.type) for r in schema.returns)
    op_class = _CLASSES.get(name, OpClass.AGAIN) if returns_tensors else OpClass.PLAIN
    view_only = torch.Tag.inplace_view in func.tags
    changes_values = op_class is not OpClass.BATCH_NORM and not view_only
    return Facts(
        name=name,
        op_class=op_class,
        writes=frozenset(writes) if changes_values else frozenset(),
        arguments=tuple(a.name for a in schema.arguments if not a.kwarg_only),
        is_random=torch.Tag.nondeterministic_seeded in func.tags or bool(_UNDECLARED_WRITES.get(name)),
        moves_views_only=view_only,
    )


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in an argument or a result: itself, or those in a list."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def quiet() -> Iterator[None]:
    """Run operations of the trace's own: out of sight of modes and of autograd."""
    # Neither modes of the user's nor a LossCapture around the step may see the trace's second runs.
    without_modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() > 0 else nullcontext()
    with torch._C.DisableTorchFunction(), torch.no_grad(), without_modes:
        yield


def random_states(args: OpArgs, kwargs: OpKwargs) -> list[tuple[Generator, Tensor]]:
    """Remember the states of the random generators that an operation may draw from."""
    generators = [value for value in (*args, *kwargs.values()) if isinstance(value, Generator)]
    if not generators:  # a generator of the caller's own is the only one that is drawn from
        devices = {tensor.device for tensor in tensors_in((*args, *kwargs.values()))}
        generators = [generator for generator in map(_default_generator, devices) if generator is not None]
    return [(generator, generator.get_state()) for generator in generators]


@contextmanager
def restored(states: list[tuple[Generator, Tensor]]) -> Iterator[None]:
    """Run a block from remembered random states; the states of now are there again afterwards."""
    now = [(generator, generator.get_state()) for generator, _ in states]
    for generator, state in states:
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in now:
            generator.set_state(state)


def _default_generator(device: torch.device) -> Generator | None:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        generator: Generator = torch.mps._get_default_mps_generator()
        return generator
    generators = getattr(getattr(torch, device.type, None), "default_generators", ())
    index = device.index  # that of an accelerator's tensor is always known
    return None if index is None or index >= len(generators) else generators[index]
