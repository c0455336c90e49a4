"""Train one run of the regime map through Lightning, and make its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from original import fit_original
from policies import Parts, check, parts_of
from record import QUIET
from regime_data import RegimeData
from regime_networks import NETWORKS, flops_of_sample
from regime_run import Run
from regime_trace import Stopwatch, Trace, validated_every
from torch import nn

from lightning_ast import SparseSelectionCallback
from lightning_ast.energy import EnergyMeter, find_meters

__all__ = ["default_precision", "train"]


def default_precision() -> str:
    """Return bf16 where the machine computes in it: on a GPU, or on a CPU with instructions for it."""
    if torch.cuda.is_available():
        return "bf16-mixed"
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.is_file() else []
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


@dataclass
class Outcome:
    """What a finished run is judged by.

    Attributes:
        forwarded: The forwards of one sample in training.
        backwarded: The backwards of one sample.
        steps: The optimizer steps.
        lr: The highest learning rate.
        precision: The precision of the run.
        accuracies: The test accuracy of each validation.
        train_accuracy: The accuracy on training images at the end.
        watch: The time that training took.
        rates: The share of the samples that each epoch trained on.
        coverages: The mean coverage of each epoch, or None.
        wrong_shares: The share of wrong labels among the samples of each epoch, or None.
        extra: Entries of the record that only this policy has.
    """

    forwarded: float
    backwarded: float
    steps: int
    lr: float
    precision: str
    accuracies: list[float]
    train_accuracy: float
    watch: Stopwatch
    rates: list[float]
    coverages: list[float | None] | None = None
    wrong_shares: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def train(run: Run, *, root: str, records: Path, precision: str, alone: bool = False) -> dict[str, Any]:
    """Train once.

    Args:
        run: The run.
        root: Where the images are looked for.
        records: The folder of the records, for runs that take the rates of another.
        precision: The precision of the Trainer.
        alone: Whether nothing else runs on the machine, so that its energy counters are those of this run.

    Returns:
        The record, without what it says of machine and code.
    """
    check(run)
    facts = NETWORKS[run.regime.network]
    data = RegimeData(run.regime, run.seed, root, test_images=facts.test_images)
    flops = flops_of_sample(facts.make(*data.shape, run.regime.width), *data.shape)
    pl.seed_everything(run.seed, verbose=False)
    net = facts.make(*data.shape, run.regime.width)
    watch = Stopwatch(_meters() if alone else [])
    if run.policy == "original":
        outcome = _train_original(run, net, data, watch)
    else:
        outcome = _train_with_lightning(run, net, data, watch, records=records, precision=precision)
    return _record(run, data, flops, outcome)


def _record(run: Run, data: RegimeData, flops: tuple[float, float], outcome: Outcome) -> dict[str, Any]:
    spent = outcome.forwarded * flops[0] + outcome.backwarded * flops[1]
    return {
        "benchmark": "regimes",
        "name": run.name,
        **run.facts(),
        "accuracy": outcome.accuracies[-1],
        "best_accuracy": max(outcome.accuracies),
        "accuracy_by_validation": outcome.accuracies,
        "train_accuracy": round(outcome.train_accuracy, 4),
        "work_epochs": round(spent / sum(flops) / (data.dense_batches * run.regime.batch_size), 3),
        "flops": spent,
        "flops_per_sample": {"forward": flops[0], "backward": flops[1]},
        "samples_forwarded": outcome.forwarded,
        "samples_backwarded": round(outcome.backwarded, 1),
        "optimizer_steps": outcome.steps,
        "train_samples": len(data.training),
        "rate_by_epoch": outcome.rates,
        "coverage_by_epoch": outcome.coverages,
        "wrong_label_share_by_epoch": outcome.wrong_shares,
        "seconds": round(outcome.watch.seconds, 2),
        "joules": None if outcome.watch.joules is None else round(outcome.watch.joules, 1),
        "cpu_seconds": round(outcome.watch.cpu_seconds, 2),
        "lr": outcome.lr,
        "precision": outcome.precision,
        "cudnn_benchmark": _searches(run),
        **outcome.extra,
    }


def _meters() -> list[EnergyMeter]:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return find_meters(device)[0]


def _train_with_lightning(
    run: Run, net: nn.Module, data: RegimeData, watch: Stopwatch, *, records: Path, precision: str
) -> Outcome:
    parts = parts_of(run, data, records)
    data.chooser = parts.chooser
    lr = run.option("lr")
    module = parts.module(net, NETWORKS[run.regime.network], None if lr is None else float(lr))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    selection = next((each for each in parts.callbacks if isinstance(each, SparseSelectionCallback)), None)
    trace = Trace(data, selection)
    if not torch.cuda.is_available() and not NETWORKS[run.regime.network].bf16:
        precision = "32-true"
    trainer = _trainer(run, parts, precision, [watch, trace])
    pl.seed_everything(run.seed, verbose=False)
    with parts.changes():
        trainer.fit(module, datamodule=data)
    forwarded = float(module.forwarded)
    backwarded = float(module.backwarded)
    if selection is not None:  # its ledger knows what a partial backward spent, too
        totals = selection.ledger.stages.values()
        forwarded = sum(each.forwarded for each in totals) + module.extra_forwarded
        backwarded = sum(each.backwarded for each in totals) - module.spared_backwards
    return Outcome(
        forwarded=forwarded,
        backwarded=backwarded,
        steps=trainer.global_step,
        lr=module.lr,
        precision=f"{trainer.precision}, channels_last",
        accuracies=trace.accuracies,
        train_accuracy=train_accuracy(module, data),
        watch=watch,
        rates=trace.rates,
        coverages=trace.coverages if any(each is not None for each in trace.coverages) else None,
        wrong_shares=trace.wrong_shares if run.regime.noise else None,
    )


def _train_original(run: Run, net: nn.Module, data: RegimeData, watch: Stopwatch) -> Outcome:
    """Train with the original's package, its own loop, optimizer and settings; two forwards and a full backward."""
    history = fit_original(run, net, data, watch)
    samples = run.epochs * data.dense_batches * run.regime.batch_size
    return Outcome(
        forwarded=2 * samples,
        backwarded=samples,
        steps=run.epochs * data.dense_batches,
        lr=0.001,
        precision="16-mixed" if torch.cuda.is_available() else "32-true",  # what its use_amp means
        accuracies=[round(each / 100, 4) for each in history["val_acc"]],
        train_accuracy=train_accuracy(net, data),
        watch=watch,
        rates=[round(each, 4) for each in history["activation_rates"]],
        extra={"claimed_energy_savings_percent": round(history["energy_savings"][-1], 2)},
    )


def _trainer(run: Run, parts: Parts, precision: str, watchers: list[Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=run.epochs,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[*parts.callbacks, *watchers],
        check_val_every_n_epoch=validated_every(run.epochs),
        reload_dataloaders_every_n_epochs=int(parts.chooser is not None),
        num_sanity_val_steps=0,
        benchmark=_searches(run),
        **QUIET,
    )


def _searches(run: Run) -> bool:
    """Tell whether cuDNN searches for its quickest kernels: with steps kept it would search anew in every epoch."""
    return torch.cuda.is_available() and run.option("steps") != "keep"


@torch.no_grad()
def train_accuracy(module: nn.Module, data: RegimeData) -> float:
    """Return the accuracy on up to 5,000 training images without augmentation, against their true or wrong labels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the Trainer has taken the module from it
    module.eval().to(device)
    right = 0
    images = data.training.images[:5_000]
    for rows in torch.arange(len(images)).split(500):
        pixels = data.pixels(images[rows], augment=False).to(device)
        right += int((module(pixels).argmax(1).cpu() == data.training.labels[rows]).sum())
    return right / len(images)
