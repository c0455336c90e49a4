"""Step 2 of a batch: follow one sample through the network's first forward.

So it becomes known which elements of each tensor belong to which sample.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ast.core.dependence.perturbed import Pair, Take, is_real_valued, perturbed
from lightning_ast.core.dependence.records import Dependence, GraphNode, Record, Records
from lightning_ast.core.dependence.shadow_ops import OpClass, quiet, tensors_in
from lightning_ast.core.dependence.shadow_run import Call, Operator, follow, prepare
from lightning_ast.core.dependence.shadows import Kind, Shadows
from lightning_ast.core.partial.registry import OpArgs, OpKwargs
from lightning_ast.errors import BatchError

__all__ = ["SampleTrace", "SeveralTrace", "uncompiled"]

_SWEEP_OPERATIONS = 32  # shadows of freed tensors stay for so many operations at most
_stance_lock = threading.Lock()
_stances: list[None] = []  # one element for each that is inside `uncompiled`
_stance_restored = ExitStack()


class SampleTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows one sample: every operation runs once more on the values that there would be with another sample.

    Where the two differ, the elements belong to the sample. The run itself is not changed: results, buffers and random
    numbers are those of the first run. It may be entered several times; leave it before the backward, and release it.

    Args:
        batch: The batch of the step, on its device.
        batch_size: The number of samples B.
        take: Picks samples out of the batch; None takes :func:`lightning_ast.core.select_batch`.
        only: Change this one of the batch's tensors alone; None changes all that hold the sample.
        sample: The position of the sample to follow; None follows the last.

    Attributes:
        sample: The position of the sample that is followed, or those of several.
        parts: The number of tensors of the batch that are worth changing alone: labels count where there is nothing
            else.
        complete: Whether all tensors that hold the sample were changed.
        paused: Whether operations pass without being followed, as those of a backward.
        failure: The reason why nothing is known, or None.

    Example:
        >>> layer, batch = torch.nn.Linear(2, 3), torch.randn(4, 2)
        >>> with SampleTrace(batch, 4) as trace:
        ...     out = layer(batch)
        >>> (trace.dependence(out.grad_fn).profiles[0] > 0).tolist()
        [False, False, False, True]
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        batch: Any,
        batch_size: int,
        *,
        take: Take | None = None,
        only: int | None = None,
        sample: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # With the last one, a causal or cumulative operation over the batch changes no other sample.
        self._followed = batch_size - 1 if sample is None else sample
        self.sample: int | tuple[int, ...] = self._followed
        self.failure: str | None = None
        self.complete = only is None
        self.paused = False
        self._shadows = Shadows()
        self._records = Records()
        self._thread = threading.get_ident()  # autograd numbers the nodes of each thread from 0
        self._last_number = _last_node_number()
        self._first_number = self._last_number + 1  # nodes below it were made before the trace
        self._operations = 0
        self._uncompiled: list[AbstractContextManager[None]] = []  # one for each time that it was entered
        pairs: list[Pair] = []
        try:
            pairs = self._changed(batch, batch_size, take)
        except BatchError as error:
            self.failure = str(error)
        except Exception as error:  # an override of the user's own, which is not called otherwise in most modes
            self.failure = f"a sample of the batch could not be changed: {type(error).__name__}: {error}"
        pairs.sort(key=lambda pair: _is_label(pair[0]))  # labels alone prove little: they come last
        self.parts = sum(not _is_label(real) for real, _ in pairs) or len(pairs)
        if not pairs and self.failure is None and batch_size > 1:
            self.failure = "the batch holds no tensor in which a sample could be changed"
        try:
            with quiet():
                self._shadows.add(pairs if only is None else pairs[only : only + 1])
        except Exception as error:  # the trace must never fail the run
            self._give_up(error)

    def __enter__(self) -> SampleTrace:
        self._uncompiled.append(uncompiled())
        self._uncompiled[-1].__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._uncompiled.pop().__exit__(*error)

    def dependence(self, node: GraphNode, output_nr: int = 0) -> Dependence | None:
        """Tell where an output of a node depends on the sample; return None where nothing is known.

        The node is one of a graph that was made while the trace was active, or that of a leaf. The shape is the
        output's (of a jagged one: of its values).
        """
        if self.failure is not None:
            return None
        with quiet():
            if hasattr(node, "variable"):
                return self._record(node.variable).dependence()
            own_thread = threading.get_ident() == self._thread
            # A backward may ask from another thread, which numbers its nodes by itself.
            record = self._records.find(node, output_nr, by_number=own_thread)
            found = None if record is None else record.dependence()
        if found is not None and found.independent and isinstance(node, BackwardCFunction):
            # A function of the user's own may write by kernels that nobody sees.
            below = [self.dependence(*edge) for edge in node.next_functions if edge[0] is not None]
            return found if all(each is not None and each.independent for each in below) else None
        return found

    def depends(self, tensor: Tensor) -> bool | None:
        """Tell whether a tensor holds something that depends on the sample; None where that is not known."""
        if self.failure is not None:
            return None
        with quiet():
            found = self._record(tensor).dependence()
        return None if found is None else not found.independent

    def release(self) -> None:
        """Drop every tensor held; what was not asked for yet is unknown from now on."""
        self._shadows.clear()
        self._records.clear()

    def __torch_dispatch__(self, func: Operator, types: Any, args: OpArgs = (), kwargs: OpKwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        # Results of the user's operation are returned as they came; everything of the trace's own is caught.
        wrapped = any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types)
        call = None if self.failure is not None else self._arrive(func, args, kwargs, wrapped=wrapped)
        if wrapped:
            return NotImplemented  # a tensor class of its own: it calls the operations that it is made of
        try:
            results = func(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if call is None or not len(self._shadows):
                raise
            self._give_up(error)  # the shadows took the memory
            return func(*args, **kwargs)
        if call is not None:
            self._leave(call, results)
        return results

    def _changed(self, batch: Any, batch_size: int, take: Take | None) -> list[Pair]:
        """Pair the tensors of the batch with changed copies."""
        return perturbed(batch, batch_size, self._followed, take)

    def _give_up(self, error: Exception) -> None:
        self.failure = f"following a sample through the step failed: {type(error).__name__}: {error}"
        self.release()

    def _arrive(self, func: Operator, args: OpArgs, kwargs: OpKwargs, *, wrapped: bool) -> Call | None:
        """Prepare the second run of an operation."""
        try:
            number = _last_node_number()
            with_grad = torch.is_grad_enabled()
            # A higher number than at the last operation: autograd, which runs above, has made a node for this one.
            fresh = number != self._last_number
            self._last_number = number
            with quiet():
                tensors = tensors_in((args, kwargs))
                for tensor in tensors:
                    self._record_node(tensor, fresh)
                if wrapped:
                    return None
                call = prepare(self._shadows, func, args, kwargs, with_grad=with_grad)
                for tensor in call.written:
                    self._records.before_write(self._shadows.key(tensor))
            if fresh and with_grad and any(tensor.requires_grad for tensor in tensors):
                call.number = number
            return call
        except Exception as error:  # the trace must never fail the run
            self._give_up(error)
            return None

    def _leave(self, call: Call, results: Any) -> None:
        """Run the operation again on the shadows, and record its results."""
        try:
            with quiet():
                follow(self._shadows, call, results)
                made = call.facts.op_class not in (OpClass.PLAIN, OpClass.EMPTY)
                if call.number is not None and made:
                    # By the number of their node: they may be used where the trace does not see it.
                    tensors = tensors_in(results)
                    records = [self._record(tensor) if is_real_valued(tensor) else None for tensor in tensors]
                    self._records.add_unused(call.number, records, [self._shadows.key(tensor) for tensor in tensors])
                self._operations += 1
                if self._operations % _SWEEP_OPERATIONS == 0:
                    self._shadows.sweep()
                    self._records.sweep()
        except Exception as error:  # the trace must never fail the run
            self._give_up(error)

    def _record_node(self, tensor: Tensor, fresh: bool) -> None:
        """Record an argument under the node that made it."""
        # Asking a changed view for its node makes a new one, unless the operation itself has just done so.
        if tensor.requires_grad and not tensor.is_leaf and (fresh or not tensor._is_view()):
            node = tensor.grad_fn
            if node is not None and not self._records.has(node, tensor.output_nr):
                key = self._shadows.key(_inner(tensor))
                self._records.add(node, tensor.output_nr, self._record(tensor, node), key)

    def _record(self, tensor: Tensor, node: GraphNode | None = None) -> Record:
        inner = _inner(tensor)
        kind = self._shadows.kind(inner)
        shape = tuple(inner.shape)
        if kind is Kind.SHADOW:
            return Record(shape, (inner.detach(), self._shadows.of(inner)), picked=self._shadows.is_picked(inner))
        if kind is Kind.UNSEEN and node is not None and node._sequence_nr() >= self._first_number:
            kind = Kind.UNKNOWN  # made during the trace, by a kernel that it has not seen
        return Record(shape, known=kind in (Kind.PLAIN, Kind.UNSEEN))


class SeveralTrace(SampleTrace):  # type: ignore[no-untyped-call]
    """Follows one sample of each of several loaders' batches; the samples of all are counted in one row.

    Their positions within the batches differ, and every batch has as many, so that rows show it where they mix samples
    of several. Each of the ``sizes`` is larger than the number of batches.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int]) -> None:
        last = min(sizes) - 1
        self._places = list(zip(sizes, range(last, last - len(sizes), -1), strict=True))
        super().__init__(parts, sum(sizes))
        starts = accumulate(sizes, initial=0)
        self.sample = tuple(start + place for start, (_, place) in zip(starts, self._places, strict=False))

    def _changed(self, batch: Any, batch_size: int, take: Take | None) -> list[Pair]:
        parts = zip(batch, self._places, strict=True)
        return [pair for part, (size, place) in parts for pair in perturbed(part, size, place)]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run functions of ``torch.compile`` uncompiled: under a dispatch mode torch would refuse to, or raise an error."""
    # Torch has one stance for all threads: the first to come sets it and the last to go restores it, so that fits in
    # several threads may be inside at once.
    with _stance_lock:
        # Importing torch._dynamo takes seconds, and without it nothing is compiled.
        if not _stances and "torch._dynamo" in sys.modules:
            _stance_restored.enter_context(torch.compiler.set_stance("force_eager"))
        _stances.append(None)
    try:
        yield
    finally:
        with _stance_lock:
            _stances.pop()
            if not _stances:
                _stance_restored.close()


def _last_node_number() -> int:
    """Return the number of the autograd node that this thread has made last, without making one."""
    number: int = torch._C._autograd._get_sequence_nr() - 1
    return number


def _inner(tensor: Tensor) -> Tensor:
    """Return the tensor that holds the numbers of a tensor class of its own, such as a jagged one's values."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor
    parts = [getattr(tensor, name) for name in flatten()[0]]
    numbers = [part for part in parts if isinstance(part, Tensor) and is_real_valued(part) and part.numel()]
    return numbers[0] if len(numbers) == 1 else tensor


def _is_label(tensor: Tensor) -> bool:
    """Tell whether a tensor holds one integer for each sample."""
    return tensor.dim() == 1 and not is_real_valued(tensor)
