"""The rules of others beside ours, as pure functions, and the choosers that apply them to the epochs of a run.

Written from the papers and checked against the authors' code:

- InfoBatch: Qin et al., ICLR 2024, arXiv 2303.04947; github.com/NUS-HPC-AI-Lab/InfoBatch.
- SeTa: Zhou et al., Scale Efficient Training for Large Datasets, CVPR 2025, arXiv 2503.13385; github.com/mrazhou/SeTa.
- OrderDP: ICLR 2026, openreview.net/forum?id=e77QyyRQPz; github.com/shengze-xu/OrderDP.
- Selective Backprop: Jiang et al., arXiv 1910.00762, as Composer computes it
  (composer/algorithms/selective_backprop, mosaicml 0.32.1; `composer_reference.py` records what it selects).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from regime_data import Choice
from torch import Generator, Tensor

__all__ = [
    "InfoBatch",
    "OrderDP",
    "RandomShare",
    "SeTa",
    "composer_probabilities",
    "composer_selects",
    "infobatch_choice",
    "orderdp_choice",
    "seta_groups",
    "seta_window",
]

_FIRST_LOSS = 3.0
"""The remembered loss of a sample that was not seen yet, in the code of InfoBatch, SeTa and OrderDP alike."""


def infobatch_choice(scores: Tensor, prune_ratio: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Drop a share of the samples whose loss is below the mean, and weigh those that are left of them up.

    Args:
        scores: ``(N,)`` remembered losses.
        prune_ratio: The share to drop of the samples below the mean.
        generator: The generator of the choice.

    Returns:
        ``(k,)`` the samples that are kept, and ``(N,)`` the factors of the losses.
    """
    learned = scores < scores.mean()
    rows = learned.nonzero().squeeze(1)
    kept = rows[torch.randperm(len(rows), generator=generator)[: int((1 - prune_ratio) * len(rows))]]
    weights = torch.ones_like(scores)
    weights[kept] = 1 / (1 - prune_ratio)
    return torch.cat([(~learned).nonzero().squeeze(1), kept]), weights


def seta_groups(scores: Tensor, groups: int) -> list[Tensor]:
    """Divide samples by k-means over their losses, the easiest group first.

    Args:
        scores: ``(n,)`` losses.
        groups: The number of groups.

    Returns:
        The positions in ``scores`` of the members of each group.
    """
    if groups == 1:
        return [torch.arange(len(scores))]
    if scores.max() == scores.min():
        return list(torch.arange(len(scores)).chunk(groups))
    from sklearn.cluster import KMeans

    found = KMeans(n_clusters=groups, random_state=0).fit(scores.unsqueeze(1).numpy())
    members = [torch.from_numpy(found.labels_ == group).nonzero().squeeze(1) for group in range(groups)]
    return sorted((rows for rows in members if len(rows)), key=lambda rows: float(scores[rows].mean()))


def seta_window(groups: int, window_scale: float, visit: int) -> range:
    """Return the groups that are trained on: a window that slides from the easiest to the hardest and begins anew.

    Args:
        groups: The number of groups.
        window_scale: The length of the window as a share of all groups.
        visit: The number of prunings before; the first trains on all groups.
    """
    if visit == 0:
        return range(groups)
    size = round(groups * window_scale)
    start = visit % (groups - size + 1)
    return range(start, start + size)


def orderdp_choice(scores: Tensor, random_share: float, top_share: float, generator: Generator) -> Tensor:
    """Draw a random share of the samples, and keep of these the share with the largest losses.

    Args:
        scores: ``(N,)`` remembered losses.
        random_share: The share that is drawn.
        top_share: The share of the drawn samples that is kept.
        generator: The generator of the draw.

    Returns:
        ``(k,)`` the samples that are kept.
    """
    drawn = torch.randperm(len(scores), generator=generator)[: int(random_share * len(scores))]
    return drawn[scores[drawn].topk(int(top_share * len(drawn))).indices]


def composer_selects(done: float, batch: int, *, start: float = 0.5, end: float = 0.9, interrupt: int = 2) -> bool:
    """Tell whether Selective Backprop selects in this batch: in the second half of the run, in every other batch.

    Args:
        done: The share of the run that is done, in [0, 1), counted in whole epochs.
        batch: The index of the batch in its epoch.
        start: The share of the run from which on it selects.
        end: The share of the run from which on it no longer does.
        interrupt: Every so many batches are trained on whole; 0 for none.
    """
    return start <= done < end and (interrupt == 0 or (batch + 1) % interrupt != 0)


def composer_probabilities(losses: Tensor, keep: float) -> Tensor:
    """Return the probability of each sample in one draw: its percentile within the batch to the power of 1/keep - 1.

    Args:
        losses: ``(B,)`` losses of the batch.
        keep: The share of the batch that is kept.

    Returns:
        ``(B,)``, with sum 1.
    """
    size = len(losses)
    percentiles = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    powers = percentiles ** (1 / keep - 1)
    probabilities = torch.empty_like(powers)
    probabilities[losses.argsort().cpu()] = powers / powers.sum()
    return probabilities


class _Remembers:
    """The memory that the rules share: the last loss of each sample, and a generator of their own.

    Args:
        size: The samples of the data set.
        epochs: The epochs of the run.
        seed: The seed of the choices.
        delta: The share of the run in which samples are dropped.
    """

    def __init__(self, size: int, epochs: int, seed: int, delta: float = 0.875) -> None:
        self.scores = torch.full((size,), _FIRST_LOSS)
        self.epochs = epochs
        self.delta = delta
        self.generator = torch.Generator().manual_seed(seed)

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Remember the losses ``(B,)`` of the samples that were trained on."""
        self.scores[indices] = losses

    def prunes(self, epoch: int) -> bool:
        """Tell whether samples are dropped in this epoch, counted from 0."""
        return epoch + 1 <= self.delta * self.epochs

    def shuffled(self, rows: Tensor) -> Tensor:
        """Return the samples in random order."""
        return rows[torch.randperm(len(rows), generator=self.generator)]


class InfoBatch(_Remembers):
    """InfoBatch's rule with its own settings: r = 0.5, the last eighth of the run on all samples."""

    def choose(self, epoch: int) -> Choice:
        """Return the samples of an epoch."""
        if not self.prunes(epoch):
            return Choice(self.shuffled(torch.arange(len(self.scores))))
        kept, weights = infobatch_choice(self.scores, 0.5, self.generator)
        return Choice(self.shuffled(kept), weights)


class SeTa(_Remembers):
    """SeTa's rule with the settings of its CIFAR script: 10 % dropped at random, 5 groups, a window of 0.9."""

    def choose(self, epoch: int) -> Choice:
        """Return the samples of an epoch."""
        drawn = torch.randperm(len(self.scores), generator=self.generator)[: int(0.9 * len(self.scores))]
        if not self.prunes(epoch):
            return Choice(drawn)
        groups = seta_groups(self.scores[drawn], 5)
        window = seta_window(len(groups), 0.9, epoch)
        return Choice(self.shuffled(drawn[torch.cat([groups[number] for number in window])]))


class OrderDP(_Remembers):
    """OrderDP's rule, to the end of the run as in its code."""

    def __init__(self, size: int, epochs: int, seed: int, *, random_share: float, top_share: float) -> None:
        super().__init__(size, epochs, seed)
        self.random_share = random_share
        self.top_share = top_share

    def choose(self, epoch: int) -> Choice:
        """Return the samples of an epoch."""
        return Choice(self.shuffled(orderdp_choice(self.scores, self.random_share, self.top_share, self.generator)))


class RandomShare:
    """A random share of the samples, with the rates of another run.

    Args:
        size: The samples of the data set.
        batch_size: The samples of a dense batch.
        rates: The share of each epoch.
        keeps_steps: Whether an epoch has as many batches as a dense one, which are smaller, or fewer full ones.
        seed: The seed of the choices.
    """

    def __init__(self, size: int, batch_size: int, rates: Sequence[float], *, keeps_steps: bool, seed: int) -> None:
        self.size = size
        self.batch_size = batch_size
        self.rates = rates
        self.keeps_steps = keeps_steps
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, epoch: int) -> Choice:
        """Return the samples of an epoch."""
        batches = self.size // self.batch_size
        size = self.batch_size
        if self.keeps_steps:
            size = max(2, round(self.rates[epoch] * size))
        else:
            batches = max(1, round(self.rates[epoch] * batches))
        return Choice(torch.randperm(self.size, generator=self.generator)[: batches * size], batch_size=size)

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Forget the losses: the rule needs none."""
