"""Where the gradient of a loss enters the network: losses of every form, against ordinary row masking."""

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


def images(size: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(size, 3, 8, 8)
    return x, (x.mean(1) > 0.5).long()


def mlp(out: int = C) -> nn.Module:
    return nn.Sequential(nn.Linear(X, H), nn.Tanh(), nn.Linear(H, out))


def heads(**more: Any) -> Parts:
    return Parts(trunk=nn.Sequential(nn.Linear(X, H), nn.Tanh()), a=nn.Linear(H, C), b=nn.Linear(H, 1), **more)


# ------------------------------------------------------------------ one output


def cross_entropy(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m(batch[0])), batch[1])


def of_a_sum(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m(batch[0])), batch[1], reduction="sum")


def by_hand_with_kl(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(m(batch[0]))
    own = (z.logsumexp(1) - z.gather(1, batch[1][:, None]).squeeze(1)).pow(1.5).mean()
    return own + F.kl_div(z.log_softmax(1), batch[0][:, :C].softmax(1), reduction="batchmean")


def focal(m: Any, batch: Any, cut: Any) -> Tensor:
    losses = F.cross_entropy(cut(m(batch[0])), batch[1], reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def two_losses_of_one_tensor(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(m(batch[0]))
    return F.cross_entropy(z, batch[1]) + 0.1 * F.multi_margin_loss(z, batch[1])


def one_output(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.smooth_l1_loss(cut(m(batch[0])).squeeze(1), batch[0].sum(1))


def one_weight(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.mse_loss(cut(m(batch[0][:, :1])), batch[0][:, 1:2])


def dice(m: Any, batch: Any, cut: Any) -> Tensor:
    u = m.a(batch[0]).relu()
    z = cut(m.o(torch.cat([u, m.c(m.b(u).relu()).relu()], 1)))
    p, q = z.softmax(1)[:, 1], batch[1].double()
    return 1 - (2 * (p * q).sum() + 1) / (p.sum() + q.sum() + 1) + 0.5 * F.cross_entropy(z, batch[1])


def unet() -> nn.Module:
    return Parts(
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(4, 8, 3, padding=1, stride=2),
        c=nn.ConvTranspose2d(8, 4, 2, 2),
        o=nn.Conv2d(8, 2, 1),
    )


def changed_in_place(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(m(batch[0])).clone()
    z[:, 0] = 0
    z.mul_(2)
    return F.cross_entropy(z, batch[1])


def complex_numbers(m: Any, batch: Any, cut: Any) -> Tensor:
    spectrum = torch.fft.rfft(m.net(batch[0]), dim=1)
    z = cut(spectrum * m.filter)
    return z.abs().square().sum(1).mean() + torch.fft.irfft(z, n=H, dim=1).pow(4).mean()


def group_of_two(m: Any, batch: Any, cut: Any) -> Tensor:
    z = cut(m(torch.cat([batch[0], batch[0].flip(1)])), groups=2)
    a, b = z.chunk(2)
    return F.cross_entropy(a, batch[1]) + F.mse_loss(a, b)


# ------------------------------------------------------------------ several outputs


def two_heads(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.trunk(batch[0])
    a, b = cut(m.a(h)), cut(m.b(h))
    first, second = F.cross_entropy(a, batch[1]), F.mse_loss(b.squeeze(1), batch[0][:, 0])
    return (-m.w[0]).exp() * first + (-m.w[1]).exp() * second + m.w.sum()


def stacked_loss_weights(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.trunk(batch[0])
    a, b = cut(m.a(h)), cut(m.b(h))
    losses = torch.stack([F.cross_entropy(a, batch[1]), F.mse_loss(b.squeeze(1), batch[0][:, 0])])
    return ((-m.w).exp() * losses + m.w).sum()


def one_weight_a_loss(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.trunk(batch[0])
    first = F.cross_entropy(cut(m.a(h)), batch[1], reduction="none")
    second = (cut(m.b(h)).squeeze(1) - batch[0][:, 0]).square()
    return (m.w * torch.stack([first.mean(), second.mean()])).sum()


def scalar_temperature(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m.net(batch[0])) * m.t.exp(), batch[1])


def temperature_of_each_class(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m.net(batch[0]) / m.t.exp()), batch[1])


def loss_weight_of_each_class(m: Any, batch: Any, cut: Any) -> Tensor:
    losses = F.cross_entropy(cut(m.net(batch[0])), batch[1], reduction="none")
    return (losses * cut(m.t[batch[1]])).mean()


def deep_supervision(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.trunk(batch[0])
    return F.cross_entropy(cut(m.a(m.c(h).relu())), batch[1]) + 0.4 * F.cross_entropy(cut(m.d(h)), batch[1])


def gan_discriminator(m: Any, batch: Any, cut: Any) -> Tensor:
    fake = m.g(batch[0][:, :2]).detach()
    return F.softplus(-cut(m.d(batch[0]))).mean() + F.softplus(cut(m.d(fake))).mean()


def gan_generator(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.softplus(-cut(m.d(m.g(batch[0][:, :2])))).mean()


def gan_of_frozen_discriminator() -> nn.Module:
    m = gan()
    m.d.requires_grad_(False)
    return m


def through_frozen(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.softplus(-m.d(cut(m.g(batch[0][:, :2])))).mean()


def gan() -> Any:
    return Parts(g=nn.Sequential(nn.Linear(2, H), nn.ReLU(), nn.Linear(H, X)), d=mlp(1))


# ------------------------------------------------------------------ what is flat or hidden at the sample that is followed


def points_of_one_class(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, X), torch.ones(size, dtype=torch.long)


def points_and_margin(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A margin that all samples keep in the first batch, and none in the second."""
    return (*points(size), torch.full((size, 1), -100.0 if size == B else 100.0))


def margin_that_is_kept(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.trunk(batch[0])
    return F.cross_entropy(cut(m.a(h)), batch[1]) + (cut(m.b(h)) + batch[2]).relu().square().mean()


def masked_similarity(m: Any, batch: Any, cut: Any) -> Tensor:
    z = F.normalize(cut(m(torch.cat([batch[0], batch[0].flip(1)])), groups=2), dim=1)
    similar = (z @ z.T / 0.2).masked_fill(torch.eye(len(z)).bool(), -1e9)
    return F.cross_entropy(similar, torch.arange(len(z)).roll(len(z) // 2))


def masked_classes(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.cross_entropy(cut(m(batch[0])) + torch.tensor([0.0, 0.0, 0.0, -1e9]), batch[1].clamp(max=2))


# ------------------------------------------------------------------ contrastive


def simclr(m: Any, batch: Any, cut: Any) -> Tensor:
    a, b = (F.normalize(cut(m(view)), dim=1) for view in (batch[0], batch[0].flip(-1)))
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def clip(m: Any, batch: Any, cut: Any) -> Tensor:
    a, b = F.normalize(cut(m.i(batch[0])), dim=1), F.normalize(cut(m.j(batch[0][:, :2])), dim=1)
    similar, target = m.t.exp() * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2


def barlow_twins(m: Any, batch: Any, cut: Any) -> Tensor:
    a, b = (cut(m(view)) for view in (batch[0], batch[0].flip(-1)))
    a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
    return (a.T @ b / len(a) - torch.eye(C)).square().sum()


def vicreg(m: Any, batch: Any, cut: Any) -> Tensor:
    a, b = (cut(m(view)) for view in (batch[0], batch[0].flip(-1)))
    spread = sum((1 - (z.var(0) + 1e-4).sqrt()).relu().mean() for z in (a, b))
    covariance = sum(torch.cov(z.T).triu(1).square().sum() for z in (a, b))
    return F.mse_loss(a, b) + spread + covariance


def triplet(m: Any, batch: Any, cut: Any) -> Tensor:
    return F.triplet_margin_loss(*(cut(m(batch[0].roll(k, 1))) for k in range(3)), margin=5.0)


# ------------------------------------------------------------------ nested entries


def vae(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.e(batch[0]).relu()
    mu, log_var = m.mu(h), m.lv(h)
    r = cut(m.d(mu + torch.randn_like(mu) * (log_var / 2).exp()))
    mu, log_var = cut(mu, nested=True), cut(log_var, nested=True)
    kl = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(1)
    return (r - batch[0]).square().sum(1).mean() + kl.mean()


def vae_of_chunks(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.e(batch[0])
    mu, log_var = h.chunk(2, 1)
    r = cut(m.d(mu + torch.randn_like(mu) * (log_var / 2).exp()))
    mu, log_var = cut(h, nested=True).chunk(2, 1)
    kl = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(1)
    return F.mse_loss(r, batch[0]) + kl.mean()


def center_loss(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.trunk(batch[0])
    distance = cut(h, nested=True) - cut(m.centers[batch[1]])
    return F.cross_entropy(cut(m.a(h)), batch[1]) + 0.5 * distance.square().sum(1).mean()


def feature_penalty(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.trunk(batch[0])
    return F.cross_entropy(cut(m.a(h)), batch[1]) + cut(h, nested=True).square().mean()


def residual_trunk(m: Any, batch: Any, cut: Any) -> Tensor:
    h = m.e(batch[0])
    f = m.c(h.relu())
    at_h, at_f = cut(h, nested=True), cut(f, nested=True)
    return F.cross_entropy(cut(m.a(h + f)), batch[1]) + (at_h + at_f).pow(4).mean()


def chain_of_networks(m: Any, batch: Any, cut: Any) -> Tensor:
    first = m.e(batch[0])
    second = m.c(first.tanh())
    third = m.a(second.tanh())
    terms = cut(first, nested=True).square().mean() + cut(second, nested=True).pow(4).mean()
    return terms + F.cross_entropy(cut(third), batch[1])


def layers(**more: Any) -> Parts:
    return Parts(e=nn.Linear(X, H), c=nn.Linear(H, H), a=nn.Linear(H, C), **more)


CASES = {
    "cross entropy": Case(mlp, points, cross_entropy),
    "sum": Case(mlp, points, of_a_sum),
    "by hand with KL": Case(mlp, points, by_hand_with_kl),
    "focal": Case(mlp, points, focal),
    "two losses of one tensor": Case(mlp, points, two_losses_of_one_tensor),
    "one output": Case(lambda: mlp(1), points, one_output),
    "one weight": Case(lambda: nn.Linear(1, 1), points, one_weight),
    "Dice over the batch": Case(unet, images, dice),
    "changed in place": Case(mlp, points, changed_in_place),
    "complex numbers": Case(
        lambda: Parts(net=mlp(H), filter=torch.randn(H // 2 + 1, dtype=torch.complex128)), points, complex_numbers
    ),
    "two views in one batch": Case(mlp, points, group_of_two),
    "two heads": Case(lambda: heads(w=torch.randn(2)), points, two_heads),
    "stacked loss weights": Case(lambda: heads(w=torch.randn(2)), points, stacked_loss_weights),
    "one weight a loss": Case(lambda: heads(w=torch.randn(2)), points, one_weight_a_loss),
    "scalar temperature": Case(lambda: Parts(net=mlp(), t=torch.zeros(())), points, scalar_temperature),
    "temperature of each class": Case(lambda: Parts(net=mlp(), t=torch.randn(C)), points, temperature_of_each_class),
    "loss weight of each class": Case(lambda: Parts(net=mlp(), t=torch.randn(C)), points, loss_weight_of_each_class),
    "deep supervision": Case(lambda: heads(c=nn.Linear(H, H), d=nn.Linear(H, C)), points, deep_supervision),
    "GAN, discriminator": Case(gan, points, gan_discriminator),
    "GAN, generator": Case(gan, points, gan_generator),
    "GAN, frozen discriminator": Case(gan_of_frozen_discriminator, points, through_frozen),
    "a margin that is kept": Case(heads, points_and_margin, margin_that_is_kept, scored=False),
    "masked similarity": Case(mlp, points, masked_similarity),
    "masked classes": Case(mlp, points, masked_classes),
    "center loss of one class": Case(lambda: heads(centers=torch.randn(C, H)), points_of_one_class, center_loss),
    "SimCLR": Case(mlp, points, simclr),
    "CLIP": Case(lambda: Parts(i=mlp(), j=nn.Linear(2, C), t=torch.zeros(())), points, clip),
    "Barlow Twins": Case(mlp, points, barlow_twins),
    "VICReg": Case(mlp, points, vicreg),
    "triplet": Case(mlp, points, triplet),
    "VAE": Case(
        lambda: Parts(e=nn.Linear(X, H), mu=nn.Linear(H, 2), lv=nn.Linear(H, 2), d=nn.Linear(2, X)), points, vae
    ),
    "VAE of chunks": Case(lambda: Parts(e=nn.Linear(X, 4), d=nn.Linear(2, X)), points, vae_of_chunks),
    "center loss": Case(lambda: heads(centers=torch.randn(C, H)), points, center_loss),
    "feature penalty": Case(heads, points, feature_penalty),
    "residual trunk": Case(layers, points, residual_trunk),
    "chain of networks": Case(layers, points, chain_of_networks),
}


@pytest.mark.parametrize("execution", ["mask", "partial"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_masked_rows(name: str, execution: Execution) -> None:
    found = check(CASES[name], execution)
    assert not found.unclear


@pytest.mark.parametrize("execution", ["mask", "partial"])
@pytest.mark.parametrize("name", ["cross entropy", "two heads", "CLIP", "VAE", "center loss", "chain of networks"])
def test_weights_are_applied_once(name: str, execution: Execution) -> None:
    check(CASES[name], execution, factors=torch.tensor([0.5, 3.0, 2.0], dtype=torch.float64))
