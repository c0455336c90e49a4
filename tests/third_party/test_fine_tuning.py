"""peft's adapters, schedule-free optimizers and torchvision's detectors, each in a module as in their documentation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models import detection

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, loader, rows

peft = pytest.importorskip("peft")
schedulefree = pytest.importorskip("schedulefree")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
    pytest.mark.filterwarnings("ignore:lightning-ast. the gradient enters AddmmBackward0"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


class Adapted(pl.LightningModule):
    """A language model with LoRA in every linear layer, whose head is frozen: the adapters are the last that learns."""

    def __init__(self) -> None:
        super().__init__()
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **still
        )
        lora = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        self.model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


class ScheduleFree(pl.LightningModule):
    """The optimizer's own train mode, as its README asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))

    def on_train_epoch_start(self) -> None:
        self.optimizers().optimizer.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.01)


class Detector(pl.LightningModule):
    """A dict of losses, added up, as in torchvision's tutorial on detection."""

    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__()
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, padding=1)
        )
        backbone.out_channels = 16
        self.model = make(backbone, num_classes=3, min_size=32, max_size=32, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        return sum(self.model(list(images), list(targets)).values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def retinanet() -> Any:
    return Detector(detection.RetinaNet, anchor_generator=anchors())


def faster_rcnn() -> Any:
    return Detector(
        detection.FasterRCNN, rpn_anchor_generator=anchors(), rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=20
    )


def anchors() -> Any:
    return detection.anchor_utils.AnchorGenerator(((8, 16),), ((1.0,),))


def tokens() -> Any:
    ids = torch.randint(0, 50, (256, 12))
    return loader([{"input_ids": row, "labels": row} for row in ids])


def classes() -> Any:
    return loader(TensorDataset(torch.rand(512, 16), torch.randint(0, 10, (512,))))


def boxes() -> Any:
    def sample(position: int) -> Any:
        corners = torch.rand(1 + position % 3, 2) * 12
        target = {
            "boxes": torch.cat([corners, corners + 8 + torch.rand(len(corners), 2) * 8], 1),
            "labels": torch.randint(1, 3, (len(corners),)),
        }
        return torch.rand(3, 32, 32), target

    return loader([sample(i) for i in range(16)], 8, collate_fn=lambda rows: tuple(zip(*rows)))


CASES = {
    "peft": {"GPT2LMHeadModel with LoRA": Case(Adapted, tokens)},
    "schedulefree": {"AdamWScheduleFree": Case(ScheduleFree, classes)},
    "torchvision": {"RetinaNet": Case(retinanet, boxes), "FasterRCNN": Case(faster_rcnn, boxes)},
}


@rows("peft")
def test_peft(row: Outcome, mode: str) -> None:
    check_outcome(CASES["peft"][row.module], row, mode)


@rows("schedulefree")
def test_schedulefree(row: Outcome, mode: str) -> None:
    check_outcome(CASES["schedulefree"][row.module], row, mode)


@rows("torchvision")
def test_torchvision(row: Outcome, mode: str) -> None:
    check_outcome(CASES["torchvision"][row.module], row, mode)
