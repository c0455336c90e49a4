"""Gradients of sparse training steps in `partial` beside those in `mask`, through a Trainer, in every precision.

    python benchmarks/row_gradients.py

Both modes train the same model on the same batches with learning rate 0, so both select the same samples and their
gradients must agree to rounding: BatchNorm runs `exact`, and gradients are read after the unscaling of fp16. Writes one
record; fails where an error is above its limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from record import QUIET, RECORDS, kind, on_gpu, provenance, save, silence_lightning
from step_time import Case, Model, load
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback

STEPS = 3
LIMITS = {"32-true": 1e-4, "bf16-mixed": 3e-2, "16-mixed": 5e-3}
"""The largest relative error of all gradients together, by precision."""

SMALL = (Case("groupnorm", "resnet18-groupnorm", 32, 16), Case("vit", "vit-tiny", 32, 16))
CASES = (
    Case("batchnorm", "resnet18", 64, 64),  # exact: all rows from the last BatchNorm on
    Case("groupnorm", "resnet18-groupnorm", 64, 64),
    Case("vit", "vit-s", 32, 64),
    Case("gpt", "gpt4", 128, 32),
)


class StillModel(Model):
    """An optimizer that never moves, so that a later step finds the same weights in both modes."""

    def __init__(self, case: Case, channels_last: bool) -> None:
        super().__init__(case, channels_last)
        with torch.no_grad():
            for parameter in self.parameters():
                if not parameter.any():  # a head that starts at zero would pass no gradient on
                    parameter.normal_(std=0.05)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Gradients(pl.Callback):
    """Keep all gradients of each step as one vector."""

    def __init__(self) -> None:
        self.by_step: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        parts = [p.grad.detach().double().flatten() for p in pl_module.parameters() if p.grad is not None]
        self.by_step.append(torch.cat(parts).cpu())


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Keep TF32 and nondeterministic algorithms out of cuDNN: they would be the larger part of the error."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32 = False
    cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before


@dataclass(frozen=True)
class Trained:
    """The results of a mode's run: its gradients, and how many samples were selected."""

    gradients: list[Tensor]
    selected: int
    offered: int


def train(case: Case, mode: str, precision: str, data: DataLoader[Any], device: str) -> Trained:
    """Take a few sparse steps in one mode."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"mode": mode, "target_activation_rate": 0.4}
    if mode == "partial":
        settings["batchnorm"] = "exact"
    selection = SparseSelectionCallback(**settings)
    gradients = Gradients()
    chosen: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # the default scale of 65,536 overflows in the first steps
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        chosen = {"plugins": [MixedPrecision("16-mixed", "cuda", scaler=scaler)]}
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="gpu" if on_gpu(device) else "cpu",
        devices=1,
        callbacks=[selection, gradients],
        **chosen,
        **QUIET,
    )
    trainer.fit(StillModel(case, channels_last=on_gpu(device) and case.model.startswith("resnet")), data)
    return Trained(gradients.by_step, int(selection.ledger.selected), int(selection.ledger.offered))


def check(case: Case, precision: str, images: Tensor, labels: Tensor, device: str) -> dict[str, Any]:
    """Compare the two modes on one model in one precision, by the worst of the steps."""
    data = case.data(images, labels, STEPS)
    want, got = (train(case, mode, precision, data, device) for mode in ("mask", "partial"))
    pairs = list(zip(want.gradients, got.gradients, strict=True))
    error = max(float((b - a).norm() / a.norm()) for a, b in pairs)
    return {
        "model": case.name,
        "batch_size": case.batch,
        "precision": precision,
        "relative_error": error,
        "cosine": min(float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs),
        "selected": [want.selected, got.selected],
        "offered": want.offered,
        "passed": error < LIMITS[precision] and 0 < want.selected == got.selected < want.offered,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="digits", help='folder or .npz file of CIFAR-10, or "digits"')
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the smallest models alone")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    images, labels = load(options.root)
    precisions = list(LIMITS) if on_gpu(options.device) else ["32-true", "bf16-mixed"]
    rows = []
    with exact_convolutions():
        for case in SMALL if options.tiny else CASES:
            for precision in precisions:
                rows.append(check(case, precision, images, labels, options.device))
                print(rows[-1], flush=True)
    record = {"benchmark": "row-gradients", "limits": LIMITS, "rows": rows, **provenance(options.device)}
    print(save(record, f"row-gradients-{kind(options.device)}", folder=options.out, indent=1))
    return record


if __name__ == "__main__":
    silence_lightning()
    sys.exit(not all(row["passed"] for row in main()["rows"]))
