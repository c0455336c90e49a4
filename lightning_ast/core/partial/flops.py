"""Step 6, the cost: count what a partial backward really computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._dynamo.eval_frame import OptimizedModule
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_ast.core.partial.gradient import RowGradient
from lightning_ast.core.partial.memory import GradientMemory
from lightning_ast.core.partial.registry import OpArgs, OpKwargs, runs_by_parts

__all__ = ["BackwardFlops", "RowOps", "compiled_parts", "uncounted"]

Operator: TypeAlias = Any  # an OpOverload or a HigherOrderOperator, which have next to nothing in common


class RowOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows the dispatch modes around it the row-sized ops of a partial backward.

    A mode such as torch's FlopCounterMode sees a row gradient's full shape and reports a dense backward. In ``with
    FlopCounterMode() as counter, RowOps(): loss.backward()`` it sees the ops that are run in its place.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Operator, types: Sequence[type], args: OpArgs = (), kwargs: OpKwargs | None = None
    ) -> Any:
        """Hand row gradients to their rules with the outer modes still on."""
        kwargs = kwargs or {}
        for a in tree_leaves((args, kwargs)):
            if isinstance(a, (RowGradient, GradientMemory)):
                return type(a).__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


class BackwardFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside twice: as autograd sees it, at full shapes, and as it is run.

    Attributes:
        full: FLOPs of the backward over every row (a multiply-add counts as 2).
        executed: FLOPs that were run: the row-sized ops, and those that ran over all rows. None where another dispatch
            mode is active around it, which must not see other ops than without this one.
        failure: The reason why not everything was counted, or None.

    Example:
        >>> import torch
        >>> from lightning_ast.core import select_rows
        >>> losses = torch.nn.Linear(8, 8)(torch.randn(10, 8)).square().sum(1)
        >>> loss = select_rows(losses, torch.tensor([4]))
        >>> with BackwardFlops() as flops:
        ...     loss.backward()
        >>> flops.executed, flops.full
        (128, 1280)
    """

    # Not torch's FlopCounterMode: its module hooks make `torch.autograd.grad` fail for leaves.
    supports_higher_order_operators = True  # else torch refuses them (flex_attention, cond) while this is active

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.full = 0
        self.executed: int | None = 0
        self.failure: str | None = None
        self._in_rows = 0  # rules that are running, one inside the other

    @property
    def executed_share(self) -> float | None:
        """Return the executed FLOPs as a share of the full backward's; None where either is not known."""
        if self.failure is not None or self.executed is None or self.full == 0:
            return None
        return self.executed / self.full

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Leave torch.compile on: under other modes compiled functions run uncompiled, with other rounding."""
        return True

    def __torch_dispatch__(
        self, func: Operator, types: Sequence[Any], args: OpArgs = (), kwargs: OpKwargs | None = None
    ) -> Any:
        """Run the op as it would run without this mode, then count it."""
        kwargs = kwargs or {}
        alone = torch._C._len_torch_dispatch_stack() == 0  # this mode is off the stack while it handles an op
        # Of these types, only those with a dispatch of their own matter.
        types = [each for each in types if each.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl]
        rows = bool(types) and types[0] in (RowGradient, GradientMemory)
        composed = not types and _is_composed(func, args, kwargs)
        if alone and types and not rows:
            return NotImplemented  # torch asks the subclass then, and its ops come here (a jagged tensor's)
        if alone and composed:
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if alone and rows:  # the rules get the row gradients, and the ops that they run come here too
            self._in_rows += 1
            try:
                with self:
                    result = types[0].__torch_dispatch__(func, types, args, kwargs)
            finally:
                self._in_rows -= 1
        else:
            result = func(*args, **kwargs)
        if composed or (types and not rows):
            self.failure = self.failure or f"{func} under another dispatch mode"
        self._add(self._flops_of(func, args, kwargs, result), rows=rows, alone=alone)
        return result

    def _add(self, flops: int, *, rows: bool, alone: bool) -> None:
        if not self._in_rows:  # the ops inside a rule stand for the one at full shape, which was added
            self.full += flops
        if rows and not alone:  # another mode saw the op at its full shape; those that were run are not seen
            self.executed = None
        elif not rows and self.executed is not None:
            self.executed += flops

    def _flops_of(self, func: Operator, args: OpArgs, kwargs: OpKwargs, result: Any) -> int:
        """Count an op by torch's formula; return 0 for ops that have none, as torch does."""
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        try:
            if formula is not None:
                return int(formula(*args, **kwargs, out_val=result))
            if isinstance(func, HigherOrderOperator) or any(_is_opaque(argument) for argument in args):
                raise NotImplementedError("the operations inside are not seen")
        except Exception as error:  # a formula that does not fit must not end the training
            self.failure = self.failure or f"{func}: {type(error).__name__}: {error}"
        return 0


def _is_opaque(argument: Any) -> bool:
    """Tell whether this is a nested tensor of the strided kind, whose kernels show nothing of what they run."""
    return isinstance(argument, Tensor) and argument.is_nested and argument.layout is torch.strided


def _is_composed(func: Operator, args: OpArgs, kwargs: OpKwargs) -> bool:
    """Tell whether an op runs as a sequence of others, on these tensors: so they come in inference mode."""
    if isinstance(func, HigherOrderOperator) or not runs_by_parts(func):
        return False
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or any(_is_opaque(tensor) for tensor in tensors):  # without a tensor there is nothing to compute
        return False
    excluded = torch._C._dispatch_tls_local_exclude_set()  # autocast's kernels, where it is off
    return not any(func.has_kernel_for_any_dispatch_key(torch._C._dispatch_keys(t) - excluded) for t in tensors)


def uncounted(dense_ops: Iterable[str]) -> bool:
    """Tell whether ops that ran over all rows, by name, cost much but have no formula in torch's FlopCounterMode."""
    return any(kind in name for name in dense_ops for kind in ("rnn", "lstm", "gru"))


def compiled_parts(module: nn.Module) -> bool:
    """Tell whether something inside is compiled by ``torch.compile``: the ops of fused kernels are not counted."""
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in module.modules())
