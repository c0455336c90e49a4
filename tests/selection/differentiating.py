"""Modules whose training step differentiates by itself, or runs on unusual tensors: what a measurement may disturb."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseLossMixin
from tests.helpers.modules import Trained

BATCH, BATCHES, CLASSES = 8, 3, 3


class Step(Trained):
    """A small network and SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs, and targets where they are not the labels."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.enable_grad():  # a scoring pass runs without
            values, target = self.losses(*batch)
            return F.cross_entropy(values, batch[1]) if target is None else F.mse_loss(values, target)

    def by_hand(self, batch: Any) -> Tensor:
        """Losses of the samples, ``(B,)``, without any hook of Lightning."""
        values, target = self.losses(*batch)
        if target is None:
            return F.cross_entropy(values, batch[1], reduction="none")
        return F.mse_loss(values, target, reduction="none").flatten(1).mean(1)


class Explicit(SparseLossMixin, Step):
    """Several terms: the loss of each sample is given."""

    def per_sample_loss(self, batch: Any, batch_idx: int = 0) -> Tensor:
        with torch.enable_grad():
            return self.by_hand(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch, batch_idx).mean()


class Pinn(Step):
    """u'' + u = 0, by two derivatives of the network's output."""

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x.detach().requires_grad_()
        u = self.net(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        return second[:, :CLASSES] + u, torch.zeros_like(u)


class ForceField(Explicit):
    """Energies, and forces as their derivatives."""

    def by_hand(self, batch: Any) -> Tensor:
        positions = batch[0].detach().requires_grad_()
        energy = self.net(positions).sum(1)
        (forces,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return (energy - batch[1]).square() + (forces + batch[0]).square().sum(1)


class Fgsm(Explicit):
    """Adversarial training by the sign of the input's gradient."""

    def by_hand(self, batch: Any) -> Tensor:
        x, y = batch
        probe = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.net(probe), y), probe)
        return F.cross_entropy(self.net(x + 0.1 * gradient.sign()), y, reduction="none")


class GradientPenalty(Explicit):
    """A critic with WGAN's penalty: a backward through a backward."""

    def by_hand(self, batch: Any) -> Tensor:
        mixed = (0.5 * batch[0]).detach().requires_grad_()
        value = self.net(mixed)
        (gradient,) = torch.autograd.grad(value, mixed, torch.ones_like(value), create_graph=True)
        return self.net(batch[0]).mean(1) + 10 * (gradient.norm(dim=1) - 1).square()


class Jagged(Step):
    """Sequences of different lengths in a jagged nested tensor, through an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(16, 4), nn.Linear(4, 4)

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = [(8 * row[: 1 + i % 4].abs()).long().clamp(max=15) for i, row in enumerate(x)]
        tokens = torch.nested.nested_tensor(rows, layout=torch.jagged)
        return self.net(self.mix(self.embed(tokens)).to_padded_tensor(0.0).sum(1)), None


class Transforms(Step):
    """vmap, grad and jvp of torch.func, and forward-mode differentiation."""

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        slope = torch.func.vmap(torch.func.grad(lambda row: self.net(row).square().sum()))(x)
        _, along = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(self.net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        return self.net(x) + slope[:, :CLASSES] + along + tangent, None


class Doubled(torch.autograd.Function):
    """Twice the input, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Custom(Step):
    """A custom Function, and a hook on what it gives."""

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        out = Doubled.apply(self.net(x))
        if out.requires_grad:
            out.register_hook(lambda gradient: 0.5 * gradient)
        return out, None


class Distilled(Step):
    """A recurrent teacher with dropout under inference mode: torch's own counter changes what it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.LSTM(4, 4, num_layers=2, dropout=0.5).requires_grad_(False)

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode():
            hint = F.linear(self.teacher(x.unsqueeze(0))[0][0], self.net[0].weight)
        out = self.net(x)
        return out, hint[:, :CLASSES].clone()


class Wrapped(Tensor):
    """A subclass with its own dispatch, as quantized and distributed tensors are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class Subclassed(Step):
    """A frozen weight that is a tensor subclass."""

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.net(torch.mm(x, Wrapped(torch.eye(4)))), None


MODULES: dict[str, type[Step]] = {
    cls.__name__: cls
    for cls in (
        Pinn,
        ForceField,
        Fgsm,
        GradientPenalty,
        Jagged,
        Transforms,
        Custom,
        Distilled,
        Subclassed,
    )
}


def data() -> DataLoader:
    """Three batches of eight samples, always in the same order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * BATCHES, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % CLASSES), batch_size=BATCH)


def fresh(name: str) -> Step:
    """The module as it always begins."""
    torch.manual_seed(0)
    module = MODULES[name]()
    torch.manual_seed(7)  # of what it draws
    return module
