"""Mode ``prune`` over several loaders at once: each is pruned by what is remembered of its own samples."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_ast.core.batch.containers import children_of
from lightning_ast.core.batch.samples import batch_size_of
from lightning_ast.core.history import EpochPlan
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.fit_loop import loaders
from lightning_ast.lightning_internals.leading import same_mode
from lightning_ast.pruning.epoch import PlannedBatch
from lightning_ast.pruning.epochs import PrunedEpochs
from lightning_ast.pruning.loader import LoaderFacts, draw, faults_of_loader, loader_generators
from lightning_ast.pruning.run_plan import size_faults

__all__ = ["SeveralEpochs"]


class SeveralEpochs(PrunedEpochs):
    """Epochs of one loader, or of several that each give a full batch to every step.

    With several, the samples of all are numbered in one row, so that there is one memory and one plan; a batch of the
    plan holds the samples of the first loader, then those of the second, and so on.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._facts: list[LoaderFacts] = []  # of each loader
        self._starts: list[int] = []  # where the numbers of each loader's samples begin, and those of the last end
        self._plans: dict[int, EpochPlan] = {}  # the running epoch's plan of each loader that has started

    def _faults_of(self, combined: CombinedLoader) -> list[str]:
        if len(combined.flattened) == 1:
            return super()._faults_of(combined)
        count = self._processes.count
        found = [fault for loader in combined.flattened for fault in faults_of_loader(loader, processes=count)]
        return found or self._several_faults(combined)

    def _several_faults(self, combined: CombinedLoader) -> list[str]:
        """Find why loaders that can be pruned one by one cannot be together."""
        given = [LoaderFacts.of_loader(loader) for loader in combined.flattened]
        batches = {facts.batches for facts in given}
        sizes = [facts.batch_size for facts in given]
        mode = same_mode(combined)
        children = children_of(combined.iterables) or []
        asked = self._planner.samples
        named = any(value is not None for value in (asked.initial_scores, asked.always, asked.never))
        needs = [
            (
                mode == "min_size" or (mode == "max_size_cycle" and len(batches) == 1),
                f"as many batches of each, not {mode!r}: use CombinedLoader(loaders, 'min_size')",
            ),
            (len(children) == len(given), "them in a flat list or dict, not nested"),
            (
                all(facts.draws >= min(batches) * facts.batch_size for facts in given),
                "full batches, whose samples all weigh alike: set drop_last=True",
            ),
            (all(facts.batching == "plain" for facts in given), "batch_size in each, and no batch sampler"),
            (
                min(sizes) > len(sizes) and len(set(sizes)) == len(sizes),
                "another batch_size in each, above their number (such as 32 and 31), to tell whose samples are in the "
                f"rows of a tensor; got {', '.join(map(str, sizes))}",
            ),
            (
                not (named or asked.keep_scores or asked.class_floor),
                "settings without always, never, class_floor, initial_scores and keep_scores: no dataset index names "
                "one sample",
            ),
            (
                self._planner.steps != "keep" and self._planner.counts_alike,
                "batches that keep their sizes and count each sample alike: use target_activation_rate, "
                "prune_steps='replan' or 'follow', and no weighting",
            ),
        ]
        return [f"mode='prune' with several dataloaders needs {need}." for holds, need in needs if not holds]

    def _facts_of(self, combined: CombinedLoader) -> LoaderFacts:
        self._facts = [LoaderFacts.of_loader(loader) for loader in combined.flattened]
        self.sizes = tuple(facts.batch_size for facts in self._facts) if len(self._facts) > 1 else ()
        if not self.sizes:
            return super()._facts_of(combined)
        limits = combined.limits or [torch.inf]
        self._starts = [0, *accumulate(facts.dataset_size for facts in self._facts)]
        batches = int(min(*limits, *(facts.batches for facts in self._facts)))
        size = sum(self.sizes)
        return LoaderFacts(self._starts[-1], batches * size, size, drop_last=True, batches=batches)

    def sizes_of(self, batch: Any) -> tuple[int, ...]:
        """Return the number of samples that each of several loaders puts into a batch; nothing for one loader."""
        if self.sizes:
            found = tuple(batch_size_of(part) for part in children_of(batch) or ())
            if found != self.sizes:
                raise ConfigurationError(
                    f"batch {self.epoch.batch} holds {found} samples of the dataloaders where {self.sizes} were drawn "
                    "for it: use a collate_fn that neither drops nor adds samples."
                )
        return self.sizes

    def next_batch(self, batch_size: int, own: Tensor | None) -> PlannedBatch:
        """Return the next batch's part of the plan; with several loaders it is in the order of the draws."""
        if self.sizes and own is not None:
            raise ConfigurationError(
                "mode='prune' with several dataloaders knows the samples of a batch by the order of the draws: return "
                "None from sample_indices, and keep the order in the collate_fn."
            )
        return super().next_batch(batch_size, own)

    def _batches(self, number: int, sampler: Any, started: Iterator[Any] | None) -> Iterator[list[int]]:
        if not self.sizes or self._resumes:
            yield from super()._batches(number, sampler, started)
            return
        epoch = self.epoch
        if number == 0:
            self._plans = {}
            if not epoch.replays:
                epoch.plan = None
        if epoch.plan is None:
            self._plans[number] = self._plan_of(number, sampler, started)
            self._assemble()
            own = self._plans[number].indices
        else:  # a checkpoint's
            first = sum(self.sizes[:number])
            own = self._arranged(epoch.plan.indices).narrow(1, first, self.sizes[number]).flatten()
            own = own - self._starts[number]
        if number == len(self.sizes) - 1:
            epoch.replays = False
        yield from self._processes.share(own).view(-1, self.sizes[number])[epoch.resumed_at :].tolist()

    def _plan_of(self, number: int, sampler: Any, started: Iterator[Any] | None) -> EpochPlan:
        """Plan an epoch of one loader, by what is remembered of its own samples."""
        loader = loaders(self._trainer.fit_loop)[number]
        facts = self._facts[number]
        if faults := size_faults(facts.dataset_size, len(loader.dataset)):
            raise ConfigurationError(faults)
        drawn, _, _ = draw(sampler, facts, loader_generators(loader), started=started)
        size = self.sizes[number]
        offered = self._processes.interleaved(drawn[: self.run.dense.batches * size])
        count = self.epoch.lengths.batches * size * self._processes.count
        return self._planner.plan_part(self.epoch, offered, range(*self._starts[number : number + 2]), count=count)

    def _arranged(self, values: Tensor) -> Tensor:
        """View what a plan holds as ``(batches, samples of a batch, processes)``."""
        return values.view(self.epoch.lengths.batches, -1, self._processes.count)

    def _assemble(self) -> None:
        """Make one plan of those of all loaders, batch by batch, once all have started."""
        if len(self._plans) < len(self.sizes):
            return
        parts = [self._plans[number] for number in range(len(self.sizes))]
        numbered = [self._arranged(part.indices + self._starts[k]) for k, part in enumerate(parts)]
        indices = torch.cat(numbered, dim=1).flatten()
        self.epoch.plan = EpochPlan(self.epoch.number, indices, sum(part.offered for part in parts))
