"""CIFAR-10, ResNet-9, through Lightning: one policy, one seed, one record.

    python benchmarks/cifar10.py --policy partial --seed 0 --root cifar10.npz

On a GPU (bf16-mixed, all images, full width) this is the protocol of the accuracy table; `--width`, `--train-limit` and
`--epochs` shorten it for a CPU, and the record says so. `benchmarks/summarize.py` makes the tables from the records.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from infobatch import InfoBatchData, InfoBatchResNet9
from lightning.pytorch.callbacks import Callback, Timer
from record import QUIET, RECORDS, kind, provenance, save

from lightning_ast import PIController, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.demo import ImageData, ResNet9
from lightning_ast.demo.data import Images


def original(**options: Any) -> SparseSelectionCallback:
    """Make the published rule: hard threshold on 0.7 loss + 0.3 entropy, its gains, its 10 % floor, masking."""
    return SparseSelectionCallback(
        mode="mask",
        gate="threshold",
        significance="loss_entropy",
        controller=PIController(preset="original"),
        min_selected=0.1,
        **options,
    )


def policy_callbacks(policy: str, rate: float, seed: int, epochs: int) -> list[Callback]:
    """Make the callbacks of a policy; warmup and cooldown are shares of the run."""
    if policy.startswith("dense") or policy == "infobatch":
        return [SparseSelectionCallback(target_activation_rate=1.0)]
    options: dict[str, Any] = {"target_activation_rate": rate, "seed": seed}
    if policy.startswith("original"):
        return [original(**options), TwoStageScheduler(warmup_epochs=0.2)]
    if policy.startswith("prune"):
        if policy == "prune-random":
            options["significance"] = equal
        elif policy != "prune":
            options["weighting"] = policy.partition("-")[2]
        warmup, cooldown = prune_stages(epochs)
        schedule = TwoStageScheduler(warmup_epochs=warmup, cooldown_epochs=cooldown)
        return [SparseSelectionCallback(mode="prune", **options), schedule]
    schedule = TwoStageScheduler(warmup_epochs=0.2, cooldown_epochs=0.1)
    if policy == "random":
        return [SparseSelectionCallback(mode="subset", significance=equal, weighting="none", **options), schedule]
    if policy == "partial-exact":
        return [SparseSelectionCallback(mode="partial", batchnorm="exact", **options), schedule]
    mode, _, weighting = policy.partition("-")
    return [SparseSelectionCallback(mode=mode, weighting=weighting or None, **options), schedule]


def prune_stages(epochs: int) -> tuple[int, int]:
    """Return the dense epochs at the beginning and at the end of a pruned run."""
    return max(1, epochs // 10), epochs // 8


def equal(losses: torch.Tensor, *_: Any) -> torch.Tensor:
    """Score all samples alike: a random subset."""
    return torch.ones_like(losses)


POLICIES = (
    "dense",
    "dense-shortened",
    "mask",
    "subset",
    "subset-none",
    "subset-unbiased",
    "partial",
    "partial-exact",
    "random",
    "prune",
    "prune-sqrt",
    "prune-unbiased",
    "prune-random",
    "infobatch",
    "original",
    "original-clip",
)


class Trace(Callback):
    """A record of the activation rate and threshold of every step, and the validation accuracy of every epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.thresholds: list[float | None] = []
        self.accuracies: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        selection = next(c for c in trainer.callbacks if isinstance(c, SparseSelectionCallback))
        self.rates.append(round(selection.activation_rate or 0.0, 4))
        if trainer.global_step % 20 == 0:
            threshold = selection.threshold
            self.thresholds.append(None if threshold is None else round(threshold, 4))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.accuracies.append(round(float(trainer.callback_metrics["val_acc"]), 4))


def run_parser(description: str | None, *, width: int = 64, train_limit: int | None = None) -> argparse.ArgumentParser:
    """Make a parser with the options of a whole training run on CIFAR-10."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--train-limit", type=int, default=train_limit)
    parser.add_argument("--root", default="data")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--threads", type=int)
    return parser


def run_size(options: argparse.Namespace, images: int) -> str:
    """Put width, images, batch size and epochs together, for the names of records."""
    return f"w{options.width}-n{images}-b{options.batch_size}-e{options.epochs}"


def hold_on_device(data: ImageData) -> None:
    """Move the images of a set-up data module to the GPU: its batches need no transfer then."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data._images = Images(*(tensor.to(device) for tensor in data.images))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train once and write the record."""
    parser = run_parser(__doc__)
    parser.add_argument("--policy", choices=POLICIES, required=True)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the model: quicker on a CPU")
    parser.add_argument("--on-device", action="store_true", help="hold all images in the GPU's memory")
    parser.add_argument("--runs-at-once", type=int, default=1, help="that share the machine: written into the record")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    pl.seed_everything(options.seed, verbose=False)
    infobatch = options.policy == "infobatch"
    model = (InfoBatchResNet9 if infobatch else ResNet9)(3, width=options.width, lr=options.lr)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    make = InfoBatchData if infobatch else ImageData
    data = make("cifar10", options.root, options.batch_size, train_limit=options.train_limit)
    data.setup("fit")
    if options.on_device:
        hold_on_device(data)
    pl.seed_everything(options.seed, verbose=False)
    callbacks = policy_callbacks(options.policy, options.rate, options.seed, options.epochs)
    selection = callbacks[0]
    assert isinstance(selection, SparseSelectionCallback)
    trace = Trace()
    timer = Timer()
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        callbacks=[*callbacks, trace, timer, SparseTrainingMonitor()],
        gradient_clip_val=1.0 if options.policy.endswith("clip") else None,
        **QUIET,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=int(infobatch),
    )
    trainer.fit(model, datamodule=data)
    sparse = selection.ledger.stages.get("sparse")
    record = {
        "benchmark": "cifar10-resnet9",
        "policy": options.policy,
        "rate": options.rate,
        "seed": options.seed,
        "settings": {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "width": options.width,
            "train_images": len(data.images.train_labels),
            "lr": options.lr,
            "precision": str(trainer.precision) + (", channels_last" if options.channels_last else ""),
        },
        "accuracy": trace.accuracies[-1],
        "seconds": round(timer.time_elapsed("train") - timer.time_elapsed("validate"), 2),
        "runs_at_once": options.runs_at_once,
        "flops": selection.ledger.spent_flops(),
        "flops_per_sample": None if selection.ledger.flops is None else vars(selection.ledger.flops),
        "samples_offered": selection.ledger.offered,
        "samples_selected": selection.ledger.selected,
        "sparse_activation_rate": None if sparse is None else round(sparse.selected / sparse.offered, 4),
        "savings": selection.savings,
        "accuracy_by_epoch": trace.accuracies,
        "activation_by_step": trace.rates,
        "threshold_every_20_steps": trace.thresholds,
        **provenance(),
    }
    size = run_size(options, len(data.images.train_labels))
    name = f"cifar10-{kind()}-{options.policy}-r{options.rate:g}-{size}-s{options.seed}"
    path = save(record, name, folder=options.out)
    print(f"{path}: accuracy {record['accuracy']:.4f}, {record['seconds']} s")
    return record


if __name__ == "__main__":
    main()
