"""The scoring pass of ``subset``: the user's own step as far as its loss, with nothing logged, updated or drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import Entry, Found
from lightning_ast.core.gradient_gate import norms_at
from lightning_ast.core.losses.capture import LossRecord
from lightning_ast.core.partial import compiled_parts
from lightning_ast.core.traceless_forward import TracelessForward
from lightning_ast.errors import LossCaptureError
from lightning_ast.lightning_internals.fit_loop import wrapped_optimizers
from lightning_ast.lightning_internals.still_metrics import StillMetrics
from lightning_ast.selection.entry_search import EntrySearch
from lightning_ast.selection.step_losses import StepLosses
from lightning_ast.selection.taps import Taps

__all__ = ["Scored", "ScoringPass"]


@dataclass(frozen=True)
class Scored:
    """What a scoring pass found.

    Attributes:
        norms: ``(B,)`` norms of the samples' rows of the gradient of the loss, times B.
        labels: ``(B,)`` class indices, or None.
        record: The losses by their values, where the score needs them.
    """

    norms: Tensor
    labels: Tensor | None
    record: LossRecord | None


class ScoringPass:
    """Scores a batch by one run of the training step without a trace.

    The network runs without a graph where its last layers are modules whose outputs can be had (found in the first
    pass); only the loss part is differentiated. Elsewhere the whole step runs with its graph.

    Args:
        module: The bare LightningModule, also under DDP: nothing is synchronised but SyncBatchNorm's own statistics.
        training_step: The module's own, not wrapped.
        search: Finds the entries of the losses of these passes.
        needs_losses: Whether the score is computed from the values of torch's loss functions.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        *,
        training_step: Callable[..., Any],
        search: EntrySearch,
        needs_losses: bool,
    ) -> None:
        self._module = module
        self._training_step = training_step
        self._search = search
        self._needs_losses = needs_losses
        self._takes_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
        self._traceless = TracelessForward(module)
        self._metrics = StillMetrics(module)
        self._passed = 0
        self._proved: Found | None = None
        self._taps: Taps | None = None if compiled_parts(module) else Taps(module)

    def __call__(self, batch: Any, batch_idx: int, batch_size: int) -> Scored | None:
        """Score a batch.

        Returns:
            What was found; None where the step computes no loss that depends on the samples: it is a dense step.

        Raises:
            EntryError: The first batch's rows cannot be found in the graph of the loss.
            LossCaptureError: The score needs the losses, and they cannot be had.
        """
        search = self._search
        search.batch = batch
        trace = search.start_trace(batch_size) if search.wants_trace(batch_size) else None
        context = self._module.trainer.precision_plugin.forward_context()
        with (
            isolate_rng(include_cuda=False),
            self._nothing_changed(),
            self._traceless(grad=True),
            self._metrics,
            context,
        ):
            scored = self._scored(batch, batch_idx, batch_size, trace)
        if trace is not None:
            search.end_trace(trace)
        search.batch = None
        return scored

    def _scored(self, batch: Any, batch_idx: int, size: int, trace: SampleTrace | None) -> Scored | None:
        losses = StepLosses(self._module)
        taps = self._taps
        tapped = taps is not None and taps.ready and trace is None
        with ExitStack() as stack:
            if taps is not None and (tapped or trace is not None):
                stack.enter_context(taps.reading() if tapped else taps.finding())
            if trace is not None:
                stack.enter_context(trace)
            stack.enter_context(losses)
            loss = self._loss_of(batch, batch_idx, lambda loss, number: self._passes(loss, number, size, trace))
        if loss is None:
            return None
        norms = taps.norms(loss, size) if tapped and taps is not None else None
        if norms is None:
            if tapped:  # the step took another way than in the first pass
                self._taps = None
                return self._scored(batch, batch_idx, size, trace)
            norms = self._norms(loss, size, trace)
        if norms is None:
            return None
        record = losses.record(loss, size) if self._needs_losses else None
        return Scored(norms, losses.labels(size), record)

    def _norms(self, loss: Tensor, size: int, trace: SampleTrace | None) -> Tensor | None:
        if loss.grad_fn is None:
            return None
        found = self._proved
        self._proved = None
        if found is None:
            found = self._search.find(loss, size) if trace is None else self._search.prove(loss, size, trace)
        entries: list[Entry] = [entry for entry in found.entries if not entry.nested]
        if not entries:
            return None
        if trace is not None and self._taps is not None:
            self._taps.settle(entries, size, trace)
        edges = [GradientEdge(entry.node, entry.output_nr) for entry in entries]
        return norms_at(loss, edges, [entry.place for entry in entries], weight=size)

    def _passes(self, loss: Tensor, number: int, size: int, trace: SampleTrace | None) -> bool:
        """Tell whether to skip a backward of a step that runs its own: its loss does not depend on the batch.

        The generator's loss of a GAN is such a one: what it is computed from is drawn, not loaded.

        Args:
            loss: The loss.
            number: Backwards of the step before this one.
            size: Samples B of the batch.
            trace: The trace of the step, or None: what the traced steps have shown counts.
        """
        if trace is None:
            return number < self._passed
        trace.paused = True
        self._proved = self._search.prove(loss, size, trace)
        trace.paused = False
        passes = not self._proved.entries and not self._proved.unclear
        self._passed = number + passes
        return passes

    def _loss_of(self, batch: Any, batch_idx: int, passes: Callable[[Tensor, int], bool]) -> Tensor | None:
        self._proved = None
        stop = _StopAtBackward(passes)
        with stop, suppress(_BackwardReached):
            output = self._training_step(*((batch, batch_idx) if self._takes_index else (batch,)))
            loss: Any = output.get("loss") if isinstance(output, dict) else output
            return loss if isinstance(loss, Tensor) and not stop.passed else None
        return stop.loss

    def _own_optimization(self) -> Iterator[tuple[Any, str, Any]]:
        """List what a step that optimizes by itself calls between two backwards."""
        if self._module.automatic_optimization:
            return
        trainer = self._module.trainer
        for optimizer in (*wrapped_optimizers(trainer), *trainer.optimizers):
            yield optimizer, "step", _nothing
            yield optimizer, "zero_grad", _nothing
        for config in trainer.lr_scheduler_configs:
            yield config.scheduler, "step", _nothing
        yield self._module, "clip_gradients", _nothing

    @contextmanager
    def _nothing_changed(self) -> Iterator[None]:
        """Let ``self.log`` do nothing, and restore afterwards what requires a gradient."""
        stubs: list[tuple[Any, str, Any]] = [(self._module, "log", _nothing), (self._module, "log_dict", _nothing)]
        stubs.append((self._module, "manual_backward", _stop))
        stubs += self._own_optimization()
        saved = [(owner, name, owner.__dict__.get(name, _MISSING)) for owner, name, _ in stubs]
        flags = [(name, p, p.requires_grad, p._version) for name, p in self._module.named_parameters()]
        try:
            for owner, name, stub in stubs:
                owner.__dict__[name] = stub
            yield
        finally:
            for owner, name, value in saved:
                if value is _MISSING:
                    del owner.__dict__[name]
                else:
                    owner.__dict__[name] = value
            for _, parameter, flag, _ in flags:
                parameter.requires_grad_(flag)
        changed = [name for name, parameter, _, version in flags if parameter._version != version]
        if changed:
            raise LossCaptureError(
                f"what stands before the loss in training_step changes parameters ({', '.join(changed[:3])}), and "
                "mode='subset' runs it twice. Move it to on_train_batch_end, or use mode='partial'."
            )


class _BackwardReached(Exception):  # noqa: N818 - it is caught, and no error
    """A step that runs its own backward came to the first one."""


class _StopAtBackward(TorchFunctionMode):
    """Stops a step at its first backward that does not pass, and keeps the loss; none is computed.

    Args:
        passes: ``(loss, number of backwards before)``: tells whether the step goes on.
    """

    def __init__(self, passes: Callable[[Tensor, int], bool]) -> None:
        super().__init__()
        self._passes = passes
        self.loss: Tensor | None = None
        self.passed = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward:
            if self._passes(args[0], self.passed):
                self.passed += 1
                return None
            self.loss = args[0]
            raise _BackwardReached
        return func(*args, **(kwargs or {}))


def _stop(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]


_MISSING = object()


def _nothing(*_: Any, **__: Any) -> None:
    return None
