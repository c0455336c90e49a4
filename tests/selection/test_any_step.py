"""Training steps and batches of every form, untouched, in every mode, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from tests.helpers.training import MODES
from tests.selection.plain_loop import B, Zoo, check, train

X, H, C, STEPS = 6, 8, 4, 4


def points(steps: int = STEPS) -> TensorDataset:
    torch.manual_seed(1)
    n = B * steps
    return TensorDataset(torch.randn(n, X).double(), torch.rand(n).double(), torch.randint(0, C, (n,)))


def sequences() -> TensorDataset:
    """As many steps as there are samples in a batch."""
    torch.manual_seed(1)
    return TensorDataset(torch.randn(B * STEPS, B, X).double(), torch.randint(0, C, (B * STEPS,)))


def mlp(out: int = C) -> nn.Module:
    return nn.Sequential(nn.Linear(X, H), nn.Tanh(), nn.Linear(H, out))


def net(out: int = C) -> dict[str, Any]:
    return {"net": mlp(out)}


def classified(m: Any, batch: Any, i: int) -> Tensor:
    return F.cross_entropy(m.cut(m.net(batch[0])), batch[-1])


# ------------------------------------------------------------------ derivatives in the step


def gradient_penalty(m: Any, batch: Any, i: int) -> Tensor:
    x = batch[0].clone().requires_grad_()
    out = m.net(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    rows = m.cut(torch.cat([out, (slope.norm(dim=1, keepdim=True) - 1).square()], 1))
    return rows.sum(1).mean()


def force_field(m: Any, batch: Any, i: int) -> Tensor:
    x = batch[0].clone().requires_grad_()
    energy = m.net(x).squeeze(1)
    (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    rows = m.cut(torch.cat([energy[:, None] - batch[1][:, None], force], 1))
    return rows.square().sum(1).mean()


# ------------------------------------------------------------------ manual optimization


def gan_parts() -> dict[str, Any]:
    return {"g": nn.Sequential(nn.Linear(2, H), nn.ReLU(), nn.Linear(H, X)), "d": mlp(1)}


def gan_optimizers(m: Any) -> list[Any]:
    return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (m.g, m.d)]


def generator_turn(m: Any, x: Tensor) -> None:
    optimizer = m.optimizers()[0]
    optimizer.zero_grad()
    m.manual_backward(F.softplus(-m.cut(m.d(m.g(x[:, :2])))).mean())
    optimizer.step()


def discriminator_turn(m: Any, x: Tensor) -> None:
    optimizer = m.optimizers()[1]
    optimizer.zero_grad()
    fake = m.cut(m.d(m.g(x[:, :2]).detach()))
    m.manual_backward(F.softplus(-m.cut(m.d(x))).mean() + F.softplus(fake).mean())
    optimizer.step()


def generator_first(m: Any, batch: Any, i: int) -> None:
    generator_turn(m, batch[0])
    discriminator_turn(m, batch[0])


def discriminator_first(m: Any, batch: Any, i: int) -> None:
    discriminator_turn(m, batch[0])
    generator_turn(m, batch[0])


def tbptt(m: Any, batch: Any, i: int) -> None:
    optimizer, h = m.optimizers(), None
    for part in batch[0].split(3, dim=1):
        y, h = m.r(part, h)
        optimizer.zero_grad()
        m.manual_backward(F.mse_loss(m.cut(m.o(y)).squeeze(-1), part.sum(-1)))
        optimizer.step()
        h = h.detach()


def one_graph_twice(m: Any, batch: Any, i: int) -> None:
    optimizer = m.optimizers()
    optimizer.zero_grad()
    z = m.cut(m.net(batch[0]))
    m.manual_backward(F.cross_entropy(z, batch[2]), retain_graph=True)
    m.manual_backward(z.square().mean())
    optimizer.step()


def sam_by_hand(m: Any, batch: Any, i: int) -> None:
    optimizer = m.optimizers()
    m.manual_backward(classified(m, batch, i))
    moved = [(p, 0.05 * p.grad.sign()) for p in m.net.parameters()]
    with torch.no_grad():
        for p, step in moved:
            p.add_(step)
    optimizer.zero_grad()
    m.manual_backward(classified(m, batch, i))
    with torch.no_grad():
        for p, step in moved:
            p.sub_(step)
    optimizer.step()
    optimizer.zero_grad()


class Sam(torch.optim.SGD):
    """Climbs, evaluates again, comes back and steps."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        steps = [0.05 * p.grad.sign() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, steps)
        closure()
        with torch.no_grad():
            torch._foreach_sub_(parameters, steps)
        super().step()
        return loss


def lbfgs(m: Any) -> Any:
    return torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3)


def sam(m: Any) -> Any:
    return Sam(m.parameters(), lr=0.1)


# ------------------------------------------------------------------ networks


def adapters() -> dict[str, Any]:
    frozen = nn.Linear(X, C).requires_grad_(False)
    return {"trunk": nn.Linear(X, X), "frozen": frozen, "a": torch.randn(X, 2), "b": torch.zeros(2, C)}


def lora(m: Any, batch: Any, i: int) -> Tensor:
    h = m.trunk(batch[0]).tanh()
    return F.cross_entropy(m.cut(m.frozen(h) + (h @ m.a) @ m.b), batch[2])


def frozen_backbone() -> dict[str, Any]:
    return {"net": nn.Sequential(nn.Linear(X, H).requires_grad_(False), nn.Tanh(), nn.Linear(H, C))}


def checkpointed(m: Any, batch: Any, i: int) -> Tensor:
    return F.cross_entropy(m.cut(checkpoint(m.b, m.a(batch[0]).tanh(), use_reentrant=False)), batch[2])


def reentrant(m: Any, batch: Any, i: int) -> Tensor:
    return F.cross_entropy(m.cut(checkpoint(m.b, m.a(batch[0]).tanh(), use_reentrant=True)), batch[2])


def blocks() -> dict[str, Any]:
    return {"a": nn.Linear(X, H), "b": nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, C))}


def time_major(m: Any, batch: Any, i: int) -> Tensor:
    z = m.cut(m.o(m.r(batch[0].transpose(0, 1))[0]), dim=1)
    return F.cross_entropy(z.flatten(0, 1), batch[1].repeat(len(z)))


def flat_time_major(m: Any, batch: Any, i: int) -> Tensor:
    h = m.r(batch[0].transpose(0, 1))[0]
    z = m.cut(m.o(h.flatten(0, 1)), groups=len(h))
    return F.cross_entropy(z, batch[1].repeat(len(h)))


ZOO = {
    "gradient penalty": Zoo(lambda: net(1), gradient_penalty, points),
    "force field": Zoo(lambda: net(1), force_field, points),
    "GAN, generator first": Zoo(gan_parts, generator_first, points, gan_optimizers, manual=True),
    "GAN, discriminator first": Zoo(gan_parts, discriminator_first, points, gan_optimizers, manual=True),
    "TBPTT": Zoo(lambda: {"r": nn.GRU(X, H, batch_first=True), "o": nn.Linear(H, 1)}, tbptt, sequences, manual=True),
    "one graph, two backward calls": Zoo(net, one_graph_twice, points, manual=True),
    "SAM by hand": Zoo(net, sam_by_hand, points, manual=True),
    "SAM by closure": Zoo(net, classified, points, sam),
    "LBFGS": Zoo(net, classified, points, lbfgs),
    "LoRA": Zoo(adapters, lora, points),
    "frozen backbone": Zoo(frozen_backbone, classified, points),
    "checkpoint": Zoo(blocks, checkpointed, points),
    "reentrant checkpoint": Zoo(blocks, reentrant, points),
    "time-major, T == B": Zoo(lambda: {"r": nn.LSTM(X, H), "o": nn.Linear(H, C)}, time_major, sequences),
    "time-major and flat, T == B": Zoo(lambda: {"r": nn.LSTM(X, H), "o": nn.Linear(H, C)}, flat_time_major, sequences),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ZOO)
def test_it_trains_as_a_plain_loop(name: str, mode: str) -> None:
    check(ZOO[name], mode)


# ------------------------------------------------------------------ batches


def list_of_images(rows: list[Any]) -> tuple[list[Tensor], Tensor]:
    return [x for x, _ in rows], torch.stack([y for _, y in rows])


def of_a_list(m: Any, batch: Any, i: int) -> Tensor:
    z = torch.stack([m.net(x[None]).mean((2, 3)).squeeze(0) for x in batch[0]])
    return F.cross_entropy(m.cut(m.o(z)), batch[1])


@pytest.mark.filterwarnings("ignore:.*aten.select.int")  # each image runs through the network on its own
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "size"), [(3, 3), (1, 8), (8, 8), (4, 8)])
def test_lists_of_images_of_any_number_of_channels(channels: int, size: int, mode: str) -> None:
    torch.manual_seed(1)
    images = [(torch.rand(channels, 5 + k % 3, 6).double(), torch.tensor(k % C)) for k in range(4 * size)]
    zoo = Zoo(
        lambda: {"net": nn.Conv2d(channels, H, 3), "o": nn.Linear(H, C)},
        of_a_list,
        lambda: images,
        collate=list_of_images,
        size=size,
    )
    check(zoo, mode, min_selected=1)


def with_shared(rows: list[Any], count: int) -> dict[str, Any]:
    x, _, y = (torch.stack(part) for part in zip(*rows, strict=True))
    shared = torch.linspace(0, 1, count * X).view(count, X).double()
    return {"a": shared, "b": 2 * shared, "c": shared + 1, "x": x, "y": y}


def of_a_dict(m: Any, batch: Any, i: int) -> Tensor:
    moved = batch["x"] + batch["a"].mean(0) + batch["b"].sum(0) - batch["c"].mean(0)
    return F.cross_entropy(m.cut(m.net(moved)), batch["y"])


@pytest.mark.parametrize("mode", ["mask", "partial", "prune"])
@pytest.mark.parametrize("count", [1, 3, B, 2 * B])
def test_shared_tensors_of_any_leading_size(count: int, mode: str) -> None:
    zoo = Zoo(net, of_a_dict, points, collate=lambda rows: with_shared(rows, count))
    if count != B:
        check(zoo, mode)
        return
    with pytest.warns(UserWarning, match="mixes the samples of a batch"):  # as it does when they are the samples'
        check(zoo, mode)


# ------------------------------------------------------------------ detection


def photographs() -> list[Any]:
    torch.manual_seed(1)
    boxes = torch.tensor([[2.0, 3.0, 20.0, 24.0], [8.0, 8.0, 30.0, 30.0]]).double()
    labels = torch.tensor([1, 2])
    return [
        (torch.rand(3, 32 + 4 * (k % 3), 32).double(), {"boxes": boxes[: 1 + k % 2], "labels": labels[: 1 + k % 2]})
        for k in range(16)
    ]


def side_by_side(rows: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*rows, strict=True))


def sizes_of_detectors() -> dict[str, Any]:
    anchors = pytest.importorskip("torchvision.models.detection.anchor_utils")
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
    backbone.out_channels = 8  # type: ignore[assignment]
    generator = anchors.AnchorGenerator(((8, 16),), ((1.0,),))
    return {"backbone": backbone, "num_classes": 3, "anchors": generator, "min_size": 32, "max_size": 48}


def retina_net() -> dict[str, Any]:
    options = sizes_of_detectors()
    detection = pytest.importorskip("torchvision.models.detection")
    return {"net": detection.RetinaNet(anchor_generator=options.pop("anchors"), **options)}


def faster_rcnn() -> dict[str, Any]:
    options = sizes_of_detectors()
    models = pytest.importorskip("torchvision.models.detection.faster_rcnn")
    ops = pytest.importorskip("torchvision.ops")
    net = models.FasterRCNN(
        rpn_anchor_generator=options.pop("anchors"),
        box_roi_pool=ops.MultiScaleRoIAlign(["0"], 3, 2),
        box_head=models.TwoMLPHead(8 * 9, 16),
        box_predictor=models.FastRCNNPredictor(16, options.pop("num_classes")),
        **options,
    )
    return {"net": net}


def losses_of_images(m: Any, batch: Any, i: int) -> Tensor:
    total: Tensor = sum(m.net(list(batch[0]), list(batch[1])).values())
    return total


def losses_of_retina_net(m: Any, batch: Any, i: int) -> Tensor:
    head = m.net.head
    last = (head.classification_head.cls_logits, head.regression_head.bbox_reg)
    handles = [layer.register_forward_hook(lambda _, args, out: m.cut(out)) for layer in last]
    loss = losses_of_images(m, batch, i)
    for handle in handles:
        handle.remove()
    return loss


@pytest.mark.parametrize("mode", MODES)
def test_retina_net_selects_images(mode: str) -> None:
    check(Zoo(retina_net, losses_of_retina_net, photographs, collate=side_by_side, size=4), mode)


@pytest.mark.parametrize("mode", MODES)
def test_faster_rcnn_selects_images_and_keeps_all_proposals(mode: str) -> None:
    zoo = Zoo(faster_rcnn, losses_of_images, photographs, collate=side_by_side, size=4)
    with pytest.warns(UserWarning, match=r"enters AddmmBackward0 \(.*not one or several a sample of the 4"):
        run = train(zoo, mode)
    assert run.selection.savings["samples"] > 0.1
