"""How an operation is run a second time on shadows, and which operations must not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "ONE_OF_MANY",
    "Facts",
    "batch_norm_shadow",
    "facts_of",
    "generators_of",
    "map_tensors",
    "named",
    "quiet",
    "random_states",
    "restored",
    "sort_shadow",
    "tensors_in",
]

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "_dtensor")
# They read no value of their argument; the shape and dtype alone.
_FACTORIES = frozenset(
    (
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_zeros",
        "new_ones",
        "new_full",
    )
)
_EMPTY = frozenset(
    (
        "empty",
        "empty_like",
        "empty_strided",
        "empty_permuted",
        "new_empty",
        "new_empty_strided",
        "_empty_affine_quantized",
    )
)
# BatchNorm over the whole batch: its statistics are those of the real run, so that other samples do not change.
_STATISTICS = frozenset(
    (
        "batch_norm_stats",
        "batch_norm_gather_stats",
        "batch_norm_gather_stats_with_counts",
        "batch_norm_update_stats",
    )
)
_BATCH_NORMS = frozenset(
    (
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_functional",
        "_batch_norm_with_update",
        "_batch_norm_with_update_functional",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    )
)
# Their results are lists of positions, whose order or length changes as a whole. What is found by them follows the
# real run's choice.
_CHOICES = frozenset(
    (
        "nonzero",
        "nonzero_static",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "nms",
    )
)
_SORTS = frozenset(
    (
        "sort",
        "topk",
    )
)
_SELECTS = frozenset(
    (
        "index",
        "index_put",
        "index_put_",
        "_unsafe_index",
        "masked_select",
        "masked_scatter",
        "masked_scatter_",
    )
)
ONE_OF_MANY = frozenset(("argmax", "argmin", "max", "min"))
"""Operations that choose one place of a row; all but the first two return its value too."""
_PURE_OPERATORS = frozenset(("flex_attention", "flex_attention_backward"))
_ANY_ARGUMENTS = tuple(str(position) for position in range(32))
_UNDECLARED_WRITES = {"_cudnn_rnn": ("dropout_state",), "miopen_rnn": ("dropout_state",)}


@dataclass(frozen=True)
class Facts:
    """What has to be known about an operation before it is run again."""

    name: str
    writes: frozenset[str]  # names of arguments that it changes
    arguments: tuple[str, ...]  # names of positional arguments
    is_random: bool
    moves_views_only: bool  # transpose_ and the like: the values stay where they are
    returns_tensors: bool

    @property
    def is_plain(self) -> bool:
        """Whether its results count as independent of its arguments."""
        return self.name in _FACTORIES or self.name in _STATISTICS or self.name == "collective"

    @property
    def is_empty(self) -> bool:
        """Whether it allocates without writing."""
        return self.name in _EMPTY

    @property
    def is_choice(self) -> bool:
        """Whether its results are lists of positions."""
        return self.name in _CHOICES

    @property
    def is_sort(self) -> bool:
        """Whether it returns values and their positions."""
        return self.name in _SORTS

    @property
    def is_batch_norm(self) -> bool:
        """Whether it is a BatchNorm, in training or not."""
        return self.name in _BATCH_NORMS

    @property
    def selects(self) -> bool:
        """Whether a mask among its arguments decides how many rows there are."""
        return self.name in _SELECTS


@cache
def facts_of(func: Any) -> Facts | None:
    """Read the facts of an operation from its schema and tags; None for an operator that takes functions."""
    if not isinstance(func, torch._ops.OpOverload):
        name = str(func)
        known = name in _PURE_OPERATORS
        return Facts(name, frozenset(), _ANY_ARGUMENTS, False, False, returns_tensors=True) if known else None
    schema = func._schema
    name = "collective" if func.namespace in _COLLECTIVES else schema.name.split("::")[1]
    writes = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    writes |= set(_UNDECLARED_WRITES.get(name, ()))
    view_only = torch.Tag.inplace_view in func.tags
    return Facts(
        name=name,
        writes=frozenset() if name in _BATCH_NORMS or view_only else frozenset(writes),
        arguments=tuple(a.name for a in schema.arguments if not a.kwarg_only),
        is_random=torch.Tag.nondeterministic_seeded in func.tags or bool(_UNDECLARED_WRITES.get(name)),
        moves_views_only=view_only,
        returns_tensors=bool(writes) or any("Tensor" in str(r.type) for r in schema.returns),
    )


def named(facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each given argument."""
    yield from zip(facts.arguments, args, strict=False)
    yield from kwargs.items()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an argument or a result: itself, or those in a list."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an argument with its tensors replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(part, change) for part in value])
    return value


@contextmanager
def quiet() -> Iterator[None]:
    """Run operations of the trace's own: out of sight of modes and of autograd."""
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.no_grad())
        if torch._C._len_torch_dispatch_stack() > 0:
            stack.enter_context(_disable_current_modes())
        yield


def generators_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Generator]:
    """Find the random generators that an operation may draw from."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Generator)]
    if given:
        return given
    generators = {t.device: _default_generator(t.device) for t in tensors_in((*args, *kwargs.values()))}
    return [generator for generator in generators.values() if generator is not None]


def random_states(generators: list[Generator]) -> list[tuple[Generator, Tensor]]:
    """Remember the states of random generators."""
    return [(generator, generator.get_state()) for generator in generators]


def restored(states: list[tuple[Generator, Tensor]]) -> AbstractContextManager[None]:
    """Run a block from remembered random states; the states of now are there again afterwards."""
    return _restored(states) if states else nullcontext()


@contextmanager
def _restored(states: list[tuple[Generator, Tensor]]) -> Iterator[None]:
    now = random_states([generator for generator, _ in states])
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
    module = getattr(torch, device.type, None)
    if device.type == "mps":
        generator: Generator = torch.mps._get_default_mps_generator()
        return generator
    generators = getattr(module, "default_generators", ())
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    return generators[index] if index < len(generators) else None


def batch_norm_shadow(given: dict[str, Any], shadow: Tensor, results: list[Tensor]) -> list[Tensor]:
    """Compute what BatchNorm in training returns for a shadow, by the statistics of the real batch.

    It adds the scaled change to the real output, so that the rows of other samples stay equal to the last bit.
    """
    real = given["input"]
    output = results[0]
    wide = torch.promote_types(real.dtype, torch.float32)
    inverse = results[2] if len(results) > 2 and results[2].numel() else _inverse_deviation(real.to(wide), given["eps"])
    weight = given.get("weight")
    scale = inverse.to(wide) if weight is None else inverse.to(wide) * weight.to(wide)
    scale = scale.reshape(1, -1, *[1] * (real.dim() - 2))
    change = (shadow.to(wide) - real.to(wide)) * scale
    return [(output.to(wide) + change).to(output.dtype), *results[1:]]


def _inverse_deviation(real: Tensor, eps: float) -> Tensor:
    dims = [d for d in range(real.dim()) if d != 1]
    return (real.var(dims, unbiased=False) + eps).rsqrt()


def sort_shadow(given: dict[str, Any], shadow: Tensor, results: list[Tensor]) -> list[Tensor]:
    """Arrange a shadow in the order that the real run found; a gradient takes the same way."""
    return [shadow.gather(given.get("dim", -1), results[1]), results[1]]
