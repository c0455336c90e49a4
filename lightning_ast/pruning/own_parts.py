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
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.pruning.loader import LoaderFacts

__all__ = ["OwnParts", "part_in", "sharing_faults"]

_OF_PART = ("history", "samples", "plan", "lengths", "drained", "sizes", "generators", "trained")
"""The fields of the epochs' state that differ from part to part."""


class OwnParts:
    """The processes of a run, each with a part of the data set; every method is called by all of them."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._has_warned = False

    def all_faults(self, faults: list[str]) -> list[str]:
        """Return the faults that any process has found, so that none waits for one that has given up."""
        return list(dict.fromkeys(fault for found in self.processes.gathered(faults) for fault in found))

    def agree(self, own: LoaderFacts) -> LoaderFacts:
        """Return the lengths of an epoch that all processes keep: those of the smallest part."""
        everyone = self.processes.gathered(own)
        kinds = {(facts.batch_size, facts.drop_last, facts.batching) for facts in everyone}
        if len(kinds) > 1:
            sizes = [facts.batch_size for facts in everyone]
            raise ConfigurationError(
                [
                    "own_parts=True needs loaders of one kind in all processes, with the same batch_size and "
                    f"drop_last; got batch_size {sizes} and drop_last {[f.drop_last for f in everyone]}, by rank."
                ]
            )
        agreed = replace(own, draws=min(f.draws for f in everyone), batches=min(f.batches for f in everyone))
        offered = [facts.offered for facts in everyone]
        if min(offered) < max(offered) and not self._has_warned:
            self._has_warned = True
            shown = f"{offered}, by rank" if len(offered) <= 8 else f"{min(offered)} to {max(offered)}"
            rank_zero_warn(
                f"lightning-ast: the parts of the processes offer different numbers of samples ({shown}). Every "
                f"process trains on as many an epoch as the smallest part has, {agreed.offered} in a dense one."
            )
        return agreed

    def any(self, value: bool) -> bool:
        """Tell whether a value is true in any process."""
        return bool(self.processes.maximum(torch.tensor(float(value))) > 0)

    def most(self, count: int) -> int:
        """Return the largest of a count over the processes."""
        return int(self.processes.maximum(torch.tensor(count)))

    def total(self, values: Tensor) -> Tensor:
        """Return the element-wise sum over the processes."""
        return self.processes.total(values)

    def state_dict(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds beside the state of rank 0: in rank 0 every part, in others only their own."""
        if self.processes.failing:  # the others may never come to the exchange
            return {}
        part = {name: own[name] for name in _OF_PART if name in own}
        return {"parts": self.processes.collected(part)}


def part_in(state: dict[str, Any], own_parts: OwnParts | None) -> dict[str, Any]:
    """Return a process's own state of the epochs; where parts were divided in another way, nothing of the samples."""
    epochs: dict[str, Any] = state["epochs"]
    held = len(state.get("parts", ()))
    now = 0 if own_parts is None else own_parts.processes.count
    if epochs["split"] is not None:
        epochs = {**epochs, "split": {**epochs["split"], "own_parts": held}}
    if held != now:
        rank_zero_warn(
            f"lightning-ast: this checkpoint holds the samples of {held or 'no'} process(es) with parts of their own, "
            f"and the run has {now or 'none'}: what was remembered of the samples is forgotten."
        )
        return {**epochs, "history": None, "samples": None, "generators": []}
    if own_parts is None:
        return epochs
    part: dict[str, Any] = state["parts"][own_parts.processes.rank]
    return {**epochs, **part}


def sharing_faults(loaders: Iterable[Any]) -> list[str]:
    """Find samplers that deal the samples of one data set out to all processes."""
    for loader in loaders:
        if isinstance(loader, DataLoader):
            samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
            dealing = [s for s in samplers if isinstance(s, DistributedSampler) and getattr(s, "num_replicas", 2) > 1]
            if dealing:
                return [
                    "own_parts=True takes what the loader of each process has for a part of its own, and a "
                    f"{type(dealing[0]).__name__} deals the samples of one data set out to all processes: set "
                    "Trainer(use_distributed_sampler=False) and give the loader of each process a dataset of its part "
                    "alone, such as a Subset; or leave out own_parts."
                ]
    return []
