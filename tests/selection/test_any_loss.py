"""Losses of every form in an untouched training step, in every mode, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.helpers.training import MODES
from tests.selection.plain_loop import B, Zoo, check

X, H, C, STEPS = 6, 8, 4, 4


def points(steps: int = STEPS) -> TensorDataset:
    torch.manual_seed(1)
    n = B * steps
    return TensorDataset(torch.randn(n, X).double(), torch.rand(n).double(), torch.randint(0, C, (n,)))


def images() -> TensorDataset:
    torch.manual_seed(1)
    x = torch.rand(B * STEPS, 3, 6, 6).double()
    return TensorDataset(x, (x.mean(1) > 0.5).long())


def tokens() -> TensorDataset:
    """As many tokens as there are samples in a batch."""
    torch.manual_seed(1)
    return TensorDataset(torch.randint(0, 20, (B * STEPS, B)), torch.randint(0, C, (B * STEPS,)))


def mlp(out: int = C) -> nn.Module:
    return nn.Sequential(nn.Linear(X, H), nn.Tanh(), nn.Linear(H, out))


def net(out: int = C) -> dict[str, Any]:
    return {"net": mlp(out)}


def heads() -> dict[str, Any]:
    return {"trunk": nn.Linear(X, H), "a": nn.Linear(H, C), "b": nn.Linear(H, 1), "w": torch.zeros(2)}


def weighted_heads(m: Any, batch: Any, i: int) -> Tensor:
    x, r, y = batch
    h = m.trunk(x).tanh()
    return F.cross_entropy(m.cut(m.a(h)), y) + 0.3 * F.mse_loss(m.cut(m.b(h)).squeeze(1), r) + 0 * m.w.sum()


def learned_weights(m: Any, batch: Any, i: int) -> Tensor:
    x, r, y = batch
    h = m.trunk(x).tanh()
    losses = torch.stack([F.cross_entropy(m.cut(m.a(h)), y), F.mse_loss(m.cut(m.b(h)).squeeze(1), r)])
    return ((-m.w).exp() * losses + m.w).sum()


def distillation(m: Any, batch: Any, i: int) -> Tensor:
    x, _, y = batch
    z = m.cut(m.net(x))
    with torch.no_grad():
        t = m.teacher(x)
    m.log("beside", F.mse_loss(z, t))
    kl = F.kl_div((z / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    return 0.5 * F.cross_entropy(z, y) + 2 * kl


def distilled() -> dict[str, Any]:
    return {"net": mlp(), "teacher": mlp().requires_grad_(False)}


def vae(m: Any, batch: Any, i: int) -> Tensor:
    x = batch[0]
    mu, log_var = m.e(x).chunk(2, 1)
    r = m.cut(m.d(mu + torch.randn_like(mu) * (log_var / 2).exp()))
    mu, log_var = m.cut(torch.cat([mu, log_var], 1), nested=True).chunk(2, 1)
    kl = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(1)
    return (r - x).square().sum() / len(x) + kl.mean()


def mixup(m: Any, batch: Any, i: int) -> Tensor:
    x, _, y = batch
    share = 0.2 + 0.5 * float(torch.rand(()))
    other = torch.randperm(len(x))
    z = m.cut(m.net(share * x + (1 - share) * x[other]))
    return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[other])


def focal(m: Any, batch: Any, i: int) -> Tensor:
    losses = F.cross_entropy(m.cut(m.net(batch[0])), batch[2], reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def torchvision_focal(m: Any, batch: Any, i: int) -> Tensor:
    ops = pytest.importorskip("torchvision.ops")
    target = F.one_hot(batch[2], C).to(batch[0])
    loss: Tensor = ops.sigmoid_focal_loss(m.cut(m.net(batch[0])), target, reduction="mean")
    return loss


def dice(m: Any, batch: Any, i: int) -> Tensor:
    x, y = batch
    z = m.cut(m.net(x))
    p, q = z.softmax(1)[:, 1], y.to(x)
    jaccard = (p * q).sum() / (p + q - p * q).sum()
    return 1 - (2 * (p * q).sum() + 1) / (p.sum() + q.sum() + 1) + (1 - jaccard) + F.cross_entropy(z, y)


def segmenting() -> dict[str, Any]:
    return {"net": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))}


def averaged_by_hand(m: Any, batch: Any, i: int) -> Tensor:
    return (F.cross_entropy(m.cut(m.net(batch[0])), batch[2], reduction="none") * batch[1]).mean()


def quantiles(m: Any, batch: Any, i: int) -> Tensor:
    errors = batch[1][:, None] - m.cut(m.net(batch[0]))
    q = torch.tensor([0.1, 0.5, 0.9]).to(errors)
    return torch.maximum(q * errors, (q - 1) * errors).sum(1).mean()


def clip(m: Any, batch: Any, i: int) -> Tensor:
    a, b = F.normalize(m.cut(m.net(batch[0])), dim=1), F.normalize(m.cut(m.text(batch[0][:, :2])), dim=1)
    similar, target = m.t.exp() * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2


def simclr(m: Any, batch: Any, i: int) -> Tensor:
    z = F.normalize(m.cut(m.net(torch.cat([batch[0], batch[0].flip(1)])), groups=2), dim=1)
    similar = (z @ z.T / 0.2).fill_diagonal_(-1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(z) // 2))


def vicreg(m: Any, batch: Any, i: int) -> Tensor:
    a, b = (m.cut(m.net(view)) for view in (batch[0], batch[0].flip(1)))
    spread = sum((1 - (z.var(0) + 1e-4).sqrt()).relu().mean() for z in (a, b))
    covariance = sum(torch.cov(z.T).triu(1).square().sum() for z in (a, b))
    return F.mse_loss(a, b) + spread + covariance


def barlow_twins(m: Any, batch: Any, i: int) -> Tensor:
    a, b = (m.cut(m.net(view)) for view in (batch[0], batch[0].flip(1)))
    a, b = ((z - z.mean(0)) / (z.std(0) + 1e-2) for z in (a, b))
    return (a.T @ b / len(a) - torch.eye(C).to(a)).square().sum()


def arcface(m: Any, batch: Any, i: int) -> Tensor:
    z = m.cut(F.linear(F.normalize(m.net(batch[0]), dim=1), F.normalize(m.w, dim=1)))
    return F.cross_entropy(8 * z, batch[2])


def tied(m: Any, batch: Any, i: int) -> Tensor:
    h = m.t(m.e(batch[0]))
    z = m.cut(h @ m.e.weight.T)
    return F.cross_entropy(z[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def tied_parts() -> dict[str, Any]:
    return {"e": nn.Embedding(20, 8), "t": nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)}


def logged_beside(m: Any, batch: Any, i: int) -> Tensor:
    z = m.cut(m.net(batch[0]))
    m.log("no_gradient", F.mse_loss(z.detach().mean(1), batch[1]))
    m.log("with_gradient", F.mse_loss(z.mean(1), batch[1]))
    return F.cross_entropy(z, batch[2])


def later_term(m: Any, batch: Any, i: int) -> Tensor:
    z = m.net(batch[0])
    loss = F.cross_entropy(m.cut(z), batch[2])
    return loss + m.cut(m.b(batch[0])).square().mean() if i >= 2 else loss


ZOO = {
    "two heads with weights": Zoo(heads, weighted_heads, points),
    "two heads with learned weights": Zoo(heads, learned_weights, points),
    "distillation": Zoo(distilled, distillation, points),
    "VAE": Zoo(lambda: {"e": nn.Linear(X, 4), "d": nn.Linear(2, X)}, vae, points),
    "focal": Zoo(net, focal, points),
    "torchvision's focal loss": Zoo(net, torchvision_focal, points),
    "Dice and Jaccard over the batch": Zoo(segmenting, dice, images),
    "averaged by hand": Zoo(net, averaged_by_hand, points),
    "quantiles": Zoo(lambda: net(3), quantiles, points),
    "CLIP": Zoo(lambda: {"net": mlp(), "text": nn.Linear(2, C), "t": torch.zeros(())}, clip, points),
    "SimCLR": Zoo(net, simclr, points),
    "VICReg": Zoo(net, vicreg, points),
    "Barlow Twins": Zoo(net, barlow_twins, points),
    "ArcFace": Zoo(lambda: {"net": mlp(H), "w": torch.randn(C, H)}, arcface, points),
    "ArcFace with as many classes as samples": Zoo(lambda: {"net": mlp(H), "w": torch.randn(B, H)}, arcface, points),
    "tied embeddings": Zoo(tied_parts, tied, tokens),
    "a loss that is logged beside": Zoo(net, logged_beside, points),
    "a term of as many outputs as samples that begins later": Zoo(
        lambda: {"net": mlp(), "b": nn.Linear(X, B)}, later_term, points
    ),
    "a term that begins later": Zoo(lambda: {"net": mlp(), "b": nn.Linear(X, 3)}, later_term, points),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_it_trains_as_a_plain_loop(name: str, mode: str) -> None:
    check(ZOO[name], mode)


@pytest.mark.parametrize("mode", MODES)
def test_mixup_with_two_criteria(mode: str) -> None:
    with pytest.warns(UserWarning, match="mixes the samples of a batch"):
        check(Zoo(net, mixup, points), mode)
