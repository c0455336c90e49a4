"""Before a batch, in a loop without Lightning: a sampler that loads only the samples that an epoch trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightning_ast.core.gate import NEARLY_ALL, GateName
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.plan_rules import planned_count, rate_to_cover
from lightning_ast.core.selector import SampleSelector

__all__ = ["SignificanceSampler"]


class SignificanceSampler(Sampler[int]):
    """Yields the samples of each epoch's plan, as mode ``prune`` does under Lightning's Trainer.

    Pass it to a ``DataLoader`` as ``sampler``, let the data set return the index of each sample, and call
    :meth:`observe` for every batch that was trained on. What is observed in an epoch plans the next one, and the place
    in the epoch, which a checkpoint needs, is counted by it.

    Args:
        size: The number of samples in the data set.
        target_activation_rate: The share of the samples that a pruned epoch loads; without a coverage 0.4.
        target_coverage: In place of a rate, the share of the summed significance that they are to carry.
        warmup_epochs: The number of first epochs that load everything.
        gate: ``"soft"`` or ``"topk"``.
        seed: The seed of the order and of the draws; global generators are not touched.
        batch_size: The number of samples in a batch of one process: a last batch of one sample is avoided.
        num_replicas: The number of processes that share the plan out, in turns.
        rank: The number of this process among them.
        maximum: A function that takes the element-wise maximum of a tensor over all processes that observe, so that
            all plan alike. Needed with several of them.

    Attributes:
        history: What is remembered. Before the first epoch, ``history.begin_with(scores)`` sets scores of your own;
            with ``warmup_epochs=0``, call :meth:`replan` then.
        plan: The plan of the running epoch, for all processes.

    Raises:
        ValueError: Both targets are given, or several processes without a ``maximum``.

    Example:
        >>> sampler = SignificanceSampler(100, target_activation_rate=0.3)
        >>> for epoch in range(2):
        ...     sampler.set_epoch(epoch)
        ...     for indices in torch.utils.data.DataLoader(range(100), sampler=sampler, batch_size=10):
        ...         sampler.observe(indices, torch.rand(len(indices)))  # a score of each sample
        >>> len(sampler)
        30
    """

    def __init__(
        self,
        size: int,
        *,
        target_activation_rate: float | None = None,
        target_coverage: float | None = None,
        warmup_epochs: int = 1,
        gate: GateName = "soft",
        seed: int = 0,
        batch_size: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        maximum: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if num_replicas > 1 and maximum is None:
            raise ValueError(
                f"expected maximum= with num_replicas={num_replicas}, got None: without it each process would plan by "
                "the scores of its own samples alone."
            )
        self._selector = SampleSelector(
            target_activation_rate=target_activation_rate,
            target_coverage=target_coverage,
            gate=gate,
            weighting="none",
            seed=seed,
        )
        self._warmup_epochs = warmup_epochs
        self._batch_size = batch_size
        self._replicas = num_replicas
        self._rank = rank
        self._maximum = maximum
        self._done = 0  # samples of this process that were observed in the running epoch
        self._start = 0  # of those, what was before the last resumption
        self.history = SignificanceHistory(size)
        self.plan: EpochPlan
        self.replan(0)

    @property
    def epoch(self) -> int:
        """Return the number of the running epoch, from 0."""
        return self.plan.epoch

    def observe(self, indices: Tensor, significance: Tensor) -> None:
        """Tell the scores of a batch that was trained on; every batch must be told.

        Args:
            indices: ``(B,)`` dataset indices.
            significance: ``(B,)``, at least 0, larger for samples that matter more: losses, or norms of gradients. One
                that is NaN or infinite keeps its sample out of the plans until it is seen finite.
        """
        significance = significance.detach()
        self.history.observe(indices, significance.masked_fill(~significance.isfinite(), torch.inf))
        self._done += len(indices)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: plan it by all that was observed before. For the running epoch it does nothing.

        With several processes every one of them must call it.
        """
        if epoch != self.epoch:
            self.history.fold(self._maximum)
            self.replan(epoch)

    def replan(self, epoch: int) -> None:
        """Plan an epoch by what is remembered, and begin it."""
        draws = self._draws(epoch)
        count = self._count(draws, epoch)
        self.plan = EpochPlan(epoch, draws, draws.numel())
        if count < draws.numel():
            self.plan = plan_epoch(self.history, draws, epoch=epoch, count=count, selector=self._selector)
        self._done = 0
        self._start = 0

    def _draws(self, epoch: int) -> Tensor:
        size = len(self.history)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self._selector.seed + epoch))
        # As many in each process: the first ones come twice, as in torch's DistributedSampler.
        return order.repeat(2 + self._replicas // size)[: -(-size // self._replicas) * self._replicas]

    def _count(self, draws: Tensor, epoch: int) -> int:
        selector = self._selector
        offered = draws.numel()
        if epoch < self._warmup_epochs or not selector.selects:
            return offered
        rate = selector.target
        if selector.share_of == "significance":
            if not self.history.seen.any():
                return offered
            always = self.history.rules.always_among(draws)
            rate = rate_to_cover(self.history.significance()[draws], rate, selector.gate, always=always)
            if rate >= NEARLY_ALL:  # to leave out the rest costs more than it saves
                return offered
        return planned_count(
            offered,
            rate,
            batch_size=self._batch_size,
            processes=self._replicas,
            min_selected=selector.min_selected,
            at_least=selector.share_of == "significance",
        )

    def __iter__(self) -> Iterator[int]:
        """Yield what this process has yet to train on in the running epoch; behind its end, begin the next one."""
        self._end_epoch()
        yield from self._own[self._done :].tolist()

    def _end_epoch(self) -> None:
        if self._done >= len(self._own):
            self.set_epoch(self.epoch + 1)

    @property
    def _own(self) -> Tensor:
        return self.plan.indices[self._rank :: self._replicas]

    def __len__(self) -> int:
        """Count the samples of this process in the running epoch; in a resumed one those that were left."""
        return len(self._own) - self._start

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: primitives and tensors; with several processes all must ask for it."""
        return {
            "history": self.history.state_dict(self._maximum),
            "plan": self.plan.state_dict(),
            "done": self._done,
            "selector": self._selector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was asked for: with the rest of the epoch's plan, or with the next epoch.

        With several processes every one of them must call it.

        Raises:
            ValueError: The state was written for a data set of another size.
        """
        self.history.load_state_dict(state["history"])
        self._selector.load_state_dict(state["selector"])
        self.plan = EpochPlan.from_state_dict(state["plan"])
        self._done = state["done"]
        self._start = self._done
        self._end_epoch()
