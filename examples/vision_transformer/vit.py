"""Train a small ViT on CIFAR-10, with flash, memory-efficient or math attention as torch chooses or as you ask.

    python examples/vision_transformer/vit.py --root cifar10.npz --method ours
    python examples/vision_transformer/vit.py --root cifar10.npz --backends true       # which of them work here

`scaled_dot_product_attention` is torch's door to FlashAttention 2 (on NVIDIA GPUs) and to a flash kernel for CPUs. The
backward over selected rows has rules for all of its kernels.
"""

from contextlib import nullcontext
from typing import Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ast.demo import ImageData
from lightning_ast.demo.models import ImageClassifier
from lightning_ast.recipes import Comparison, ViT, chance, one_cycle
from lightning_ast.testing import check_partial_backward

Method = Literal["dense", "shortened", "random", "partial", "ours"]
Attention = Literal["flash", "efficient", "math"]
RUNS = Comparison(
    epochs=6,
    shortened=0.92,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "keep", "target_activation_rate": 0.89, "significance": chance},
        "partial": {"mode": "partial", "target_coverage": 0.9},
        "ours": {"mode": "prune", "target_coverage": 0.9},
    },
)
IMAGES = 4000
BACKENDS: dict[Attention, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class VisionTransformer(ImageClassifier):
    """A ViT with AdamW; loss, accuracy and validation are those of any image classifier."""

    def __init__(self, lr: float = 2e-3, attention: Attention | None = None):
        super().__init__(ViT(size=32, patch=4, width=64, layers=3, heads=4), lr=lr)
        self.attention = attention

    def forward(self, images):
        with sdpa_kernel(BACKENDS[self.attention]) if self.attention else nullcontext():
            return self.net(images)

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05))


def train(
    method: Method = "ours",
    *,
    seed: int = 0,
    max_steps: int = -1,
    root: str = "data",
    attention: Attention | None = None,
) -> dict[str, float]:
    """Train once; return the test accuracy, and the work as a share of the dense run's."""
    data = ImageData("cifar10", root=root, batch_size=128, train_limit=IMAGES)
    data.setup("fit")
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(data.train_dataloader()), max_steps=max_steps, limit_val_batches=0)
    model = VisionTransformer(attention=attention)
    trainer.fit(model, datamodule=data)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    return {"test_accuracy": scores["val_acc"], "work": RUNS.work(method, trainer)}


def check_backends() -> dict[str, float | None]:
    """Compare partial with masked gradients under each kernel: the relative error, None where it does not run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    batch = torch.randn(16, 3, 32, 32, device=device), torch.randint(0, 10, (16,), device=device)
    errors: dict[str, float | None] = {}
    for name in BACKENDS:
        model = VisionTransformer(attention=name).to(device)
        try:
            errors[name] = check_partial_backward(model, batch).relative_error
        except RuntimeError:  # torch: no such kernel on this device
            errors[name] = None
    return errors


def main(*, backends: bool = False, **options) -> None:
    """Train and print the figures.

    Args:
        backends: Whether to only check which kernels work on this machine.
        options: The arguments of ``train``.
    """
    print(check_backends() if backends else train(**options))


if __name__ == "__main__":
    auto_cli(main)
