"""Where the gradient of a loss enters the network: networks of every form, against ordinary row masking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_ast.core.gradient_gate import Execution
from tests.core.entries.gating import B, Case, Parts, check

X, H, C = 6, 8, 4


def points(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, X), torch.randint(0, C, (size,))


def sequences(size: int) -> tuple[Tensor, Tensor]:
    """As many steps as there are samples in the traced batch."""
    return torch.randn(size, B, X), torch.randint(0, C, (size,))


def tokens(size: int) -> Tensor:
    return torch.randint(0, 20, (size, B))


def pairs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, 9, (size,)), torch.randint(0, 7, (size,)), torch.randn(size)


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(X, H), nn.Tanh())


def cross_entropy(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m(batch[0])), batch[1])


# ------------------------------------------------------------------ heads whose weights are computed


def arcface(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(F.linear(F.normalize(m.f(batch[0]), dim=1), F.normalize(m.w, dim=1)))
    return F.cross_entropy(16 * z, batch[1])


def masked_weights(m: Any, batch: Any, cut: Any) -> Tensor:
    mask = (torch.arange(C * H).view(C, H) % 3 > 0).double()
    return F.cross_entropy(cut(F.linear(m.f(batch[0]), m.w * mask)), batch[1])


def hypernetwork(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(F.linear(m.f(batch[0]), m.hyper(m.code).view(C, H))), batch[1])


def weights_of_each_sample(m: Any, batch: Any, cut: Any) -> Tensor:
    made = cut(m.hyper(batch[0])).view(-1, C, H)
    return F.cross_entropy(torch.bmm(made, cut(m.net(batch[0]))[:, :, None]).squeeze(2), batch[1])


def by_hand(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m.f(batch[0]) @ m.w.T + m.b), batch[1])


def weight_and_low_rank(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.f(batch[0])
    return F.cross_entropy(cut(m.w(h)) + cut((h @ m.a) @ m.b), batch[1])


class Parametrized(nn.Module):
    def __init__(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(X, H), nn.Tanh(), wrap(nn.Linear(H, C)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


# ------------------------------------------------------------------ sequences


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(X, H)
        self.o = nn.Linear(H, C)


def time_major(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(m.o(m.r(batch[0].transpose(0, 1))[0]), dim=1)
    return F.cross_entropy(z.reshape(-1, C), batch[1].repeat(len(z)))


def flat_time_major(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.r(batch[0].transpose(0, 1))[0]
    z = cut(m.o(h.flatten(0, 1)), groups=len(h))
    return F.cross_entropy(z, batch[1].repeat(len(h)))


def without_a_head(m: Any, batch: Any, cut: Any) -> Tensor:
    out, (h, c) = m.r(batch[0].transpose(0, 1))
    return cut(out, dim=1).square().mean() + cut(h[0]).pow(4).sum(1).mean() + cut(c[0]).square().sum(1).mean()


class Gpt(nn.Module):
    def __init__(self, cut_dim: int = 0) -> None:
        super().__init__()
        self.e = nn.Embedding(20, 8)
        self.t = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.n = nn.LayerNorm(8)


def gpt(m: Any, batch: Any, cut: Any) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(batch.shape[1], dtype=torch.float64)
    z = cut(F.linear(m.n(m.t(m.e(batch), src_mask=mask)), m.e.weight))
    return F.cross_entropy(z[:, :-1].reshape(-1, 20), batch[:, 1:].reshape(-1))


def tied(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.e(batch).mean(1)
    return F.cross_entropy(cut(h @ m.e.weight.T), batch[:, 0])


def learned_positions(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(m.e(batch) + m.p)
    return z.square().mean() + z.mean(1).pow(4).sum()


def one_output_a_step(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.mse_loss(cut(m.o(m.e(batch[0]).tanh())).squeeze(-1), batch[0].sum(-1))


def sigmoid_pairs(m: Any, batch: Any, cut: Any) -> Tensor:
    a, b = F.normalize(cut(m.i(batch[0])), dim=1), F.normalize(cut(m.j(batch[0][:, :2])), dim=1)
    labels = 2 * torch.eye(len(a)) - 1
    return -F.logsigmoid(labels * (m.t.exp() * a @ b.T + m.b)).sum() / len(a)


# ------------------------------------------------------------------ weights that are still zero


def zeros(layer: Any) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    module: nn.Module = layer
    return module


def zero_convolution(m: Any, batch: Any, cut: Any) -> Tensor:
    x = batch[0][:, None, :, None].expand(-1, 2, -1, 3)
    return (cut(m(x)) - x[:, :1]).square().mean()


def layer_scale(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m.a(batch[0]) * m.s), batch[1])


# ------------------------------------------------------------------ parameters picked by the batch


def factors(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.mse_loss((cut(m.u(batch[0])) * cut(m.v(batch[1]))).sum(1), batch[2])


def indexed_factors(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.mse_loss((cut(m.u[batch[0]]) * cut(m.v[batch[1]])).sum(1), batch[2])


def bags(m: Any, batch: Any, cut: Any) -> Tensor:
    return cut(m(batch)).pow(4).mean()


# ------------------------------------------------------------------ hidden parameters


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b = trunk(), nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, C))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.b, self.a(x), use_reentrant=self.reentrant)
        return out


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x


def own_function(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(OwnFunction.apply(m.f(batch[0]), m.w)), batch[1])


def batchnorm_last() -> nn.Module:
    return nn.Sequential(nn.Linear(X, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, C), nn.BatchNorm1d(C))


CASES = {
    "ArcFace, fewer classes than samples": Case(lambda: Parts(f=trunk(), w=torch.randn(C, H)), points, arcface),
    "ArcFace, as many classes as samples": Case(lambda: Parts(f=trunk(), w=torch.randn(B, H)), points, arcface),
    "ArcFace, more classes than samples": Case(lambda: Parts(f=trunk(), w=torch.randn(3 * B, H)), points, arcface),
    "weights times a constant": Case(lambda: Parts(f=trunk(), w=torch.randn(C, H)), points, masked_weights),
    "hypernetwork": Case(
        lambda: Parts(f=trunk(), hyper=nn.Linear(3, C * H), code=torch.randn(3)), points, hypernetwork
    ),
    "weights of each sample": Case(
        lambda: Parts(net=nn.Linear(X, H), hyper=nn.Linear(X, C * H)), points, weights_of_each_sample
    ),
    "product by hand": Case(lambda: Parts(f=trunk(), w=torch.randn(C, H), b=torch.randn(C)), points, by_hand),
    "LoRA": Case(
        lambda: Parts(f=trunk(), w=nn.Linear(H, C), a=torch.randn(H, 2), b=torch.randn(2, C)),
        points,
        weight_and_low_rank,
    ),
    "LoRA, not trained yet": Case(
        lambda: Parts(f=trunk(), w=nn.Linear(H, C), a=torch.randn(H, 2), b=torch.zeros(2, C)),
        points,
        weight_and_low_rank,
    ),
    "last layer of zeros": Case(lambda: nn.Sequential(trunk(), zeros(nn.Linear(H, C))), points, cross_entropy),
    "last convolution of zeros": Case(lambda: zeros(nn.Conv2d(2, 1, 1)), points, zero_convolution),
    "layer scale of zeros": Case(lambda: Parts(a=nn.Linear(X, C), s=torch.zeros(C)), points, layer_scale),
    "one output a step": Case(lambda: Parts(e=nn.Linear(X, H), o=nn.Linear(H, 1)), sequences, one_output_a_step),
    "SigLIP": Case(
        lambda: Parts(i=nn.Linear(X, H), j=nn.Linear(2, H), t=torch.zeros(()), b=torch.zeros(())), points, sigmoid_pairs
    ),
    "weight_norm": Case(lambda: Parametrized(parametrizations.weight_norm), points, cross_entropy),
    "spectral_norm": Case(lambda: Parametrized(parametrizations.spectral_norm), points, cross_entropy),
    "orthogonal": Case(lambda: Parametrized(parametrizations.orthogonal), points, cross_entropy, tolerance=1e-6),
    "LSTM, time-major": Case(TimeMajor, sequences, time_major),
    "LSTM, time-major and flat": Case(TimeMajor, sequences, flat_time_major),
    "LSTM without a head": Case(TimeMajor, sequences, without_a_head, scored=False),
    "GPT, tied head": Case(Gpt, tokens, gpt),
    "tied embeddings": Case(Gpt, tokens, tied),
    "learned positions": Case(lambda: Parts(e=nn.Embedding(20, 8), p=torch.randn(B, 8)), tokens, learned_positions),
    "matrix factorisation": Case(lambda: Parts(u=nn.Embedding(9, 3), v=nn.Embedding(7, 3)), pairs, factors),
    "sparse matrix factorisation": Case(
        lambda: Parts(u=nn.Embedding(9, 3, sparse=True), v=nn.Embedding(7, 3, sparse=True)), pairs, factors
    ),
    "indexed parameters": Case(lambda: Parts(u=torch.randn(9, 3), v=torch.randn(7, 3)), pairs, indexed_factors),
    "bags of embeddings": Case(lambda: nn.EmbeddingBag(20, 8, mode="sum"), tokens, bags),
    "checkpoint": Case(lambda: Checkpointed(False), points, cross_entropy),
    "reentrant checkpoint": Case(lambda: Checkpointed(True), points, cross_entropy),
    "autograd function of one's own": Case(lambda: Parts(f=trunk(), w=torch.randn(C, H)), points, own_function),
    "BatchNorm last": Case(batchnorm_last, points, cross_entropy),
}


@pytest.mark.parametrize("execution", ["mask", "partial"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_masked_rows(name: str, execution: Execution) -> None:
    found = check(CASES[name], execution)
    assert not found.unclear
