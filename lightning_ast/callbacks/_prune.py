"""Mode ``prune`` inside Lightning's fit loop: the plan of each epoch, its lengths, and what a resumed run continues."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info

from lightning_ast.callbacks._faults import ConfigurationError
from lightning_ast.callbacks._fit_loop import (
    announce_batches,
    batches_done,
    begin_new_epoch,
    on_loader_setup,
    restart_loader,
)
from lightning_ast.callbacks._loader import (
    LoaderFacts,
    PrunedSampler,
    draw,
    loader_faults,
    loader_generators,
    pruned_copy,
)
from lightning_ast.callbacks._planned import (
    EpochLengths,
    PlannedRun,
    length_faults,
    planned_run,
    promise_steps,
    size_faults,
)
from lightning_ast.callbacks._processes import Processes
from lightning_ast.callbacks._step import BatchPlan
from lightning_ast.callbacks.two_stage import Stage, TwoStageScheduler
from lightning_ast.core.gate import Selection
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.selector import SampleSelector

__all__ = ["PrunedEpochs"]

_CHUNK = 4096


class PrunedEpochs:
    """Plans epochs, and keeps the loader, Lightning's counters and the checkpoint in step with the plan.

    The plan is drawn when the loader asks for the first index of an epoch: there the user's own sampler would have
    drawn. How many samples it will have is known before, so that lengths and schedules can be.

    Args:
        owner: the selection callback.
        trainer: of this fit.
        selector: gate, weighting, seed and target.
        schedule: warmup and cooldown, or None.
        processes: that train together.
    """

    def __init__(
        self,
        owner: Callback,
        trainer: pl.Trainer,
        selector: SampleSelector,
        schedule: TwoStageScheduler | None,
        processes: Processes,
    ) -> None:
        self._owner = owner
        self._trainer = trainer
        self._selector = selector
        self._schedule = schedule
        self._processes = processes
        self._maximum = processes.maximum if processes.count > 1 else None
        self.history: SignificanceHistory | None = None
        self._facts: LoaderFacts | None = None
        self._plan: EpochPlan | None = None
        self._planned = False
        self._epoch = 0
        self._position = 0
        self._resumes = False
        self._loaded: dict[str, Any] | None = None
        self._undo: list[Callable[[], None]] = []
        self.stage: Stage = "warmup"

    # ------------------------------------------------------------------ the loader

    def attach(self) -> None:
        """From here on, every training loader that Lightning sets up is pruned."""
        self._undo = [
            on_loader_setup(self._trainer.fit_loop, self._install),
            promise_steps(self._trainer, self.planned_steps),
        ]

    def detach(self) -> None:
        """Leave the trainer as it was; the user's loader was never touched. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def ensure_installed(self) -> None:
        """Set the loader up anew where a tuner did so, which takes the callbacks out of the trainer for its trials."""
        loop = self._trainer.fit_loop
        assert loop._combined_loader is not None
        if self._facts is None:
            loop._combined_loader.reset()
            loop._combined_loader = None
            loop.setup_data()

    def _install(self) -> None:
        combined = self._trainer.fit_loop._combined_loader
        assert combined is not None
        if self._owner not in self._trainer.callbacks:  # type: ignore[attr-defined]
            self._facts = None
            return
        faults = loader_faults(combined, processes=self._processes.count)
        if not faults:
            self._facts = LoaderFacts.of(combined)
            remembered = None if self.history is None else len(self.history)
            faults = length_faults(self._run, self._trainer, self._facts, remembered=remembered)
        if faults:
            raise ConfigurationError(faults)
        assert self._facts is not None
        if self.history is None:
            self._load_history()
        combined.flattened = [
            pruned_copy(
                combined.flattened[0],
                lambda sampler: PrunedSampler(
                    sampler, indices=self._indices, length=lambda: self._lengths.samples, begin=self._begin
                ),
            )
        ]
        self._start(self._trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ lengths

    @property
    def _run(self) -> PlannedRun:
        assert self._facts is not None
        return planned_run(
            self._trainer,
            self._facts,
            schedule=self._schedule,
            rate=self._selector.target_activation_rate,
            min_selected=self._selector.min_selected,
            processes=self._processes.count,
        )

    @property
    def sparse(self) -> bool:
        """Whether the running epoch is pruned."""
        return self.stage == "sparse" and self._selector.target_activation_rate < 1

    @property
    def _lengths(self) -> EpochLengths:
        return self._run.sparse if self.sparse else self._run.dense

    def planned_steps(self) -> float:
        """Optimizer steps of the whole run; sets the loader up where that was not done yet."""
        if self._facts is None:
            self._trainer.fit_loop.setup_data()
        return math.inf if self._facts is None else self._run.steps

    # ------------------------------------------------------------------ an epoch

    def _start(self, epoch: int) -> None:
        self._epoch, self._position, self._plan, self._planned = epoch, 0, None, False
        self.stage = self._run.stage(epoch)

    def _begin(self, epoch: int) -> None:
        """Lightning is about to run this epoch; the first one's loader has already started."""
        if self._resumes:
            self._resumes = False
            self._resume(epoch)
        elif epoch != self._epoch:
            self._start(epoch)
            announce_batches(self._trainer, self._lengths.batches)

    def _indices(self, sampler: Any) -> Iterator[int]:
        """The epoch's dataset indices for this process, from the position on."""
        if self._resumes:  # Lightning started the loader before it knew where the run continues
            return
        if not self._planned:
            self._plan = self._make_plan(sampler)
        self._planned = False  # a loader that is started twice draws twice, as without this callback
        assert self._plan is not None
        assert self._facts is not None
        share = self._processes.share(self._plan.indices)[self._position * self._facts.batch_size :]
        for start in range(0, len(share), _CHUNK):
            yield from share[start : start + _CHUNK].tolist()

    def _make_plan(self, sampler: Any) -> EpochPlan:
        assert self.history is not None
        assert self._facts is not None
        combined = self._trainer.fit_loop._combined_loader
        if combined is not None and (faults := size_faults(len(self.history), len(combined.flattened[0].dataset))):
            raise ConfigurationError(faults)
        self.history.fold(self._maximum)
        own = draw(sampler, self._facts)
        draws = self._processes.interleaved(own)
        if not self.sparse:
            return EpochPlan(self._epoch, draws, self._facts.offered * self._processes.count)
        offered = draws[: self._facts.offered * self._processes.count]
        count = self._lengths.samples * self._processes.count
        return plan_epoch(self.history, offered, epoch=self._epoch, count=count, selector=self._selector)

    def batch_plan(self, batch_idx: int, batch_size: int, device: torch.device) -> BatchPlan:
        """What is to be done with a batch of the epoch: train on all of it, and remember what it was worth.

        Args:
            batch_idx: its index in the epoch.
            batch_size: samples that it holds.
            device: of the losses.

        Raises:
            ConfigurationError: it holds another number of samples than were to be loaded.
        """
        assert self._facts is not None
        assert self._plan is not None
        assert self.history is not None
        indices, size = self._processes.share(self._plan.indices), self._facts.batch_size
        start, stop = batch_idx * size, min((batch_idx + 1) * size, len(indices))
        if batch_size != stop - start:
            raise ConfigurationError(
                [
                    f"batch {batch_idx} holds {batch_size} samples where {stop - start} indices were drawn for it: "
                    "mode='prune' cannot tell which samples these are. Use a collate_fn that neither drops nor adds "
                    "samples (filter the dataset instead), or mode='partial'."
                ]
            )
        stands_for = self._facts.offered / len(indices) if self.sparse else 1.0
        plan = BatchPlan(batch_size, sparse=False, stands_for=round(stop * stands_for) - round(start * stands_for))
        plan.observe = functools.partial(self.history.observe, indices[start:stop])
        if self._plan.weights is not None:
            weights = self._processes.share(self._plan.weights)[start:stop].to(device, non_blocking=True)
            plan.sparse, plan.selection = True, Selection(torch.arange(batch_size, device=device), weights)
        return plan

    @property
    def activation_rate(self) -> float:
        """Planned / offered of the running epoch."""
        return self._plan.activation_rate if self._plan is not None and self.sparse else 1.0

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Scores, plan and random state of all processes; every process must ask for it."""
        failing = self._trainer.state.status == TrainerStatus.INTERRUPTED  # a process that failed speaks alone
        return {
            "history": None if self.history is None else self.history.state_dict(None if failing else self._maximum),
            "plan": None if self._plan is None else self._plan.state_dict(),
            "batch_size": None if self._facts is None else self._facts.batch_size,
            "processes": self._processes.count,
            "random": self._processes.random_states(alone=failing),
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept until the loader, the epoch and the position in it are known."""
        self._loaded = state
        if self.history is not None:
            self._load_history()

    def expect_resume(self) -> None:
        """A checkpoint is being loaded: a loader that starts before the epoch is known yields nothing."""
        self._resumes = True

    def _load_history(self) -> None:
        assert self._facts is not None
        self.history = SignificanceHistory(self._facts.dataset_size)
        state = None if self._loaded is None else self._loaded["history"]
        if state is not None:
            try:
                self.history.load_state_dict(state)
            except ValueError as error:
                raise ConfigurationError([str(error)]) from error

    def _generators(self) -> list[torch.Generator]:
        combined = self._trainer.fit_loop._combined_loader
        return [] if combined is None else loader_generators(combined.flattened[0])

    def _resume(self, epoch: int) -> None:
        """Continue in ``epoch``: with the rest of its plan, or with a new one where it has not begun."""
        loop, state = self._trainer.fit_loop, self._loaded
        self._start(epoch)
        self._position = batches_done(loop)
        if state is not None and state["plan"] is not None and state["plan"]["epoch"] == epoch:
            self._check_split(state)
            self._plan, self._planned = EpochPlan.from_state_dict(state["plan"]), True
            rank_zero_info(
                f"lightning-ast: resuming epoch {epoch} behind batch {self._position}, on its planned samples."
            )
            announce_batches(self._trainer, self._lengths.batches)
            restart_loader(loop)
            self._restore_random_state()
            return
        self._restore_random_state()
        begin_new_epoch(loop)
        announce_batches(self._trainer, self._lengths.batches)
        restart_loader(loop)

    def _check_split(self, state: dict[str, Any]) -> None:
        assert self._facts is not None
        now = {"batch_size": self._facts.batch_size, "processes": self._processes.count}
        changed = [f"{name} was {state[name]} and is {value}" for name, value in now.items() if state[name] != value]
        if changed:
            raise ConfigurationError(
                [
                    f"this checkpoint was written in the middle of an epoch: {', '.join(changed)}. The rest of the "
                    "epoch's plan cannot be dealt out anew: use the same settings, or a checkpoint from an epoch's end."
                ]
            )

    def _restore_random_state(self) -> None:
        if self._loaded is not None:
            self._processes.restore_random_states(self._loaded["random"])
            for generator, saved in zip(self._generators(), self._loaded["generators"], strict=False):
                generator.set_state(saved)
