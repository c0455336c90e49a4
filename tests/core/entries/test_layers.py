"""Where the gradient of a loss enters the network: last layers of every kind, against ordinary row masking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core.gradient_gate import Execution
from tests.core.entries.gating import B, Case, Parts, check

X, H, C = 6, 8, 4


def points(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, X), torch.randint(0, C, (size,))


def sequences(size: int) -> tuple[Tensor, Tensor]:
    """As many steps as there are samples in the traced batch."""
    return torch.randn(size, B, X), torch.randint(0, C, (size,))


def last(m: Any, batch: Any, cut: Any) -> Tensor:
    """A loss that no output is too small for."""
    out: Tensor = (cut(m(batch[0])) - batch[0].sum(-1, keepdim=True)).square().mean()
    return out


def behind(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(X, H), layer)


# ------------------------------------------------------------------ products


def from_the_left(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m.w @ batch[0].T, dim=1).T, batch[1])


def by_einsum(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(torch.einsum("bi,oi->ob", batch[0], m.w), dim=1).T, batch[1])


def bilinear(m: Any, batch: Any, cut: Any) -> Tensor:
    return cut(m(batch[0][:, :3], batch[0][:, 3:])).square().mean()


def ensemble(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(torch.baddbmm(m.b[:, None], batch[0].expand(3, -1, -1), m.w), dim=1)
    return F.cross_entropy(z.flatten(0, 1), batch[1].repeat(3))


def mapped(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(torch.vmap(lambda w, x: x @ w, in_dims=(0, None))(m.w, batch[0]), dim=1)
    return F.cross_entropy(z.flatten(0, 1), batch[1].repeat(3))


def experts(m: Any, batch: Any, cut: Any) -> Tensor:
    made = torch.stack([cut(expert(batch[0])) for expert in m.experts], 1)
    return F.cross_entropy((cut(m.gate(batch[0])).softmax(1)[:, :, None] * made).sum(1), batch[1])


def siamese(m: Any, batch: Any, cut: Any) -> Tensor:
    return (cut(m(batch[0])) - cut(m(batch[0].flip(1)))).pow(4).mean()


def distances(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(-cut(m.net(batch[0])[:, None] - m.proxies).square().sum(2), batch[1])


# ------------------------------------------------------------------ sequences


def attention(m: Any, batch: Any, cut: Any) -> Tensor:
    x = batch[0].transpose(0, 1)
    return cut(m(x, x, x)[0], dim=1).pow(4).mean()


def prompted(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.e(batch[0])
    return cut(torch.cat([m.prompt.expand(len(h), -1, -1), h], 1)).pow(4).mean()


def packed(m: Any, batch: Any, cut: Any) -> Tensor:
    lengths = torch.arange(len(batch[0]), 0, -1).clamp(max=B)
    h = m.r(nn.utils.rnn.pack_padded_sequence(batch[0], lengths, batch_first=True))[1][0]
    return F.cross_entropy(cut(m.o(h[-1])), batch[1])


def ctc(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(m.o(m.e(batch[0])).transpose(0, 1), dim=1).log_softmax(-1)
    size = len(batch[0])
    targets = torch.randint(1, C, (size, 2))
    return F.ctc_loss(z, targets, torch.full((size,), len(z)), torch.full((size,), 2))


# ------------------------------------------------------------------ what is not of the samples


def with_decay(m: Any, batch: Any, cut: Any) -> Tensor:
    decay = sum(p.square().sum() for p in m.parameters())
    return F.cross_entropy(cut(m(batch[0])), batch[1]) + 1e-2 * decay


def with_orthogonality(m: Any, batch: Any, cut: Any) -> Tensor:
    penalty = (m.weight @ m.weight.T - torch.eye(C)).square().sum()
    return F.cross_entropy(cut(m(batch[0])), batch[1]) + penalty


def queue(m: Any, batch: Any, cut: Any) -> Tensor:
    q = F.normalize(cut(m.net(batch[0])), dim=1)
    with torch.no_grad():
        k = F.normalize(m.slow(batch[0].flip(1)), dim=1)
    z = torch.cat([(q * k).sum(1, keepdim=True), q @ m.queue.T], 1) / 0.07
    return F.cross_entropy(z, torch.zeros(len(q), dtype=torch.long))


def queueing() -> nn.Module:
    made = Parts(net=nn.Linear(X, H), slow=nn.Linear(X, H).requires_grad_(False))
    made.register_buffer("queue", torch.randn(B, H))
    return made


def predicted_target(m: Any, batch: Any, cut: Any) -> Tensor:
    with torch.no_grad():
        target = m.net(batch[0].flip(1))
    return 2 - 2 * F.cosine_similarity(cut(m.predictor(m.net(batch[0]))), target).mean()


def code_book(m: Any, batch: Any, cut: Any) -> Tensor:
    """Samples of one code have the same reconstruction, and gradients all the same."""
    h = m.e(batch[0])
    q = m.codes[torch.cdist(h, m.codes).argmin(1)]
    r = cut(m.d(h + (q - h).detach()))
    h, q = cut(h, nested=True), cut(q)
    return F.mse_loss(r, batch[0]) + F.mse_loss(h, q.detach()) + F.mse_loss(q, h.detach())


def learned_noise(m: Any, batch: Any, cut: Any) -> Tensor:
    """The scale of each output is a parameter like a layer's, and selected from like one."""
    error = m.net(batch[0]) - batch[0][:, :3]
    return cut(error / m.scale.exp()).square().mean() + m.scale.mean()


CASES = {
    "product from the left": Case(lambda: Parts(w=torch.randn(C, X)), points, from_the_left),
    "einsum": Case(lambda: Parts(w=torch.randn(C, X)), points, by_einsum),
    "bilinear": Case(lambda: nn.Bilinear(3, 3, 2), points, bilinear),
    "ensemble": Case(lambda: Parts(w=torch.randn(3, X, C), b=torch.randn(3, C)), points, ensemble),
    "vmap": Case(lambda: Parts(w=torch.randn(3, X, C)), points, mapped),
    "experts": Case(
        lambda: Parts(gate=nn.Linear(X, 3), experts=nn.ModuleList([nn.Linear(X, C) for _ in range(3)])), points, experts
    ),
    "siamese": Case(lambda: nn.Linear(X, H), points, siamese),
    "distances to proxies": Case(lambda: Parts(net=nn.Linear(X, H), proxies=torch.randn(C, H)), points, distances),
    "LayerNorm": Case(lambda: behind(nn.LayerNorm(H)), points, last),
    "GroupNorm": Case(lambda: behind(nn.GroupNorm(2, H)), points, last),
    "RMSNorm": Case(lambda: behind(nn.RMSNorm(H)), points, last),
    "PReLU of one slope": Case(lambda: behind(nn.PReLU()), points, last),
    "PReLU of many slopes": Case(lambda: behind(nn.PReLU(H)), points, last),
    "bias alone": Case(
        lambda: Parts(b=torch.randn(X)), points, lambda m, batch, cut: cut(batch[0] + m.b).pow(4).mean()
    ),
    "attention, time-major": Case(lambda: nn.MultiheadAttention(X, 2), sequences, attention),
    "learned prompt": Case(lambda: Parts(e=nn.Linear(X, H), prompt=torch.randn(1, 2, H)), sequences, prompted),
    "packed sequences": Case(lambda: Parts(r=nn.LSTM(X, H), o=nn.Linear(H, C)), sequences, packed),
    "CTC": Case(lambda: Parts(e=nn.Linear(X, H), o=nn.Linear(H, C)), sequences, ctc),
    "weight decay in the loss": Case(lambda: nn.Linear(X, C), points, with_decay),
    "orthogonality in the loss": Case(lambda: nn.Linear(X, C), points, with_orthogonality),
    "queue of negatives": Case(queueing, points, queue),
    "predictor and target": Case(
        lambda: Parts(net=nn.Linear(X, H), predictor=nn.Linear(H, H)), points, predicted_target
    ),
    "code book": Case(lambda: Parts(e=nn.Linear(X, H), codes=torch.randn(5, H), d=nn.Linear(H, X)), points, code_book),
    "few codes": Case(lambda: Parts(e=nn.Linear(X, H), codes=torch.randn(2, H), d=nn.Linear(H, X)), points, code_book),
    "learned noise": Case(lambda: Parts(net=nn.Linear(X, 3), scale=torch.randn(3)), points, learned_noise),
}


@pytest.mark.parametrize("execution", ["mask", "partial"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_masked_rows(name: str, execution: Execution) -> None:
    found = check(CASES[name], execution)
    assert not found.unclear
