"""Time of a whole training step as a share of dense, every mode, in one process: rounds interleaved, medians.

    python benchmarks/step_time.py --root cifar10.npz                    # the models for this machine
    python benchmarks/step_time.py --root cifar10.npz --case vit-s-64    # one of them
    python benchmarks/step_time.py --root cifar10.npz --against OTHER    # beside the package of another checkout

Real CIFAR-10 images (resized) and bytes of Python's own source, through Lightning, the callback with its defaults.
`ideal` of `partial` is forward + r of the rest, both measured in a dense run of the same round, at the rate that was
observed; the resizing of images, before the forward, counts as rest. On a GPU: bf16, channels_last, larger models. Each
case writes a record.

`--against` compares sparse steps of `partial` with those of the package in another checkout: two processes side by
side, which take turns within each round. The script, its models and its data are this checkout's in both. `--root
digits` takes scikit-learn's digits, where CIFAR-10 is not at hand.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from checkouts import Checkout, answer, compare
from record import QUIET, RECORDS, commit, kind, provenance, save, silence_lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback
from lightning_ast.core import cost_share
from lightning_ast.demo.data import load_images

sys.path.append(str(Path(__file__).parent.parent))
from tests.core.partial.models import GPT

CONFIGURATIONS: list[tuple[str, float]] = [
    ("dense", 1.0),
    ("mask", 0.4),
    *(("subset", rate) for rate in (0.4, 0.2, 0.1)),
    *(("partial", rate) for rate in (0.4, 0.2, 0.1)),
]


def vit(width: int, heads: int, size: int, patch: int) -> nn.Module:
    """Make torchvision's VisionTransformer of 12 layers."""
    return zoo.VisionTransformer(size, patch, 12, heads, width, 4 * width, num_classes=10)


@dataclass(frozen=True)
class Case:
    """A model, its input and its batch; size is pixels or tokens."""

    name: str
    model: str
    size: int
    batch: int
    gpu: bool = False

    def make(self) -> nn.Module:
        """Make a fresh model with the same weights every time."""
        torch.manual_seed(0)
        if self.model == "resnet18-groupnorm":
            return zoo.resnet18(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(8, channels))
        if self.model.startswith("resnet"):
            return getattr(zoo, self.model)(num_classes=10)
        if self.model in ("vit-s", "vit-tiny"):
            return vit(384, 6, self.size, 4) if self.model == "vit-s" else vit(64, 2, self.size, 4)
        if self.model == "vit-b":
            return vit(768, 12, self.size, 16)
        width, heads, layers = (768, 12, 12) if self.model == "gpt-small" else (256, 4, 4)
        return GPT(width, heads, layers, tokens=256, length=self.size)

    def data(self, images: Tensor, labels: Tensor, batches: int) -> DataLoader[Any]:
        """Load enough batches of real data into memory."""
        count = self.batch * batches
        if self.model.startswith("gpt"):
            text = b"".join(p.read_bytes() for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
            tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
            tokens = tokens.repeat(1 + count * (self.size + 1) // len(tokens))[: count * (self.size + 1)]
            x = tokens.view(count, -1)[:, :-1]
            y = tokens.view(count, -1)[:, 1:]
        else:
            pick = torch.arange(count) % len(images)
            x = images[pick]
            y = labels[pick]
        return DataLoader(TensorDataset(x, y), self.batch, drop_last=True)


CASES = [
    Case("resnet18-256", "resnet18", 64, 256),
    Case("vit-s-64", "vit-s", 32, 64),
    Case("gpt4-64", "gpt4", 128, 64),
    Case("vit-tiny-16", "vit-tiny", 32, 16),  # bound by the host, not by arithmetic
    Case("resnet50-256", "resnet50", 224, 256, gpu=True),
    Case("resnet50-768", "resnet50", 224, 768, gpu=True),
    Case("vit-b-128", "vit-b", 224, 128, gpu=True),
    Case("vit-b-512", "vit-b", 224, 512, gpu=True),
    Case("gpt-small-32", "gpt-small", 512, 32, gpu=True),
    Case("gpt-small-128", "gpt-small", 512, 128, gpu=True),
]


class Model(pl.LightningModule):
    """A module as a user would write it."""

    def __init__(self, case: Case, channels_last: bool) -> None:
        super().__init__()
        self.net = case.make()
        self.size = case.size
        self.channels_last = channels_last
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert images from bytes, and resize them on the device."""
        x, y = batch
        if x.dim() == 4:
            x = F.interpolate(x.float() / 255, size=self.size)
            x = x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
        return x, y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy over classes or bytes."""
        x, y = batch
        scores = self.net(x)
        return F.cross_entropy(scores.view(-1, scores.shape[-1]), y.reshape(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Times(pl.Callback):
    """Seconds of each step and of its forward, and the rate of the selection, the first few steps left out."""

    def __init__(self, skip: int, selection: SparseSelectionCallback | None, *, split: bool) -> None:
        self.skip = skip
        self.selection = selection
        self.split = split
        self.steps: list[float] = []
        self.forwards: list[float] = []
        self.last = self.start = 0.0
        self.before = (0, 0)

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = now(wait=self.split)

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.split and trainer.global_step >= self.skip:
            self.forwards.append(now() - self.start)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        end = now()
        if trainer.global_step > self.skip:
            self.steps.append(end - self.last)
        elif trainer.global_step == self.skip:
            self.before = self.samples()
        self.last = end

    def samples(self) -> tuple[int, int]:
        """Return the samples selected and offered so far."""
        ledger = self.selection.ledger if self.selection else None
        return (int(ledger.selected), int(ledger.offered)) if ledger else (0, 0)

    @property
    def rate(self) -> float:
        """Return selected over offered in the steps that were timed; 1 without a selection."""
        (selected, offered) = self.samples()
        (earlier, before) = self.before
        return (selected - earlier) / (offered - before) if self.selection else 1.0


def now(*, wait: bool = True) -> float:
    """Read the time in seconds, after the device is done."""
    if wait and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(case: Case, mode: str, rate: float, data: DataLoader[Any], options: argparse.Namespace, split: bool) -> Any:
    """Train for a short time; return the times, and the rate that was observed."""
    gpu = torch.cuda.is_available()
    selection = None if mode == "dense" else SparseSelectionCallback(mode=mode, target_activation_rate=rate)  # type: ignore[arg-type]
    times = Times(options.skip, selection, split=split)
    trainer = pl.Trainer(
        max_steps=options.steps,
        limit_val_batches=0,
        precision="bf16-mixed" if gpu else "32-true",
        callbacks=[times] if selection is None else [selection, times],
        **QUIET,
    )
    trainer.fit(Model(case, channels_last=gpu and case.model.startswith("resnet")), data)
    return statistics.median(times.steps), times.forwards and statistics.median(times.forwards), times.rate


def measure(case: Case, images: Tensor, labels: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all configurations of a case, in rounds."""
    data = case.data(images, labels, options.steps)
    run(case, "dense", 1.0, data, options, split=False)  # warm up
    seconds: dict[tuple[str, float], list[float]] = {c: [] for c in CONFIGURATIONS}
    rates: dict[tuple[str, float], float] = {}
    forwards: list[float] = []
    for _ in range(options.rounds):
        whole, forward, _ = run(case, "dense", 1.0, data, options, split=True)
        forwards.append(forward / whole)
        for mode, rate in CONFIGURATIONS:
            step, _, rates[mode, rate] = run(case, mode, rate, data, options, split=False)
            seconds[mode, rate].append(step)
    forward = statistics.median(forwards)
    rows = []
    for (mode, rate), taken in seconds.items():
        shares = [s / d for s, d in zip(taken, seconds["dense", 1.0], strict=True)]
        observed = rates[mode, rate]
        rows.append(
            {
                "mode": mode,
                "rate": rate,
                "observed_rate": round(observed, 4),
                "milliseconds": round(1000 * statistics.median(taken), 1),
                "share_of_dense": round(statistics.median(shares), 3),
                "share_by_round": [round(share, 3) for share in shares],
                "ideal_share": round(forward + observed * (1 - forward), 3) if mode == "partial" else None,
                "cost_model": 1.0 if mode == "dense" else round(cost_share(mode, observed), 3),  # type: ignore[arg-type]
            }
        )
        print(case.name, rows[-1], flush=True)
    return {"forward_share": round(forward, 3), "rows": rows}


def step_seconds(case: Case, mode: str, rate: float, data: DataLoader[Any], options: argparse.Namespace) -> float:
    """Return the median step of a short training; what it held of the GPU's memory is free again."""
    seconds, _, _ = run(case, mode, rate, data, options, split=False)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return float(seconds)


def serve(images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Measure what another process asks for, with this process's package."""
    data: dict[str, DataLoader[Any]] = {}

    def measure(name: str, mode: str, rate: float) -> float:
        case = next(c for c in CASES if c.name == name)
        if name not in data:
            data.clear()
            data[name] = case.data(images, labels, options.steps)
        return step_seconds(case, mode, rate, data[name], options)

    answer(measure)


def compare_all(cases: list[Case], command: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare this checkout with another on each case; one record each."""
    script = Path(__file__).resolve()
    here = Path(__file__).resolve().parent.parent
    command = [str(script), *command, "--serve"]
    records = []
    old = Checkout(options.against, command)  # both start at once: importing takes its time
    new = Checkout(here, command)
    with old, new:
        for case in cases:
            rows = compare(case.name, new, old, options)
            for row in rows:
                print(case.name, row, flush=True)
            commits = {"old_commit": commit(options.against), **provenance()}
            records.append({"benchmark": "step-time-against", **facts(case), "rows": rows, **commits})
            save(records[-1], f"step-time-against-{kind()}-{case.name}", folder=options.out, indent=1)
    return records


def facts(case: Case) -> dict[str, Any]:
    """Return the facts of a case for its record."""
    precision = "bf16-mixed" if torch.cuda.is_available() else "32-true"
    return {"model": case.model, "size": case.size, "batch_size": case.batch, "precision": precision}


def load(root: str) -> tuple[Tensor, Tensor]:
    """Load some of CIFAR-10's images, or digits in three channels."""
    images = load_images("digits") if root == "digits" else load_images("cifar10", root)
    return images.train_images[:4096].expand(-1, 3, -1, -1), images.train_labels[:4096]


def settings(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help='folder or .npz file of CIFAR-10, or "digits"')
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES])
    parser.add_argument("--steps", type=int, default=40 if gpu else 7)
    parser.add_argument("--skip", type=int, default=15 if gpu else 2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.4, 0.1], help="with --against")
    parser.add_argument("--seconds", type=float, help="with --against: of each case's rounds, at most")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write the records."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = settings(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.serve:
        serve(*load(options.root), options)
        return []
    chosen = [c for c in CASES if (c.name in options.case if options.case else c.gpu == torch.cuda.is_available())]
    if options.against:
        return compare_all(chosen, arguments, options)
    images, labels = load(options.root)
    records = []
    for case in chosen:
        measured = measure(case, images, labels, options)
        records.append({"benchmark": "step-time", **facts(case), **measured, **provenance()})
        save(records[-1], f"step-time-{kind()}-{case.name}", folder=options.out, indent=1)
    return records


if __name__ == "__main__":
    silence_lightning()
    main()
