"""Curriculum and active learning as significances: which samples a class of methods would rather train on.

Each takes ``losses`` ``(B,)``, ``logits`` ``(B, C)``, ``inputs`` and ``targets`` of a batch and returns ``(B,)``, which
is larger for samples that are to be kept. Pass one by its path in a configuration, or as it is:
``SparseSelectionCallback(significance=margin)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["diversity", "easiest", "entropy", "hardest", "margin"]


def hardest(losses: Tensor, *_: Tensor | None) -> Tensor:
    """Return the loss, in its own unit.

    Source: online hard example mining, arXiv 1604.03540; online batch selection, arXiv 1511.06343.
    """
    return losses


def easiest(losses: Tensor, *_: Tensor | None) -> Tensor:
    """Return ``exp(-loss)``, in (0, 1]: for a cross-entropy the probability of the true class.

    Source: M. P. Kumar, B. Packer, D. Koller, Self-paced learning for latent variable models, NIPS 2010.
    """
    return (-losses).exp()


def entropy(losses: Tensor, logits: Tensor | None, *_: Tensor | None) -> Tensor:
    """Return the entropy of the prediction in nats, in [0, ln C]; it needs no label.

    Source: B. Settles, Active learning literature survey (2009), section 3.1.
    """
    terms: Tensor = torch.special.entr(_known(logits).softmax(1))
    return terms.sum(1)


def margin(losses: Tensor, logits: Tensor | None, *_: Tensor | None) -> Tensor:
    """Return 1 less the lead of the likeliest class over the second, in [0, 1]; it needs no label.

    Source: T. Scheffer, C. Decomain, S. Wrobel, Active hidden Markov models, IDA 2001.
    """
    first, second = _known(logits).softmax(1).topk(2, dim=1).values.unbind(1)
    return 1 - (first - second)


def diversity(losses: Tensor, logits: Tensor | None, *_: Tensor | None) -> Tensor:
    """Return the distance of a prediction to the nearest other one in the batch, in logits: copies count for little.

    Source: after the k-center greedy rule of core sets, arXiv 1708.00489, with one pass over a batch in its place.
    """
    scores = _known(logits)
    distances = torch.cdist(scores, scores)
    return distances.fill_diagonal_(torch.inf).amin(1).nan_to_num(0.0, 0.0, 0.0)


def _known(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise ValueError("expected class scores, got none: this rule is for classification losses of torch.")
    return logits.float()
