"""The error of `advise`: its predictions beside ordinary runs of the same Trainer, model and loader.

    python benchmarks/advice.py --root cifar10.npz                            # the cases for this machine
    python benchmarks/advice.py --root cifar10.npz --case vit-s-16 --rounds 5

A round asks `advise`, then runs dense, `partial`, `subset` and `prune` at two rates (in every second round the other
way about), so that what else the machine does falls on both. A run has a dense first and last epoch; its callback has
its defaults, its loader collates real CIFAR-10 images. Compared: seconds of a sparse step, loading included (median),
and of the whole training (wall clock, its first steps and all). The error is predicted over measured less one, the
median of the rounds; beside it that of the share of dense, from which a machine that is slower now than before falls
out. Each case writes a record.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from record import QUIET, RECORDS, kind, provenance, save
from step_time import CASES as LARGE
from step_time import Case, Model, load
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.advice import Advice, advise

RATES = (0.2, 0.4)
CONFIGURATIONS: list[tuple[str, float]] = [
    ("dense", 1.0),
    *((mode, rate) for mode in ("partial", "subset", "prune") for rate in RATES),
]
CASES = [
    Case("resnet18-128", "resnet18", 32, 128),
    Case("vit-s-16", "vit-s", 16, 16),
    *(case for case in LARGE if case.gpu),
]
EPOCHS = 4


class Seconds(pl.Callback):
    """The seconds of the training, and of each step, by epoch."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.training = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.begin = now()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.steps.append([])
        self.last = now()

    def on_train_batch_end(self, *_: Any) -> None:
        end = now()
        self.steps[-1].append(end - self.last)
        self.last = end

    def on_train_end(self, *_: Any) -> None:
        self.training = now() - self.begin


def now() -> float:
    """Read the time in seconds, after the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def trainer_for(mode: str, rate: float, callbacks: list[Any]) -> pl.Trainer:
    """Make an ordinary Trainer of a short run: one dense epoch, two sparse ones, one dense."""
    if mode != "dense":
        callbacks = [
            SparseSelectionCallback(mode=mode, target_activation_rate=rate),  # type: ignore[arg-type]
            TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1),
            *callbacks,
        ]
    precision: Any = "bf16-mixed" if torch.cuda.is_available() else "32-true"
    return pl.Trainer(max_epochs=EPOCHS, precision=precision, callbacks=callbacks, **QUIET)


def model_for(case: Case) -> Model:
    """Make a fresh module."""
    return Model(case, channels_last=torch.cuda.is_available() and case.model.startswith("resnet"))


def run(case: Case, mode: str, rate: float, data: DataLoader[Any]) -> tuple[float, float]:
    """Return the seconds of a sparse step and of the whole training of an ordinary run."""
    seconds = Seconds()
    trainer_for(mode, rate, [seconds]).fit(model_for(case), data)
    sparse = [second for epoch in seconds.steps[1:-1] for second in epoch]
    return statistics.median(sparse), seconds.training


def predict(case: Case, data: DataLoader[Any], budget_seconds: float) -> Advice:
    """Ask `advise` about such a run; the schedule is that of the callbacks."""
    return advise(trainer_for("partial", RATES[-1], []), model_for(case), data, budget_seconds=budget_seconds)


def measure(case: Case, data: DataLoader[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Make predictions and runs, in rounds."""
    predicted: dict[Any, list[tuple[float, float]]] = {c: [] for c in CONFIGURATIONS}
    measured: dict[Any, list[tuple[float, float]]] = {c: [] for c in CONFIGURATIONS}
    asked: list[float] = []
    run(case, "dense", 1.0, data)  # warm up
    for number in range(options.rounds):
        parts = [lambda: _ask(case, data, options, predicted, asked), lambda: _run_all(case, data, measured)]
        for part in parts if number % 2 == 0 else reversed(parts):
            part()
    rows = []
    for (mode, rate), said in predicted.items():
        row: dict[str, Any] = {"mode": mode, "rate": rate}
        for index, name in enumerate(("step", "run")):
            pairs = list(zip((s[index] for s in said), (m[index] for m in measured[mode, rate]), strict=True))
            errors = [p / m - 1 for p, m in pairs]
            row[f"{name}_predicted_seconds"] = round(statistics.median(p for p, _ in pairs), 4)
            row[f"{name}_measured_seconds"] = round(statistics.median(m for _, m in pairs), 4)
            row[f"{name}_error"] = round(statistics.median(errors), 3)
            row[f"{name}_error_by_round"] = [round(error, 3) for error in errors]
            dense = zip(predicted["dense", 1.0], measured["dense", 1.0], strict=True)
            against = [(p / d[index]) / (m / n[index]) - 1 for (p, m), (d, n) in zip(pairs, dense, strict=True)]
            row[f"{name}_share_of_dense_error"] = round(statistics.median(against), 3)
        rows.append(row)
        print(case.name, row, flush=True)
    worst = {name: max(abs(row[f"{name}_error"]) for row in rows) for name in ("step", "run")}
    print(f"{case.name}: largest error of a step {worst['step']:.1%}, of a run {worst['run']:.1%}", flush=True)
    return {"rows": rows, "largest_error": worst, "advise_seconds": [round(seconds, 1) for seconds in asked]}


def _ask(case: Case, data: DataLoader[Any], options: argparse.Namespace, predicted: Any, asked: list[float]) -> None:
    begin = now()
    advice = predict(case, data, options.budget)
    asked.append(now() - begin)
    print(advice.verdict.headline, f"({asked[-1]:.0f} s, {advice.facts.step.cycles} rounds)", flush=True)
    for mode, rate in CONFIGURATIONS:
        said = advice.dense if mode == "dense" else advice.at(mode, rate)
        assert said is not None, advice
        predicted[mode, rate].append((said.step_seconds, said.run_seconds))


def _run_all(case: Case, data: DataLoader[Any], measured: Any) -> None:
    for mode, rate in CONFIGURATIONS:
        measured[mode, rate].append(run(case, mode, rate, data))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write the records."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--case", action="append", choices=sorted({c.name for c in (*CASES, *LARGE)}))
    parser.add_argument("--batches", type=int, default=40 if gpu else 6, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=45.0, help="seconds for advise")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    images, labels = load(options.root)
    records = []
    known = {case.name: case for case in (*LARGE, *CASES)}
    chosen = [case for case in CASES if case.gpu == gpu]
    if options.case is not None:
        chosen = [known[name] for name in options.case]
    for case in chosen:
        data = case.data(images, labels, options.batches)
        record = {
            "benchmark": "advice",
            "model": case.model,
            "size": case.size,
            "batch_size": case.batch,
            "batches": options.batches,
            "epochs": EPOCHS,
            "precision": "bf16-mixed" if gpu else "32-true",
            **measure(case, data, options),
            **provenance(),
        }
        save(record, f"advice-{kind()}-{case.name}", folder=options.out, indent=1)
        records.append(record)
    return records


if __name__ == "__main__":
    main()
