"""Entries of losses in which one sample leaves no trace that could be measured: the edges of the graph show it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import EntryFinder, Found

SIZE = 4
Loss = Callable[[Tensor, Tensor], Tensor]


def found_in(loss_of: Loss, layer: nn.Module, batch: tuple[Tensor, Tensor]) -> Found:
    with SampleTrace(batch, len(batch[0])) as trace:
        loss = loss_of(layer(batch[0]), batch[1])
    found = EntryFinder().prove(loss, len(batch[0]), trace)
    trace.release()
    return found


def ignored(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out[labels >= 0], labels[labels >= 0])


def weighted(out: Tensor, labels: Tensor) -> Tensor:
    weights = (labels >= 0).to(out.dtype)
    return (F.cross_entropy(out, labels.clamp(min=0), reduction="none") * weights).sum() / weights.sum()


def ignore_index(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out, labels, ignore_index=-1) + 0.1 * F.cross_entropy(out, labels, ignore_index=-1)


@pytest.mark.parametrize("loss_of", [ignored, weighted, ignore_index])
def test_the_followed_sample_is_not_in_the_loss(loss_of: Loss) -> None:
    labels = torch.tensor([0, 1, 2, -1])
    found = found_in(loss_of, nn.Linear(3, 3), (torch.randn(SIZE, 3), labels))
    assert [entry.place.shape for entry in found.entries] == [(SIZE, 3)]


def test_a_term_is_rounded_to_the_same_number_with_another_sample() -> None:
    size = 512
    layer = nn.Linear(3, 3).bfloat16()
    batch = torch.randn(size, 3).bfloat16(), torch.randint(0, 3, (size,))
    found = found_in(lambda out, y: F.cross_entropy(out, y) + out.float().square().mean(), layer, batch)
    assert sum(len(entry.edges) for entry in found.entries) == 2


def test_dice_over_the_batch_has_one_entry() -> None:
    def dice(out: Tensor, labels: Tensor) -> Tensor:
        chosen, truth = out.softmax(1), F.one_hot(labels, 3).float()
        union = chosen.sum(0) + truth.sum(0)
        return (1 - 2 * ((chosen * truth).sum(0) + 1) / (union + 1)).mean()

    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    found = found_in(dice, layer, (torch.randn(SIZE, 3), torch.tensor([0, 1, 2, 0])))
    assert not found.unclear
    assert [entry.place.shape for entry in found.entries] == [(SIZE, 3)]


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, whose second factor is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.down = nn.Linear(3, 2, bias=False)
        self.up = nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("shape", [(SIZE, 3), (SIZE, 5, 3)], ids=["rows", "sequences"])
def test_an_adapter_that_is_still_zero_is_an_entry(shape: tuple[int, ...]) -> None:
    network = Adapted()
    batch = torch.randn(shape), torch.tensor([0, 1, 2, 0])
    found = found_in(lambda out, y: F.cross_entropy(out.reshape(SIZE, -1), y), network, batch)
    assert not found.unclear
    assert len([entry for entry in found.entries if not entry.nested]) == 1


class Head(nn.Module):
    """A head of one output, whose bias is added by a node of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight) + self.bias


@pytest.mark.parametrize("shape", [(SIZE, 3), (SIZE, 5, 3)], ids=["rows", "sequences"])
def test_the_bias_of_a_single_output_lies_behind_the_entry(shape: tuple[int, ...]) -> None:
    found = found_in(lambda out, y: (out - y).square().mean(), Head(), (torch.randn(shape), torch.ones(())))
    assert [entry.node.name() for entry in found.entries] == ["AddBackward0"]


def test_a_learned_weight_of_a_loss_does_not() -> None:
    log_variance = nn.Parameter(torch.zeros(()))
    layer = nn.Linear(3, 3)
    batch = torch.randn(SIZE, 3), torch.tensor([0, 1, 2, 0])
    found = found_in(lambda out, y: F.cross_entropy(out, y) * (-log_variance).exp() + log_variance, layer, batch)
    assert [entry.node.name() for entry in found.entries] == ["AddmmBackward0"]
