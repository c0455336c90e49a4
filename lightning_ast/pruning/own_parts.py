"""Mode ``prune`` where each process loads a part of the data that is its own: what the processes still agree on.

Nothing of a sample is exchanged. The processes agree on the length of an epoch, because DDP needs as many steps of
each, and for a coverage on the rate. History, plan and memory of a process are of its part alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.pruning.loader import LoaderFacts

__all__ = ["DataParts", "sharing_faults"]

_OF_PART = ("history", "samples", "plan", "lengths", "drained", "sizes", "generators", "trained")
"""The fields of the epochs' state that differ from part to part."""


class DataParts:
    """How the processes of a run divide the data: all of them share one data set, or each has a part of its own.

    Every method is called by all of them. Where they share one data set they know the same, and exchange nothing here.
    """

    def __init__(self, processes: Processes, *, own: bool) -> None:
        self.are_own = own and processes.count > 1
        self.everyone = processes
        self.sharing = processes.alone() if self.are_own else processes  # a data set and its plan
        self.owners = processes if self.are_own else processes.alone()  # of a part
        self._has_warned = False

    @property
    def count(self) -> int:
        """Count the parts; 0 where all share one data set."""
        return self.owners.count if self.are_own else 0

    def all_faults(self, faults: list[str]) -> list[str]:
        """Return the faults that any process has found, so that none waits for one that has given up.

        Those that not all have found name their process.
        """
        everyone = self.owners.gathered(faults)
        named: dict[str, None] = {}
        for rank, found in enumerate(everyone):
            for fault in found:
                is_common = all(fault in others for others in everyone)
                named[fault if is_common else f"process {rank}, in its part: {fault}"] = None
        return list(named)

    def agree(self, own: LoaderFacts) -> LoaderFacts:
        """Return the lengths of an epoch that all processes keep: those of the smallest part."""
        everyone = self.owners.gathered(own)
        kinds = {(facts.batch_size, facts.drop_last, facts.batching) for facts in everyone}
        if len(kinds) > 1:
            sizes = [facts.batch_size for facts in everyone]
            raise ConfigurationError(
                "own_parts=True needs loaders of one kind in all processes, with the same batch_size and "
                f"drop_last; got batch_size {sizes} and drop_last {[f.drop_last for f in everyone]}, by rank."
            )
        agreed = replace(own, draws=min(f.draws for f in everyone), batches=min(f.batches for f in everyone))
        offered = [facts.offered for facts in everyone]
        if min(offered) < max(offered) and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"lightning-ast: the parts of the processes offer {min(offered)} to {max(offered)} samples. Every "
                f"process trains on as many an epoch as the smallest part has, {agreed.offered} in a dense one."
            )
        return agreed

    def any(self, value: bool) -> bool:
        """Tell whether a value is true in any process."""
        return bool(self.owners.maximum(torch.tensor(float(value))) > 0)

    def most(self, count: int) -> int:
        """Return the largest of a count over the processes."""
        return int(self.owners.maximum(torch.tensor(count)))

    def state_dict(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds beside the state of rank 0: in rank 0 every part, in others only their own."""
        if not self.are_own or self.everyone.failing:  # the others may never come to the exchange
            return {}
        part = {name: own[name] for name in _OF_PART if name in own}
        return {"parts": self.everyone.collected(part)}

    def part_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return this process's state of the epochs; where parts were divided differently, nothing of the samples."""
        epochs: dict[str, Any] = state["epochs"]
        held = len(state.get("parts", ()))
        if epochs["split"] is not None:
            epochs = {**epochs, "split": {**epochs["split"], "own_parts": held}}
        if held != self.count:
            rank_zero_warn(
                f"lightning-ast: this checkpoint holds the samples of {held or 'no'} process(es) with parts of their "
                f"own, and the run has {self.count or 'none'}: what was remembered of the samples is forgotten."
            )
            return {**epochs, "history": None, "samples": None, "generators": []}
        return {**epochs, **state["parts"][self.everyone.rank]} if held else epochs


def sharing_faults(loaders: Iterable[Any]) -> list[str]:
    """Find samplers that deal the samples of one data set out to all processes."""
    for loader in loaders:
        if isinstance(loader, DataLoader):
            samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
            dealing = [s for s in samplers if isinstance(s, DistributedSampler) and getattr(s, "num_replicas", 2) > 1]
            if dealing:
                return [
                    "own_parts=True needs a dataset of its part alone in each process, and a "
                    f"{type(dealing[0]).__name__} deals one data set out to all: set "
                    "Trainer(use_distributed_sampler=False) and load a Subset, or leave out own_parts."
                ]
    return []
