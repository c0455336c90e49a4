"""A callback that runs the script's steps inside an ordinary fit, and takes their times."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import LBFGS, Optimizer

from lightning_ast.advice.loading import ENDLESS, CachedBatches, Clock
from lightning_ast.advice.measured import Phases
from lightning_ast.advice.script import Block, Sample, Timing
from lightning_ast.callbacks.sparse_selection import SparseSelectionCallback
from lightning_ast.core.controller import PIController
from lightning_ast.lightning_internals.fit_loop import count_batches_anew, lift_step_limit
from lightning_ast.mode_facts import Mode
from lightning_ast.selection.fit_parts import Watcher
from lightning_ast.selection.modes.subset import SubsetMode
from lightning_ast.selection.session import Session
from lightning_ast.selection.step_state import StepState

__all__ = ["Enough", "Probe", "SavedBytes", "ScoreWatcher", "static_bytes", "synchronizer"]

_FROZEN = 1e-6  # of a learning rate: nothing diverges on a few batches, but the optimizer does its work
_PHASES = ("gap", "forward", "backward", "rest")


class Enough(Exception):  # noqa: N818
    """The end of a fit or a validation from within: nothing went wrong."""


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return what waits until the device has done what it was given; the CPU always has."""
    return (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize


class SavedBytes:
    """A count of what autograd saves for the backward in the first call of a module's training step."""

    def __init__(self, module: pl.LightningModule) -> None:
        # bytes of distinct storages, without parameters; None before that call, and where torch refuses the hooks
        self.total: int | None = None
        self._wanted = True
        saved: dict[int, int] = {}
        step = module.training_step

        def pack(tensor: Tensor) -> Tensor:
            place, size = _storage(tensor)
            saved[place] = size
            return tensor

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self._wanted:
                return step(*args, **kwargs)
            self._wanted = False
            try:
                with saved_tensors_hooks(pack, lambda tensor: tensor):
                    output = step(*args, **kwargs)
                own = {_storage(p)[0] for p in module.parameters()}  # now, where lazy ones have been made
                self.total = sum(size for place, size in saved.items() if place not in own)
            except Exception:  # torch.func's transforms refuse such hooks; a step that fails by itself fails again
                return step(*args, **kwargs)
            return output

        # it stays there: taken away, it would take the wrapper of `subset` with it, which lies around it
        module.__dict__["training_step"] = counted


def _storage(tensor: Tensor) -> tuple[int, int]:
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none
        return id(tensor), tensor.numel() * tensor.element_size()
    except ValueError:  # a lazy parameter that no call has made yet
        return id(tensor), 0


def static_bytes(module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> int:
    """Count the bytes of parameters, gradients and optimizer state."""
    parameters = sum(p.numel() * p.element_size() * (1 + p.requires_grad) for p in module.parameters())
    states = [v for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, Tensor)]
    return parameters + sum(v.numel() * v.element_size() for v in states)


class ScoreWatcher(Watcher):
    """A collection of the significance of the probed samples, those of each batch once."""

    def __init__(self, position: Callable[[], int]) -> None:
        self._position = position  # returns which of the batches that are trained on in turns was given last
        self.scores: dict[int, Tensor] = {}  # (B,) by the number of the batch, NaN where a sample is not finite

    def finish_batch(self, step: StepState) -> None:
        """Keep the scores of a batch that has none yet."""
        position = self._position()
        if step.significance is None or position in self.scores:
            return
        # no .cpu() here: it would wait for the device within a step that is being timed
        scores = step.significance.detach().float()
        if step.bad is not None:
            scores = scores.masked_fill(step.bad.to(scores.device), torch.nan)
        self.scores[position] = scores


class Probe(Callback):
    """A runner of blocks of plain and of sparse steps in turns; it ends the fit with :class:`Enough`."""

    cache: CachedBatches  # that the fit loop trains on, known when the loaders are set up

    def __init__(
        self,
        selections: dict[Mode, SparseSelectionCallback],
        *,
        begin: Callable[[pl.Trainer], Generator[Block, Timing, int]],
        clock: Clock,
    ) -> None:
        super().__init__()
        self.active: Mode | None = None  # whose step or set-up runs: an exception is its fault
        self.samples: list[Sample] = []
        self.cycles = 0
        self.watcher = ScoreWatcher(lambda: self.cache.last)
        self.selections = selections
        self._begin = begin  # called when all is set up; returns the script
        self._clock = clock
        self._controllers: dict[tuple[Mode, float], PIController] = {}
        self._block = Block()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set every selection up; none has its wrapper on the module yet."""
        for mode, selection in self.selections.items():
            self.active = mode
            selection.setup(trainer, pl_module, stage)
            assert selection.session is not None
            # The modes share one module here, and each is probed alone: only the one whose turn it is wraps the step.
            _wrap(selection.session, on=False)
            selection.session.watchers.append(self.watcher)
        self.active = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the fit go on for as long as is wanted, without validation, and begin."""
        self._device = trainer.strategy.root_device
        self._wait = synchronizer(self._device)
        self._script = self._begin(trainer)  # it reads the limits of the run, which are lifted next
        trainer.limit_val_batches = 0
        lift_step_limit(trainer.fit_loop)
        if pl_module.automatic_optimization:
            for schedule in trainer.lr_scheduler_configs:
                schedule.frequency = ENDLESS  # it stays in its place, where callbacks and modules ask it
        for optimizer in trainer.optimizers:
            # with steps so small LBFGS would end its inner iterations early, and look cheaper than it is
            for group in [] if isinstance(optimizer, LBFGS) else optimizer.param_groups:
                group["lr"] = group["lr"] * _FROZEN
        for mode, selection in self.selections.items():
            self.active = mode
            selection.on_train_start(trainer, pl_module)
        self.active = None
        self._start(next(self._script))

    def _start(self, block: Block) -> None:
        self._block = block
        self._left = block.steps
        self._rates: list[float] = []
        self._spent: defaultdict[str, float] = defaultdict(float)
        self.active = block.mode
        if (selection := self._selected()) is not None:
            assert selection.session is not None
            selector = selection.session.selector
            selector.target_activation_rate = block.target
            # each mode and rate has its own controller: one that has settled at another rate would need many steps
            selector.controller = self._controllers.setdefault((selection.mode, block.target), PIController())
            selection.session.interrupt()
            _wrap(selection.session, on=True)
        self._books = self._backwarded()
        self._dense_ops = self._dense_ops_so_far()
        self.cache.position = block.cycle
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._fetched = self._fetched_before = self.cache.seconds
        self._began = self._ended = self._now(wait=True)

    def _finish(self) -> Timing:
        steps = self._block.steps
        selection = self._selected()
        seconds = self._now(wait=True) - self._began - (self.cache.seconds - self._fetched_before)
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        if selection is not None and selection.session is not None:
            _wrap(selection.session, on=False)
        return Timing(
            seconds=seconds / steps,
            rate=sum(self._rates) / steps,
            phases=Phases(*(self._spent[name] / steps for name in _PHASES)) if "backward" in self._spent else None,
            scoring_seconds=self._spent["scoring"] / steps,
            peak_bytes=peak,
            dense_share=self._dense_share(),
            dense_ops=self._dense_ops_so_far() - self._dense_ops,
        )

    def _dense_ops_so_far(self) -> Counter[str]:
        selection = self._selected()
        return Counter[str]() if selection is None else selection.dense_ops.copy()

    def _backwarded(self) -> tuple[float, int, int]:
        """Read the books of the active selection: backwards so far, samples selected, and offered."""
        selection = self._selected()
        totals = None if selection is None else selection.ledger.stages.get("sparse")
        return (0, 0, 0) if totals is None else (totals.backwarded, totals.selected, totals.offered)

    def _dense_share(self) -> float | None:
        """Return the share of the backward's FLOPs that the block spent on all samples; None where not counted."""
        selection = self._selected()
        if selection is None or selection.mode != "partial" or selection.ledger.flops is None:
            return None
        backwarded, selected, offered = (b - a for a, b in zip(self._books, self._backwarded(), strict=True))
        return (backwarded - selected) / (offered - selected) if offered > selected else 0.0

    def _selected(self) -> SparseSelectionCallback | None:
        return None if self.active is None else self.selections[self.active]

    def _now(self, *, wait: bool = False) -> float:
        """Read the time; the device is waited for at the ends of a block, and in it where its phases are wanted."""
        if wait or self._block.phases:
            self._wait()
        return self._clock()

    def on_train_epoch_start(self, *hook: Any) -> None:
        """Pass it on."""
        self._pass_on("on_train_epoch_start", *hook)

    def on_train_batch_start(self, *hook: Any) -> None:
        """Score and select, or do nothing."""
        start = self._now()
        fetched = self.cache.seconds
        self._spent["gap"] += start - self._ended - (fetched - self._fetched)
        self._fetched = fetched
        self._pass_on("on_train_batch_start", *hook)
        self._phase = self._now()
        self._spent["scoring"] += self._phase - start

    def on_before_backward(self, *hook: Any) -> None:
        """Mark the end of the forward."""
        now = self._now()
        self._spent["forward"] += now - self._phase
        self._phase = now
        self._pass_on("on_before_backward", *hook)

    def on_after_backward(self, *hook: Any) -> None:
        """Mark the end of the backward."""
        self._pass_on("on_after_backward", *hook)
        now = self._now()
        self._spent["backward"] += now - self._phase
        self._phase = now

    def on_before_optimizer_step(self, *hook: Any) -> None:
        """Pass it on."""
        self._pass_on("on_before_optimizer_step", *hook)

    def on_train_batch_end(self, trainer: pl.Trainer, *hook: Any) -> None:
        """End the step, and perhaps its block."""
        self._pass_on("on_train_batch_end", trainer, *hook)
        selection = self._selected()
        self._rates.append(1.0 if selection is None else selection.activation_rate or 1.0)
        self._ended = self._now()
        self._spent["rest"] += self._ended - self._phase
        count_batches_anew(trainer.fit_loop, trainer.num_training_batches)  # else the epoch would end
        self._left -= 1
        if self._left == 0:
            timing = self._finish()
            if not self._block.settles:
                self.samples.append((self._block, timing))
            try:
                self._start(self._script.send(timing))
            except StopIteration as end:
                self.cycles = end.value
                raise Enough from None

    def on_exception(self, *hook: Any) -> None:
        """Leave the module as it was."""
        for selection in self.selections.values():
            selection.on_exception(*hook)

    def _pass_on(self, name: str, *hook: Any) -> None:
        if (selection := self._selected()) is not None:
            getattr(selection, name)(*hook)


def _wrap(session: Session, *, on: bool) -> None:
    if isinstance(session.mode, SubsetMode):
        (session.mode.attach if on else session.mode.detach)()
