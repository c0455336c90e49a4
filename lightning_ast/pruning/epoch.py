"""The epoch that mode ``prune`` is in: its stage, its lengths, its plan, and which part of the plan each batch is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.history import EpochPlan
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.mode_facts import PruneSteps
from lightning_ast.pruning.loader import set_states
from lightning_ast.pruning.run_plan import EpochLengths
from lightning_ast.schedule import Stage
from lightning_ast.words import changes, counted

__all__ = ["PlannedBatch", "RunningEpoch", "check_split", "check_steps", "mean_significance"]


@dataclass(frozen=True)
class PlannedBatch:
    """A batch as the plan has it, in the order in which its samples stand in it."""

    indices: Tensor  # (B,) in the dataset
    weights: Tensor | None  # (B,) importance weights, or None where all are 1
    stands_for: int  # samples of a dense epoch

    def repeated(self, size: int) -> PlannedBatch:
        """Give each sample of a ready batch what the plan says of the batch."""
        weights = None if self.weights is None else self.weights.repeat(size)
        return PlannedBatch(self.indices.repeat(size), weights, self.stands_for * size)


@dataclass
class RunningEpoch:
    """An epoch from the start of its loader to its end; its lengths are those in one process."""

    number: int
    stage: Stage
    sparse: bool  # it is pruned; a sparse stage may have epochs that are loaded whole
    lengths: EpochLengths
    plan: EpochPlan | None = None  # until the loader draws its first index
    # (processes, batches) samples in each batch of the plan, where a batch sampler of the user's own made them
    sizes: Tensor | None = None
    resumed_at: int = 0  # batches that were trained on before the run was resumed in this epoch
    batch: int = 0  # the one that comes next
    replays: bool = False  # the plan is a checkpoint's, and must not be drawn anew
    # The states of the sampler's generators after it was asked for one index more than it has, as torch's own
    # BatchSampler asks: some samplers draw once more then, and a plain run would go on from there.
    drained: list[Tensor] = field(default_factory=list)

    def share(self, values: Tensor, processes: Processes) -> Tensor:
        """Take this process's part of what the plan holds for all."""
        if self.sizes is None:
            return processes.share(values)
        start = int(self.sizes[: processes.rank].sum())
        return values[start : start + int(self.sizes[processes.rank].sum())]

    def deal(self, processes: Processes, generators: Callable[[], list[Any]]) -> Iterator[list[int]]:
        """Yield this process's batches from the next one on, and put the sampler's generators at its end."""
        assert self.plan is not None
        share = self.share(self.plan.indices, processes)
        drained = False
        for start, stop in pairwise(self.lengths.starts[self.resumed_at :]):
            if stop - start < (self.lengths.batch_size or 0):  # torch's sampler meets its end while it fills this one
                set_states(generators(), self.drained)
                drained = True
            yield share[start:stop].tolist()
        if not drained:
            set_states(generators(), self.drained)

    def next_batch(self, batch_size: int, own: Tensor | None, processes: Processes) -> PlannedBatch:
        """Return the next batch's part of the plan; ``own`` are its dataset indices, where the module can tell."""
        assert self.plan is not None
        start, stop = self.lengths.starts[self.batch : self.batch + 2]
        indices = self.share(self.plan.indices, processes)[start:stop]
        weights = None if self.plan.weights is None else self.share(self.plan.weights, processes)[start:stop]
        order = _order(self.batch, indices, batch_size, own)
        self.batch += 1
        if order is not None:
            indices = indices[order]
            weights = None if weights is None else weights[order]
        return PlannedBatch(indices, weights, self.stands_for(start, stop))

    def stands_for(self, start: int, stop: int) -> int:
        """Count the samples of a dense epoch that these samples of the plan stand for."""
        assert self.plan is not None
        # differences of rounded sums, so that the batches of an epoch add up to exactly the samples offered
        scale = self.plan.offered / self.plan.indices.numel() if self.sparse else 1.0
        return round(stop * scale) - round(start * scale)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and the lengths as primitives and tensors."""
        return {
            "plan": None if self.plan is None else self.plan.state_dict(),
            "stage": self.stage,
            "sparse": int(self.sparse),
            "lengths": [self.lengths.samples, self.lengths.batches],
            "spread": int(self.lengths.batch_size is None),
            "drained": self.drained,
            "sizes": self.sizes,
        }

    @classmethod
    def resumed(cls, state: dict[str, Any], batches_done: int, *, rank: int) -> RunningEpoch:
        """Make the rest of the epoch that a state was made from, with the stage and lengths that it began with."""
        plan = EpochPlan.from_state_dict(state["plan"])
        size = None if state.get("spread") else state["split"]["batch_size"]
        samples, batches = state["lengths"]
        lengths = EpochLengths(samples, batches, size, bool(state["split"]["drop_last"]))
        sizes = state.get("sizes")
        if sizes is not None:
            lengths = EpochLengths.of_batches(sizes[rank].tolist())
        epoch = cls(plan.epoch, state["stage"], bool(state["sparse"]), lengths, plan, sizes, drained=state["drained"])
        epoch.resumed_at = epoch.batch = batches_done
        epoch.replays = True
        return epoch


def check_split(saved: dict[str, Any], now: dict[str, Any] | None) -> None:
    """Refuse to deal the rest of a plan out in another way than its beginning."""
    # A checkpoint without the entry is of a release that knew no filter.
    if changed := changes({"sample_filter": 0, "own_parts": 0, **saved}, now or {}):
        raise ConfigurationError(
            f"this checkpoint was written in the middle of an epoch: {', '.join(changed)}. The rest of the "
            "epoch's plan cannot be dealt out anew: use the same settings, or a checkpoint from an epoch's end."
        )


def check_steps(saved: PruneSteps, now: PruneSteps) -> None:
    """Refuse to go on with schedules that a checkpoint has brought back, and that count steps in another way."""
    if (saved == "replan") != (now == "replan"):
        raise ConfigurationError(
            f"the learning-rate scheduler of this checkpoint counts the steps of prune_steps={saved!r}, and "
            f"prune_steps={now!r} takes another number of them. Use prune_steps={saved!r} ('keep' and 'follow' with "
            "target_coverage), or load the weights into a new run."
        )


def _order(number: int, drawn: Tensor, batch_size: int, own: Tensor | None) -> Tensor | None:
    """Find where each sample stands in the batch's part of the plan: a permutation ``(B,)``, or None for the plan's."""
    if batch_size != len(drawn):
        raise ConfigurationError(
            f"batch {number} holds {counted(batch_size, 'sample')} where {len(drawn)} were drawn for it: use a "
            "collate_fn that neither drops nor adds samples (filter the dataset instead); where the first dimension "
            "does not count samples, override SparseLossMixin.count_samples; or use mode='partial'."
        )
    if own is None:
        return None
    drawn, there = drawn.sort(stable=True)
    own, here = own.detach().cpu().long().sort(stable=True)
    if not torch.equal(drawn, own):
        raise ConfigurationError(
            f"sample_indices of batch {number} are not those of the samples that were drawn for it: return each "
            "sample's index in the dataset, shape (B,), and load what the sampler draws."
        )
    # Both sorted alike, the k-th smallest of the batch is the k-th smallest of the plan, repeated indices included.
    return torch.empty_like(there).index_copy_(0, here, there)


def mean_significance(significance: Tensor) -> Tensor:
    """Return the significance ``(1,)`` of a ready batch: the mean of its samples that are finite, else infinity."""
    finite = significance.isfinite()
    mean = significance.where(finite, 0).sum() / finite.sum().clamp(min=1)
    return mean.where(finite.any(), torch.inf).view(1)
