"""The measurement from end to end: load, train in turns, validate, all on stand-ins for what the user has."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ast.advice.loading import CachedBatches, Clock, read
from lightning_ast.advice.measured import Facts, MemoryEstimate, StepFacts, ValidationFacts
from lightning_ast.advice.predict import COVERAGES, RATES, coverage_facts, wanted_rates
from lightning_ast.advice.probe import Enough, Probe, SavedBytes, static_bytes, synchronizer
from lightning_ast.advice.runs import Asked, due_validations, prune_fault, run_facts, trainer_faults
from lightning_ast.advice.script import Block, Timing, script, summarize
from lightning_ast.advice.twin import make_twin, out_of_sight
from lightning_ast.core.batch.samples import batch_size_of
from lightning_ast.core.partial.flops import compiled_parts
from lightning_ast.errors import AdviceError, BatchError, ConfigurationError, EntryError
from lightning_ast.lightning_internals.leading import lead, make_iterator
from lightning_ast.lightning_internals.trainer_copy import fresh_loops
from lightning_ast.mixin import SparseLossMixin
from lightning_ast.mode_facts import Mode
from lightning_ast.words import counted

__all__ = ["Measurement"]

_PROBED: tuple[Mode, ...] = ("partial", "subset", "mask")
_LOADING_SHARE = 1 / 6
_VALIDATION_SHARE = 1 / 11


class Measurement:
    """A measurement of what a Trainer would do with a module and data, none of which is changed."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        data: Any,
        val_data: Any,
        *,
        budget_seconds: float,
        clock: Clock = time.perf_counter,
    ) -> None:
        if faults := trainer_faults(trainer):
            raise AdviceError(" ".join(faults))
        self._user = trainer
        self._clock = clock
        self._budget = budget_seconds
        self._began = clock()
        self._asked = Asked.of(trainer)
        self._twin = make_twin(trainer, module, data, val_data)
        self._refused: dict[Mode, str] = {}
        self._notes: list[str] = []
        self._cache: CachedBatches | None = None

    def facts(self) -> Facts:
        """Measure everything."""
        with out_of_sight(self._twin):
            probe, saved = self._train()
            step = self._step_facts(probe, saved)
            own = self._run.own_coverage
            coverages = sorted({*COVERAGES, *([] if own is None else [own])})
            settings = self._asked.selection
            scores = probe.watcher.scores.values()
            coverage = coverage_facts(scores, coverages, settings.gate, trim=settings.trim)
            validation = self._validate() if self._validates else None
        seconds = self._clock() - self._began
        if seconds > 1.1 * self._budget:
            self._notes.append(f"The budget of {self._budget:g} s was exceeded: {seconds:.0f} s, for two rounds.")
        return Facts(
            device=_device(self._twin.trainer.strategy.root_device),
            run=self._run,
            loading=self._loading,
            step=step,
            coverage=coverage,
            validation=validation,
            notes=tuple(self._notes),
            seconds=seconds,
        )

    def _train(self) -> tuple[Probe, SavedBytes]:
        """Probe every mode that can run; one that fails is left out of the next attempt."""
        twin = self._twin
        trainer: Any = twin.trainer
        saved = SavedBytes(twin.module)
        while True:  # each turn refuses at least one mode more, or ends
            modes = self._probed
            probe = Probe({mode: self._asked.probe(mode) for mode in modes}, begin=self._begin, clock=self._clock)
            trainer.callbacks = [probe]
            trainer.limit_val_batches = self._user.limit_val_batches
            fresh_loops(trainer, self._user)
            lead(trainer.fit_loop, load=functools.partial(self._load, probe), begin=lambda epoch: None)
            try:
                trainer.fit(twin.module, **twin.data)
                raise AdviceError("training ends before its first batch: give the Trainer batches and epochs to train.")
            except Enough:
                return probe, saved
            except (AdviceError, KeyboardInterrupt):
                raise
            except Exception as error:
                if probe.active is None:
                    # no mode is at fault, so that leaving one out would not help
                    raise AdviceError(
                        f"a plain training step fails: {type(error).__name__}: {error}. (The Trainer's callbacks and "
                        "loggers are not there during the measurement: stand-ins take what is logged.)"
                    ) from error
                # entries are found alike in all modes
                failed = modes if isinstance(error, EntryError) else [probe.active]
                self._refused |= dict.fromkeys(failed, _reason(error))

    @property
    def _probed(self) -> list[Mode]:
        return [mode for mode in _PROBED if mode not in self._refused]

    def _load(self, probe: Probe, combined: CombinedLoader) -> CombinedLoader:
        """Time the loader, once, and hand the fit loop what was kept of it."""
        if self._cache is None:
            seconds = self._budget * _LOADING_SHARE
            self._loading, kept = read(combined, seconds=seconds, clock=self._clock, count=self._count)
            self._batch_size = self._count(kept[0])
            copies = self._twin.trainer.strategy.root_device.type == "cpu"  # elsewhere the transfer makes a copy
            self._cache = CachedBatches(kept, clock=self._clock, copies=copies)
        self._combined = combined
        probe.cache = self._cache
        make_iterator(combined)  # Lightning asks the user's loader for the length of an epoch
        return CombinedLoader(self._cache, "max_size_cycle")

    def _count(self, batch: Any) -> int:
        module = self._twin.module
        try:
            return int(module.count_samples(batch) if isinstance(module, SparseLossMixin) else batch_size_of(batch))
        except BatchError:  # partial and subset will refuse it, each in its words
            return 1

    def _begin(self, trainer: pl.Trainer) -> Generator[Block, Timing, int]:
        """Look at the training that starts, with everything set up, and return the script."""
        module = self._twin.module
        size = self._batch_size
        self._run, self._notes = run_facts(trainer, self._combined, self._asked, batch_size=size, limits=self._user)
        if done := self._user.current_epoch:
            self._notes.append(
                f"The Trainer has trained {counted(done, 'epoch')}: what follows is a run from the start."
            )
        self._batchnorm = sum(isinstance(m, _BatchNorm) and m.training for m in module.modules())
        self._compiled = compiled_parts(module)
        self._validates = trainer.enable_validation
        rate = self._run.own_rate or max(RATES)
        if fault := prune_fault(trainer, self._combined, self._asked, self._run, rate=rate):
            self._refused.setdefault("prune", fault)
        reserved = self._budget * _VALIDATION_SHARE if self._validates else 0.0
        return script(
            self._probed,
            batch_size=size,
            wanted=wanted_rates(self._run),
            asynchronous=trainer.strategy.root_device.type != "cpu",
            remaining_seconds=lambda: self._budget - reserved - (self._clock() - self._began),
        )

    def _step_facts(self, probe: Probe, saved: SavedBytes) -> StepFacts:
        if "mask" in self._refused:  # it finds each sample's gradient in the same way
            self._refused.setdefault("prune", self._refused["mask"])
        facts = summarize(probe.samples, self._refused, batch_size=self._batch_size)
        static = static_bytes(self._twin.module, self._twin.trainer.optimizers)
        known = saved.total is not None and not self._compiled and facts.dense.peak_bytes is None
        return replace(
            facts,
            cycles=probe.cycles,
            batchnorm_layers=self._batchnorm,
            batchnorm=self._asked.selection.batchnorm,
            compiled=self._compiled,
            memory=MemoryEstimate(static, saved.total or 0) if known else None,
        )

    def _validate(self) -> ValidationFacts | None:
        twin = self._twin
        timer = _ValidationTimer(self._budget * _VALIDATION_SHARE, self._clock)
        trainer: Any = twin.trainer
        trainer.callbacks = [timer]
        trainer.limit_val_batches = self._user.limit_val_batches
        # fit and validate give the same loaders other names
        data = {name: value for name, value in twin.data.items() if name == "datamodule"}
        if "val_dataloaders" in twin.data:
            data["dataloaders"] = twin.data["val_dataloaders"]
        ended = False
        try:
            trainer.validate(twin.module, verbose=False, **data)
            ended = True
        except Enough:
            pass
        except Exception as error:
            self._notes.append(f"Validation could not be measured, and is left out: {_reason(error)}")
            return None
        batches = max(0, len(timer.ends) - 1) if ended else timer.batches
        if math.isinf(batches):
            self._notes.append("The validation loader has no length, and did not end by itself: it is left out.")
            return None
        if not batches or timer.seconds_per_batch is None:
            return None
        return due_validations(self._user, batches=int(batches), seconds_per_batch=timer.seconds_per_batch)


class _ValidationTimer(Callback):
    """A timer of validation batches that runs for a while."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self._seconds = seconds
        self._clock = clock
        self.ends: list[float] = []
        self.batches = 0.0  # of one validation

    @property
    def seconds_per_batch(self) -> float | None:
        """Return the steady time of a batch, the first left out where three were run; None without any."""
        first = 1 if len(self.ends) > 3 else 0
        steps = len(self.ends) - 1 - first
        return (self.ends[-1] - self.ends[first]) / steps if steps > 0 else None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches = sum(trainer.num_val_batches)
        self._wait = synchronizer(trainer.strategy.root_device)
        self.ends.append(self._clock())

    def on_validation_batch_end(self, *hook: Any) -> None:
        self._wait()
        self.ends.append(self._clock())
        if self.ends[-1] - self.ends[0] >= self._seconds and len(self.ends) > 2:
            raise Enough


def _reason(error: Exception) -> str:
    if isinstance(error, ConfigurationError):
        return error.faults[0]
    lines = str(error).splitlines() or [""]
    known = type(error).__module__.startswith("lightning_ast")
    return lines[0] if known else f"{type(error).__name__}: {lines[0]}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    return f"{device.type.upper()}{threads}"
