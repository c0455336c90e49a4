"""Gradients of partial backward against exact masking by architecture, and how far BatchNorm's approximation is off.

    python benchmarks/parity.py --root cifar10.npz

The models are those of the tests. The second half trains a small ResNet-9 on real CIFAR-10 images in `partial` and, at
the end of each epoch, compares the gradient of one sparse batch with exact masking, beside that of `subset`. Writes two
records.
"""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from record import QUIET, provenance, save
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import SampleSelector
from lightning_ast.core.significance import el2n
from lightning_ast.demo import ImageData, ResNet9
from lightning_ast.testing import check_partial_backward

sys.path.append(str(Path(__file__).parent.parent))
from tests.core.partial.models import MODELS, B, build, class_losses

SHARES = (1 / B, 0.4, 1.0)


def architectures() -> list[dict[str, Any]]:
    """Measure each model at several rates: error with `exact`, what went dense, cosine and FLOPs with `selected`."""
    rows = []
    for name, (make, data, _) in MODELS.items():
        module = build(make)
        batch = data()
        errors = []
        dense = {}
        cosines = []
        flops = []
        for share in SHARES:
            torch.manual_seed(0)
            indices = torch.randperm(B)[: round(share * B)].sort().values
            exact = check_partial_backward(module, batch, indices=indices, losses=class_losses)
            close = check_partial_backward(module, batch, indices=indices, losses=class_losses, batchnorm="selected")
            errors.append(exact.relative_error)
            dense.update(exact.dense_ops)
            cosines.append(close.cosine)
            flops.append(close.flops_share)
        rows.append({"model": name, "errors": errors, "dense_ops": dense, "cosines": cosines, "flops_shares": flops})
        print(rows[-1], flush=True)
    return rows


class Cosines(pl.Callback):
    """The cosine of `partial` and of `subset` with exact masking over all parameters, at the end of each epoch."""

    def __init__(self, batch: Any, rates: tuple[float, ...]) -> None:
        self.batch = batch
        self.rates = rates
        self.rows = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.look(trainer, module, epoch=0)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.look(trainer, module, epoch=trainer.current_epoch + 1)

    def look(self, trainer: pl.Trainer, module: pl.LightningModule, *, epoch: int) -> None:
        """Select by EL2N under the soft gate with the mode's weights, and compare."""
        with torch.random.fork_rng():
            x, y = trainer.datamodule.on_after_batch_transfer(self.batch, 0)  # as the training sees it
        before = deepcopy(module.state_dict())
        with torch.no_grad():
            logits = module(x)
            scores = el2n(F.cross_entropy(logits, y, reduction="none"), logits, None, y)
        for rate in self.rates:
            kept = SampleSelector(target_activation_rate=rate, weighting="sqrt").select(scores)
            weights = (
                torch.ones(len(y))
                if kept.weights is None
                else torch.ones(len(y)).index_copy(0, kept.indices, kept.weights)
            )

            def losses(module: Any, batch: Any, weights: Tensor = weights) -> Tensor:
                return weights * F.cross_entropy(module(batch[0]), batch[1], reduction="none")

            check = check_partial_backward(module, (x, y), indices=kept.indices, losses=losses, batchnorm="selected")
            exact = losses(module, (x, y))[kept.indices].sum()
            alone = losses(module, (x[kept.indices], y[kept.indices]), weights[kept.indices]).sum()
            cosine = F.cosine_similarity(gradient(module, exact), gradient(module, alone), dim=0)
            self.rows.append({"epoch": epoch, "rate": rate, "partial": check.cosine, "subset": float(cosine)})
            print(self.rows[-1], flush=True)
        module.load_state_dict(before)  # BatchNorm's running statistics


def gradient(module: Any, loss: Tensor) -> Tensor:
    """Join the gradients of all parameters."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def batchnorm(root: str) -> list[dict[str, Any]]:
    """Train for a short time in `partial`, and look at the gradients after every epoch."""
    pl.seed_everything(0, verbose=False)
    data = ImageData("cifar10", root, 256, train_limit=5120)
    data.setup("fit")
    batch = data.images.train_images[:256], data.images.train_labels[:256]
    cosines = Cosines(batch, (0.4, 0.2, 0.1))
    pl.Trainer(
        max_epochs=6,
        limit_val_batches=0,
        callbacks=[SparseSelectionCallback(), TwoStageScheduler(warmup_epochs=1), cosines],
        **QUIET,
    ).fit(ResNet9(3, width=16), datamodule=data)
    return cosines.rows


def main() -> None:
    """Measure, print, write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    options = parser.parse_args()
    for name, rows in (("parity", architectures()), ("batchnorm", batchnorm(options.root))):
        record = {"benchmark": f"partial-{name}", "shares": SHARES, "rows": rows, **provenance()}
        save(record, f"partial-{name}", indent=1)


if __name__ == "__main__":
    main()
