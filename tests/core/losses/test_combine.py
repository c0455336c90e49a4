"""Several watched losses, each with what it weighs in the loss that is trained, against sums written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core.losses.capture import LossCapture, combine
from lightning_ast.errors import LossCaptureError

B = 6
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(B, 5, generator=GENERATOR)
TRUTH = torch.randn(B, 3, generator=GENERATOR)
WEIGHT = torch.rand(B, generator=GENERATOR)
CLASS_WEIGHT = torch.tensor([1.0, 0.5, 3.0, 0.25])


class Heads(nn.Module):
    """A classification and a regression head with learned loss weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.values = nn.Linear(5, 4), nn.Linear(5, 3)
        self.log_weights = nn.Parameter(torch.tensor([0.3, -0.7]))


def entropies(net: Heads) -> Tensor:
    return F.cross_entropy(net.classes(X), LABELS, reduction="none")


def squares(net: Heads) -> Tensor:
    return F.mse_loss(net.values(X), TRUTH, reduction="none").mean(1)


def learned(net: Heads) -> Tensor:
    weights = (-net.log_weights).exp()
    terms = F.cross_entropy(net.classes(X), LABELS), F.mse_loss(net.values(X), TRUTH)
    return weights[0] * terms[0] + weights[1] * terms[1] + net.log_weights.sum()


def logged(net: Heads) -> Tensor:
    F.l1_loss(net.values(X), TRUTH)
    with torch.no_grad():
        F.cross_entropy(net.classes(X), LABELS)
    return F.cross_entropy(net.classes(X), LABELS) / 2 + net.classes.weight.square().sum()


def per_sample_gradients(net: Heads) -> Tensor:
    one = torch.func.grad(lambda weight, x, y: F.cross_entropy(F.linear(x, weight), y))
    norms = torch.func.vmap(one, (None, 0, 0))(net.classes.weight, X, LABELS).flatten(1).norm(dim=1)
    return F.cross_entropy(net.classes(X), LABELS) + norms.mean()


def in_place(net: Heads) -> Tensor:
    loss = F.cross_entropy(net.classes(X), LABELS)
    loss *= 0.25
    loss += F.mse_loss(net.values(X), TRUTH)
    return loss


def mixup(net: Heads) -> Tensor:
    logits = net.classes(X)
    return 0.3 * F.cross_entropy(logits, LABELS) + 0.7 * F.cross_entropy(logits, LABELS.flip(0))


CASES: dict[str, tuple[Callable[[Heads], Tensor], Callable[[Heads], Tensor]]] = {
    "the loss itself": (lambda net: F.cross_entropy(net.classes(X), LABELS), entropies),
    "learned weights": (
        learned,
        lambda net: (-net.log_weights[0]).exp() * entropies(net) + (-net.log_weights[1]).exp() * squares(net),
    ),
    "only logged": (logged, lambda net: entropies(net) / 2),
    "function transforms": (per_sample_gradients, entropies),
    "in place": (in_place, lambda net: entropies(net) / 4 + squares(net)),
    "mixup": (
        mixup,
        lambda net: 0.3 * entropies(net) + 0.7 * F.cross_entropy(net.classes(X), LABELS.flip(0), reduction="none"),
    ),
    "averaged by hand": (lambda net: (entropies(net) * WEIGHT).mean(), lambda net: entropies(net) * WEIGHT),
    "elements by hand": (
        lambda net: F.mse_loss(net.values(X), TRUTH, reduction="none").sum() / 7,
        lambda net: squares(net) * 3 * B / 7,
    ),
    "hardest by hand": (
        lambda net: entropies(net).topk(2).values.sum(),
        lambda net: B * entropies(net) * (entropies(net) >= entropies(net).sort().values[-2]),
    ),
    "summed": (
        lambda net: F.mse_loss(net.values(X), TRUTH, reduction="sum") / B,
        lambda net: squares(net) * 3,
    ),
    "class weights": (
        lambda net: F.cross_entropy(net.classes(X), LABELS, weight=CLASS_WEIGHT),
        lambda net: entropies(net) * CLASS_WEIGHT[LABELS] / CLASS_WEIGHT[LABELS].mean(),
    ),
    "class weights by hand": (
        lambda net: (
            F.cross_entropy(net.classes(X), LABELS, weight=CLASS_WEIGHT, reduction="none").sum()
            / CLASS_WEIGHT[LABELS].sum()
        ),
        lambda net: entropies(net) * CLASS_WEIGHT[LABELS] / CLASS_WEIGHT[LABELS].mean(),
    ),
    "negative": (lambda net: -F.mse_loss(net.values(X), TRUTH), lambda net: -squares(net)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_sums_by_hand(name: str) -> None:
    step, expected = CASES[name]
    net = Heads()
    with LossCapture() as capture:
        loss = step(net)
    record = combine(capture, loss, B)
    assert not record.losses.requires_grad
    torch.testing.assert_close(record.losses, expected(net).detach())
    scaled = combine(capture, loss * 1024 / 3, B, scale=torch.tensor(1024 / 3))
    torch.testing.assert_close(scaled.losses, record.losses)
    loss.backward()  # the graph is whole


def test_the_mean_is_the_watched_part_of_the_loss() -> None:
    net = Heads()
    tokens = torch.randint(0, 4, (B, 7), generator=GENERATOR)
    tokens[1, 2:] = -100
    with LossCapture() as capture:
        logits = net.classes(X[:, None].expand(B, 7, 5))
        loss = F.cross_entropy(logits.reshape(-1, 4), tokens.reshape(-1)) + 0.1 * F.mse_loss(net.values(X), TRUTH)
    torch.testing.assert_close(combine(capture, loss, B).losses.mean(), loss.detach())


def test_the_heaviest_class_loss_gives_logits_and_labels() -> None:
    net = Heads()
    with LossCapture() as capture:
        loss = mixup(net) + 100 * F.mse_loss(net.values(X), TRUTH)
    record = combine(capture, loss, B)
    assert record.name == "cross_entropy"
    assert record.labels.tolist() == LABELS.flip(0).tolist()
    torch.testing.assert_close(record.logits, net.classes(X).detach())
    with LossCapture() as capture:
        loss = F.mse_loss(net.values(X), TRUTH) + 0.001 * F.l1_loss(net.values(X), TRUTH)
    assert combine(capture, loss, B).name == "mse_loss"


@pytest.mark.parametrize("kind", ["by hand", "logged", "no grad", "detached"])
def test_a_loss_without_a_watched_part_is_refused(kind: str) -> None:
    net = Heads()
    with LossCapture() as capture:
        loss = (net.values(X) - TRUTH).square().mean()
        if kind == "logged":
            F.mse_loss(net.values(X), TRUTH)
        if kind == "no grad":
            with torch.no_grad():
                loss = loss + F.mse_loss(net.values(X), TRUTH)
        if kind == "detached":
            loss = loss + F.mse_loss(net.values(X).detach(), TRUTH)
    with pytest.raises(LossCaptureError, match=r"no torch loss function has a part.*significance='gradient'"):
        combine(capture, loss, B)


def test_without_a_graph_only_the_loss_itself_is_known() -> None:
    net = Heads()
    with torch.no_grad(), LossCapture() as capture:
        loss = F.cross_entropy(net.classes(X), LABELS)
    torch.testing.assert_close(combine(capture, loss, B).losses, entropies(net).detach())
    with pytest.raises(LossCaptureError, match="the loss has no graph"):
        combine(capture, loss / 2, B)


def test_a_part_that_cannot_be_taken_apart_is_refused_and_one_that_is_only_logged_is_not() -> None:
    net = Heads()
    with LossCapture() as capture:
        pairs = F.mse_loss(net.values(X)[:4], TRUTH[:4])
        loss = F.cross_entropy(net.classes(X), LABELS)
    combine(capture, loss, B)
    with pytest.raises(LossCaptureError, match=r"`mse_loss` to have a leading dimension of 6"):
        combine(capture, loss + pairs, B)


class _DDPSink(torch.autograd.Function):
    """As DDP's, whose first backward arranges the exchange of the gradients."""

    ran = 0

    @staticmethod
    def forward(ctx: object, model: object, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _DDPSink.ran += 1
        return (None, *gradients)


@pytest.mark.parametrize("direct", [True, False])
def test_the_node_of_ddp_is_not_run(direct: bool) -> None:
    net = Heads()
    _DDPSink.ran = 0
    with LossCapture() as capture:
        inner = F.cross_entropy(net.classes(X), LABELS)
        inner = inner if direct else inner / 2 + F.mse_loss(net.values(X), TRUTH)
        _, loss = _DDPSink.apply(None, net.values(X), inner)
    expected = entropies(net) if direct else entropies(net) / 2 + squares(net)
    torch.testing.assert_close(combine(capture, loss * 8 / 2, B, scale=4.0).losses, expected.detach())
    assert _DDPSink.ran == 0
