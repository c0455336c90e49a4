"""Step 2, for each operation of the forward: run it a second time, on the shadows, and keep the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_ast.core.dependence.perturbed import is_real_valued
from lightning_ast.core.dependence.shadow_ops import Facts, OpClass, facts_of, random_states, restored, tensors_in
from lightning_ast.core.dependence.shadows import Kind, Shadows
from lightning_ast.core.partial.registry import OpArgs, OpKwargs

__all__ = ["Call", "Operator", "follow", "prepare"]

Operator = Callable[..., Any]
"""An OpOverload, or an operator that takes functions."""
_Keep = Callable[[Tensor], bool]
"""Tells which arguments stay real."""
_UNREAD = (Kind.UNKNOWN, Kind.EMPTY)
_BY_VALUES = ("nonzero", "masked_select", "_pack_padded_sequence", "repeat_interleave", "unique_dim", "_unique2")
"""Operations whose number of rows depends on values."""


@dataclass
class Call:
    """An operation between its arrival and its second run."""

    func: Operator
    args: OpArgs
    kwargs: OpKwargs
    facts: Facts
    given: OpKwargs  # all that is in args and kwargs, by name
    kind: Kind = Kind.PLAIN  # SHADOW where it is to be run again; otherwise what its results become
    written: list[Tensor] = field(default_factory=list)  # the arguments that it changes
    has_numbers: bool = False  # whether numbers, not ids alone, among the arguments depend on the sample
    # The states of the random generators before the first run.
    states: list[tuple[torch.Generator, Tensor]] = field(default_factory=list)
    with_grad: bool = True  # whether the step records gradients here: some kernels return more then
    number: int | None = None  # of the autograd node that makes its results


def prepare(shadows: Shadows, func: Operator, args: OpArgs, kwargs: OpKwargs, *, with_grad: bool) -> Call:
    """Decide before an operation what to do after it, and save what it is going to change."""
    facts = facts_of(func)
    given = {**dict(zip(facts.arguments, args, strict=False)), **kwargs}
    call = Call(func, args, kwargs, facts, given, with_grad=with_grad)
    read: list[Tensor] = []
    for name, value in given.items():
        (call.written if name in facts.writes else read).extend(tensors_in(value))
    known = [(tensor, shadows.kind(tensor)) for tensor in (*read, *call.written)]
    call.kind = _outlook(facts, known[: len(read)], known[len(read) :])
    call.has_numbers = any(kind is Kind.SHADOW and is_real_valued(tensor) for tensor, kind in known)
    if call.kind is Kind.SHADOW:
        for tensor in call.written:  # while the shadow still equals it: the operation is about to change it
            shadows.start(tensor)
        if facts.is_random:
            call.states = random_states(args, kwargs)
    return call


def follow(shadows: Shadows, call: Call, results: Any) -> None:
    """Run an operation again on the shadows, after it has been run; results that do not fit count as unknown."""
    real = tensors_in(results)
    if call.kind is not Kind.SHADOW or not _is_followed(shadows, call, real):
        _settle(shadows, call, real, Kind.UNKNOWN if call.kind is Kind.SHADOW else call.kind)
    if call.kind is Kind.PLAIN:
        return
    # The number of rows that were picked one by one is a multiple of the batch size by chance alone: they are no blocks
    # of one size for each sample, and nor are the rows of results that have as many.
    given = tensors_in((call.args, call.kwargs))
    name = call.facts.name
    by_mask = name in ("index", "_unsafe_index") and any(t.dtype in (torch.bool, torch.uint8) for t in given)
    rows = {tensor.shape[0] for tensor in given if shadows.is_picked(tensor)}
    for tensor in real:
        if tensor.dim() > 0 and (by_mask or name in _BY_VALUES or tensor.shape[0] in rows):
            shadows.set_picked(tensor)


def _is_followed(shadows: Shadows, call: Call, real: list[Tensor]) -> bool:
    """Run an operation on the shadows; tell whether the results fit."""
    for keep in _attempts(shadows, call):
        try:
            made = _made(shadows, call, real, keep)
        except torch.OutOfMemoryError:  # the trace gives up as a whole, and lets go of the memory
            raise
        except Exception:  # a shape or an index that depends on the values: it must not fail the run
            continue
        if _fit(real, made):
            made = _other_choice(shadows, call, real, made)
            for tensor, shadow in zip(real, made, strict=True):
                shadows.adopt(tensor, shadow)
            if call.facts.op_class is OpClass.SORT:
                shadows.mark(real[1], Kind.UNKNOWN)
            return True
    return False


def _made(shadows: Shadows, call: Call, real: list[Tensor], keep: _Keep) -> list[Tensor]:
    made = _run(shadows, call, real, keep, {})
    # Parameters that are all zero (a head before its first step, the second matrix of an adapter) hide what depends on
    # the sample. In their place stand others, and what changes there is added to the real results.
    silent = _silent(shadows, call)
    if not silent or call.written or not _fit(real, made):
        return made
    loud = _run(shadows, call, real, keep, silent)
    plain = _run(shadows, call, real, lambda _: True, silent)
    if not (_fit(real, loud) and _fit(real, plain)):
        return made
    return [one + (b - a) if one.is_floating_point() else one for one, a, b in zip(made, plain, loud, strict=True)]


def _silent(shadows: Shadows, call: Call) -> dict[int, Tensor]:
    """Find the parameters among the arguments that are all zero, by id, with others of the same form."""
    if not call.has_numbers:
        return {}
    found = {}
    for tensor in tensors_in((call.args, call.kwargs)):
        is_weight = tensor.requires_grad and tensor.is_floating_point() and tensor.numel() > 0
        if is_weight and shadows.kind(tensor) in (Kind.PLAIN, Kind.UNSEEN) and not bool(tensor.detach().any()):
            # drawn from a generator of its own: the user's random numbers must stay what they are
            values = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))
            found[id(tensor)] = (values + 0.5).to(tensor)
    return found


def _outlook(facts: Facts, read: list[tuple[Tensor, Kind]], written: list[tuple[Tensor, Kind]]) -> Kind:
    if facts.op_class is OpClass.PLAIN or facts.moves_views_only:
        return Kind.PLAIN
    if facts.op_class is OpClass.EMPTY:
        return Kind.EMPTY
    unread = [is_real_valued(tensor) for tensor, kind in read if kind in _UNREAD]
    if any(unread) or any(kind is Kind.UNKNOWN for _, kind in written):
        return Kind.UNKNOWN
    if any(kind is Kind.SHADOW for _, kind in (*read, *written)):
        return Kind.UNKNOWN if facts.op_class is OpClass.CHOICE else Kind.SHADOW
    # Unknown positions are taken as they are, where they move numbers that have shadows; here are none.
    return Kind.UNKNOWN if unread else Kind.PLAIN


def _attempts(shadows: Shadows, call: Call) -> Iterator[_Keep]:
    """Yield what tells that an argument stays real: nothing does, the masks do, or all masks and positions do."""
    # A mask or a list of positions decides how many rows there are, and in which order. The rows of a gradient follow
    # the real ones, so that they are used wherever numbers that depend on the sample are moved by them.
    if not call.has_numbers:
        yield lambda _: False
        return
    selects = call.facts.op_class is OpClass.SELECT
    yield lambda tensor: selects and tensor.dtype in (torch.bool, torch.uint8)
    discrete = [t for t in tensors_in((call.args, call.kwargs)) if not is_real_valued(t)]
    if any(shadows.kind(tensor) is Kind.SHADOW for tensor in discrete):
        yield lambda tensor: not is_real_valued(tensor)


def _run(shadows: Shadows, call: Call, real: list[Tensor], keep: _Keep, swap: dict[int, Tensor]) -> list[Tensor]:
    written = {id(tensor) for tensor in call.written}

    def shadow_of(tensor: Tensor) -> Tensor:
        tensor = swap.get(id(tensor), tensor)
        stays = shadows.kind(tensor) is not Kind.SHADOW or (keep(tensor) and id(tensor) not in written)
        return tensor if stays else shadows.of(tensor)

    given = call.given
    if call.facts.op_class is OpClass.BATCH_NORM and given.get("training", True):
        affine = [given.get("weight"), given.get("bias")]
        if any(tensor is not None and shadows.kind(tensor) is Kind.SHADOW for tensor in affine):
            raise ValueError("the formula for BatchNorm does not hold for a weight that is made of the samples")
        return _batch_norm(given, shadow_of(given["input"]), swap.get(id(affine[0]), affine[0]), real)
    # In the order that the real run found: a gradient takes the same way.
    if call.facts.op_class is OpClass.SORT:
        return [shadow_of(given["self"]).gather(given.get("dim", -1), real[1]), real[1]]
    args, kwargs = tree_map_only(Tensor, shadow_of, (call.args, call.kwargs))
    with restored(call.states), torch.set_grad_enabled(call.with_grad):  # autograd is above, and makes no node here
        return tensors_in(call.func(*args, **kwargs))


def _batch_norm(given: OpKwargs, shadow: Tensor, weight: Tensor | None, results: list[Tensor]) -> list[Tensor]:
    """Compute what BatchNorm in training returns for a shadow, by the statistics of the real batch."""
    real = given["input"]
    output = results[0]
    wide = torch.promote_types(real.dtype, torch.float32)
    if len(results) > 2 and results[2].numel():
        inverse = results[2]
    else:  # cuDNN's kernel and some others keep their statistics to themselves
        dims = [d for d in range(real.dim()) if d != 1]
        inverse = (real.to(wide).var(dims, unbiased=False) + given["eps"]).rsqrt()
    scale = inverse.to(wide) if weight is None else inverse.to(wide) * weight.to(wide)
    scale = scale.reshape(1, -1, *[1] * (real.dim() - 2))
    # With the shadow's own statistics every row would change, and the sample's could not be told from the others. The
    # change is added to the real output, so that the rows of other samples stay equal to the last bit.
    change = (shadow.to(wide) - real.to(wide)) * scale
    return [(output.to(wide) + change).to(output.dtype), *results[1:]]


def _other_choice(shadows: Shadows, call: Call, real: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    """Choose another place where the largest or smallest value of a changed row is where it was."""
    if call.facts.op_class is not OpClass.ONE_OF_MANY:
        return made
    values = call.given["self"]
    dim = call.given.get("dim")
    if dim is None or values.dim() == 0 or values.shape[dim] < 2:
        return made
    chosen = real[-1]
    # Rows that are picked by it, as from a code book, belong to the sample also where two samples share one.
    differs = (values != shadows.of(values)).any(dim, keepdim=bool(call.given.get("keepdim", False)))
    same = differs & (made[-1] == chosen)
    return [*made[:-1], torch.where(same, torch.where(chosen > 0, chosen - 1, chosen + 1), made[-1])]


def _fit(real: list[Tensor], made: list[Tensor]) -> bool:
    first, second = ([(t.shape, t.dtype, t.layout) for t in results] for results in (real, made))
    return first == second


def _settle(shadows: Shadows, call: Call, real: list[Tensor], kind: Kind) -> None:
    """Remember what is known about the results of an operation that has not been run again."""
    is_collective = call.facts.name == "collective"
    # The schemas of some collectives do not tell that they fill a buffer, as FSDP2 does to gather its parameters.
    filled = tensors_in((call.args, call.kwargs)) if is_collective else []
    for tensor in (*call.written, *(tensor for tensor in filled if shadows.kind(tensor) is Kind.EMPTY)):
        if kind is Kind.UNKNOWN:
            shadows.mark(tensor, Kind.UNKNOWN)
        elif is_collective or shadows.kind(tensor) is Kind.EMPTY:
            shadows.mark(tensor, Kind.PLAIN)
    for tensor in real:
        if shadows.kind(tensor) is Kind.UNSEEN:
            shadows.mark(tensor, kind)
