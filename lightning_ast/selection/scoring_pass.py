"""The scoring pass of ``subset``: the user's own step as far as its loss, with nothing logged, updated or drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import Entry, Found
from lightning_ast.core.gradient_gate import norms_at
from lightning_ast.core.losses.capture import LossRecord
from lightning_ast.core.partial.flops import compiled_parts
from lightning_ast.core.traceless_forward import TracelessForward
from lightning_ast.errors import LossCaptureError
from lightning_ast.lightning_internals.class_patch import put_on
from lightning_ast.lightning_internals.distributed import shards_parameters
from lightning_ast.lightning_internals.fit_loop import wrapped_optimizers
from lightning_ast.lightning_internals.random_state import kept_host_state
from lightning_ast.lightning_internals.still_metrics import StillMetrics
from lightning_ast.selection.gating import Gating
from lightning_ast.selection.step_losses import StepLosses
from lightning_ast.selection.taps import Taps

__all__ = ["Scored", "ScoringPass"]


@dataclass(frozen=True)
class Scored:
    """What a scoring pass found."""

    norms: Tensor  # (B,) of the samples' rows of the gradient of the loss, times B
    labels: Tensor | None  # (B,) class indices
    record: LossRecord | None  # the losses, where the score is made of them


class ScoringPass:
    """Scores a batch by one run of the training step without a trace."""

    def __init__(self, module: pl.LightningModule, training_step: Callable[..., Any], gating: Gating) -> None:
        self._module = module
        self._training_step = training_step
        self._gating = gating
        self._search = gating.scoring_search
        self._needs_losses = gating.decision.needs_losses
        self._takes_index = is_param_in_hook_signature(training_step, "batch_idx", min_args=2)
        self._list_modules()
        self._metrics = StillMetrics(module)
        self._passed = 0
        self._proved: Found | None = None
        # Sharded parameters are made whole by hooks of their modules, which need the graph and the parameters' flags.
        is_plain = not (compiled_parts(module) or shards_parameters(module.trainer))
        self._taps: Taps | None = Taps(module) if is_plain else None

    def __call__(self, batch: Any, batch_idx: int, batch_size: int) -> Scored | None:
        """Score a batch; None where the step computes no loss that depends on the samples: it is a dense step."""
        if batch_idx == 0 and len(list(self._module.modules())) != len(self._modules):
            self._list_modules()  # a network may grow between epochs
        search = self._search
        search.batch = batch
        trace = search.start_trace(batch_size) if search.wants_trace(batch_size) else None
        # The network runs without a graph where its last layers are modules whose outputs can be had, which a traced
        # pass has found: only the loss part is differentiated. Elsewhere the whole step runs with its graph.
        read = self._taps if self._taps is not None and self._taps.ready and trace is None else None
        # Lightning enters it around the training step: scores of another precision would rank samples otherwise.
        context = self._module.trainer.precision_plugin.forward_context()
        with (
            # Beside torch's states: the next step must draw (augmentation, mixup) what it would draw without.
            kept_host_state(),
            self._nothing_changed(frozen=read is not None),
            self._traceless(grad=True),
            self._metrics,
            context,
        ):
            scored = self._scored(batch, batch_idx, batch_size, trace, read=read)
        if trace is not None:
            search.end_trace(trace)
        search.batch = None
        return scored

    def _list_modules(self) -> None:
        # Not in every batch: a walk of the modules takes as long as a small forward.
        self._modules = [(f"{name}." if name else "", each) for name, each in self._module.named_modules()]
        self._traceless = TracelessForward(self._module)

    def _scored(
        self, batch: Any, batch_idx: int, size: int, trace: SampleTrace | None, *, read: Taps | None
    ) -> Scored | None:
        losses = StepLosses(self._module)
        taps = self._taps
        with ExitStack() as stack:
            if read is not None:
                stack.enter_context(read.reading())
            elif taps is not None and trace is not None:
                stack.enter_context(taps.finding())
            if trace is not None:
                stack.enter_context(trace)
            if self._gating.labels_wanted or self._needs_losses:
                stack.enter_context(losses)
            loss = self._loss_of(batch, batch_idx, lambda loss, number: self._passes(loss, number, size, trace))
        if loss is None:
            return None
        norms = self._norms(loss, size, trace) if read is None else read.norms(loss, size)
        if norms is None and read is not None:  # the step took another way than in the first pass
            self._taps = None
            return self._scored(batch, batch_idx, size, trace, read=None)
        if norms is None:
            return None
        record = losses.combined(loss, size) if self._needs_losses else None
        return Scored(norms, losses.labels(size), record)

    def _norms(self, loss: Tensor, size: int, trace: SampleTrace | None) -> Tensor | None:
        if loss.grad_fn is None:
            return None
        found = self._proved  # where a step runs its own backward, asking whether to skip it has proved the loss
        self._proved = None
        if found is None:
            found = self._search.find(loss, size) if trace is None else self._search.prove(loss, size, trace)
        # The gradient at a nested entry holds what came through another one: its rows would be counted twice.
        entries: list[Entry] = [entry for entry in found.entries if not entry.nested]
        if not entries:
            return None
        if trace is not None and self._taps is not None:
            self._taps.settle(entries, size, trace)
        edges = [GradientEdge(entry.node, entry.output_nr) for entry in entries]
        return norms_at(loss, edges, [entry.place for entry in entries], weight=size)

    def _passes(self, loss: Tensor, number: int, size: int, trace: SampleTrace | None) -> bool:
        """Tell whether to skip a backward of a step that runs its own: its loss does not depend on the batch."""
        # The generator's loss of a GAN is such a one: what it is computed from is drawn, not loaded.
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

    def _stubs(self) -> Iterator[tuple[Any, str, Callable[..., None]]]:
        """Yield what a step may call that would log or train, and what takes its place."""
        yield self._module, "log", _nothing
        yield self._module, "log_dict", _nothing
        yield self._module, "manual_backward", _stop
        if self._module.automatic_optimization:
            return
        trainer = self._module.trainer
        # A step has either form in its hands: `self.optimizers()` gives LightningOptimizers, which wrap torch's.
        for optimizer in (*wrapped_optimizers(trainer), *trainer.optimizers):
            yield optimizer, "step", _nothing
            yield optimizer, "zero_grad", _nothing
        for config in trainer.lr_scheduler_configs:
            yield config.scheduler, "step", _nothing
        yield self._module, "clip_gradients", _nothing

    @contextmanager
    def _nothing_changed(self, *, frozen: bool) -> Iterator[None]:
        """Let ``self.log`` do nothing, and restore afterwards what requires a gradient, which ``frozen`` takes away."""
        flags = [
            (name + leaf, parameter, parameter.requires_grad, parameter._version)
            for name, module in self._modules
            for leaf, parameter in module.named_parameters(recurse=False)
        ]
        with ExitStack() as undo:
            undo.callback(_require_gradients, flags)
            for _, parameter, _, _ in flags if frozen else ():
                parameter.requires_grad_(False)
            for owner, name, stub in self._stubs():
                undo.callback(put_on(owner, name, stub))
            yield
        # torch counts every change in place. What a first run changes, the second one, which trains, starts from.
        changed = [name for name, parameter, _, version in flags if parameter._version != version]
        if changed:
            raise LossCaptureError(
                f"what stands before the loss in training_step changes parameters ({', '.join(changed[:3])}), and "
                "mode='subset' runs it twice. Move it to on_train_batch_end, or use mode='partial'."
            )


class _BackwardReached(Exception):  # noqa: N818 - it is caught, and no error
    """A step that runs its own backward came to the first one."""


class _StopAtBackward(TorchFunctionMode):
    """Stops a step at its first backward that does not pass, and keeps the loss; none is computed."""

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


def _require_gradients(flags: list[tuple[str, Tensor, bool, int]]) -> None:
    for _, parameter, flag, _ in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


# `manual_backward` would run Lightning's hooks and the precision's scaling: what stops at `Tensor.backward` is enough.
def _stop(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]


def _nothing(*_: Any, **__: Any) -> None:
    return None
