"""Train a small ViT on CIFAR-10, with flash, memory-efficient or math attention as torch chooses or as you ask.

    python examples/vision_transformer/vit.py --root cifar10.npz --method ours
    python examples/vision_transformer/vit.py --root cifar10.npz --backends       # which of them work here

`scaled_dot_product_attention` is torch's door to FlashAttention 2 (on NVIDIA GPUs) and to a flash kernel for CPUs. The
backward over selected rows has rules for all of its kernels.
"""

import argparse
from contextlib import nullcontext

import lightning as L
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo import ImageData
from lightning_ast.demo.models import ImageClassifier
from lightning_ast.recipes import QUIET, ViT, chance, counting, one_cycle, work_share
from lightning_ast.testing import check_partial_backward

METHODS = ("dense", "shortened", "random", "partial", "ours")
EPOCHS = 6
SHORTENED = 0.92  # of the dense run's steps: the work of "ours"
RANDOM_RATE = 0.89  # the share that "ours" comes to
IMAGES = 4000
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class VisionTransformer(ImageClassifier):
    """A ViT with AdamW; loss, accuracy and validation are those of any image classifier."""

    def __init__(self, lr: float = 2e-3, attention: str | None = None):
        super().__init__(ViT(size=32, patch=4, width=64, layers=3, heads=4), lr=lr)
        self.attention = attention

    def forward(self, images):
        with sdpa_kernel(BACKENDS[self.attention]) if self.attention else nullcontext():
            return self.net(images)

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05))


def callbacks(method):
    """Return what differs between the methods."""
    stages = TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1)
    if method == "ours":
        return [SparseSelectionCallback(mode="prune", target_coverage=0.9), stages]
    if method == "partial":
        return [SparseSelectionCallback(mode="partial", target_coverage=0.9), stages]
    if method == "random":
        rate = {"target_activation_rate": RANDOM_RATE, "significance": chance}
        return [SparseSelectionCallback(mode="prune", prune_steps="keep", **rate), stages]
    return [counting()]


def train(
    method: str, *, seed: int = 0, max_steps: int = -1, root: str = "data", attention: str | None = None
) -> dict[str, float]:
    """Train once; return the test accuracy, and the work as a share of the dense run's."""
    data = ImageData("cifar10", root=root, batch_size=128, train_limit=IMAGES)
    data.setup("fit")
    steps = round(SHORTENED * EPOCHS * len(data.train_dataloader())) if method == "shortened" else max_steps
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=EPOCHS, max_steps=steps, callbacks=callbacks(method), limit_val_batches=0, **QUIET)
    model = VisionTransformer(attention=attention)
    trainer.fit(model, datamodule=data)
    (scores,) = trainer.test(model, datamodule=data, verbose=False)
    return {
        "test_accuracy": scores["val_acc"],
        "work": work_share(trainer, length=SHORTENED if method == "shortened" else 1),
    }


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


def main() -> None:
    """Read the arguments, train, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; -1 trains to the end")
    parser.add_argument("--root", default="data", help="a folder with CIFAR-10, or a prepared .npz file")
    parser.add_argument("--attention", choices=list(BACKENDS), help="by default as torch chooses")
    parser.add_argument("--backends", action="store_true", help="only check which kernels work on this machine")
    options = vars(parser.parse_args())
    print(check_backends() if options.pop("backends") else train(**options))


if __name__ == "__main__":
    main()
