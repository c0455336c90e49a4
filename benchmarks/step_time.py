"""Time of a whole training step as a share of dense, every mode, in one process: rounds interleaved, medians.

    python benchmarks/step_time.py --root cifar10.npz                    # the models for this machine
    python benchmarks/step_time.py --root cifar10.npz --case vit-s-64    # one of them
    python benchmarks/step_time.py --root cifar10.npz --against OTHER    # beside the package of another checkout

Real CIFAR-10 images (resized) and bytes of Python's own source, through Lightning, the callback with its defaults.
`ideal` of `partial` is forward + r of the rest, both measured in a dense run of the same round, at the rate that was
observed; the resizing of images, before the forward, counts as rest. `prune` is timed in an epoch of as many steps as a
dense one, each of r B samples. Beside ours: a step on a whole batch as InfoBatch's loss needs it, and a step of
Selective Backprop as Composer has it, which selects half. On a GPU: bf16, channels_last, larger models, the time of all
timed steps together, so that the host may run ahead, and the peak of the memory. `host` is the time of the same step on
8 samples: what the host takes to launch it. Each case writes a record.

`--against` compares sparse steps of `partial` with those of the package in another checkout: two processes side by
side, which take turns within each round. The script, its models and its data are this checkout's in both. `--root
digits` takes scikit-learn's digits, where CIFAR-10 is not at hand.
"""

from __future__ import annotations

import argparse
import copy
import functools
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
from rules import composer_probabilities
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import cost_share
from lightning_ast.core.gate import GateName
from lightning_ast.demo.data import load_images

sys.path.append(str(Path(__file__).parent.parent))
from tests.core.partial.models import GPT

CONFIGURATIONS: list[tuple[str, float]] = [
    ("dense", 1.0),
    ("mask", 0.4),
    *(("subset", rate) for rate in (0.4, 0.2, 0.1)),
    *(("partial", rate) for rate in (0.4, 0.2, 0.1)),
    *(("prune", rate) for rate in (0.4, 0.2, 0.1)),
    ("infobatch", 1.0),
    ("selective-backprop", 0.5),
]
OTHERS = ("dense", "infobatch", "selective-backprop")
"""What trains without our callback."""

HOST_BATCH = 8
"""The samples of a step whose time is the host's."""


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
        """Make a fresh model with the same weights every time, and seed what follows."""
        model = copy.deepcopy(_made(self))
        torch.manual_seed(0)
        return model

    def build(self) -> nn.Module:
        """Make the model, which takes seconds where it is large."""
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

    def data(self, images: Tensor, labels: Tensor, batches: int, *, batch: int | None = None) -> DataLoader[Any]:
        """Load enough batches of real data into memory."""
        batch = batch or self.batch
        count = batch * batches
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
        return DataLoader(Rows(x, y), batch, drop_last=True, collate_fn=tuple)


class Rows(TensorDataset):
    """Tensors that give the samples of a batch at once, so that loading does not take the time of a step."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        rows = torch.tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


@functools.lru_cache(1)
def _made(case: Case) -> nn.Module:
    return case.build()


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

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample ``(B,)``."""
        scores = self.net(x)
        losses = F.cross_entropy(scores.view(-1, scores.shape[-1]), y.reshape(-1), reduction="none")
        return losses.view(len(x), -1).mean(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class InfoBatchModel(Model):
    """Weighs the loss of each sample and remembers it on the host, as InfoBatch's rule does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.losses(*batch)
        self.remembered = losses.detach().cpu()
        return (losses * torch.ones_like(losses)).mean()


class SelectiveBackpropModel(Model):
    """Selects half of the batch by a forward of all of it, as Composer's Selective Backprop does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            losses = self.losses(x, y)
        rows = torch.multinomial(composer_probabilities(losses, 0.5), len(x) // 2).to(x.device)
        return super().training_step((x[rows], y[rows]), batch_idx)


class Times(pl.Callback):
    """Seconds of the steps and of their forwards, and the rate of the selection, the first steps left out.

    Args:
        skip: The steps that are left out.
        stop: The last step that is timed.
        selection: The callback whose rate is read.
        split: Whether the forward is timed by itself, for which the device is waited for at every step.
    """

    def __init__(self, *, skip: int, stop: int, selection: SparseSelectionCallback | None, split: bool) -> None:
        self.skip = skip
        self.stop = stop
        self.selection = selection
        self.split = split
        self.each = split or not torch.cuda.is_available()
        self.steps: list[float] = []
        self.forwards: list[float] = []
        self.last = self.start = 0.0
        self.before = (0, 0)
        self.peak_bytes: int | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = now(wait=self.split)

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.split and trainer.global_step >= self.skip:
            self.forwards.append(now() - self.start)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self.skip:
            self.before = self.samples()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.last = now()
        elif step > self.skip and (self.each or step == self.stop):
            end = now()
            self.steps.append((end - self.last) / (1 if self.each else self.stop - self.skip))
            self.last = end
        if step == self.stop and torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()

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


@dataclass(frozen=True)
class Measured:
    """What a short training took.

    Attributes:
        seconds: The median of its steps.
        forward: The median of their forwards; None where they were not timed.
        rate: The share of the samples that was selected.
        peak_bytes: The peak of the GPU's memory; None on a CPU.
    """

    seconds: float
    forward: float | None
    rate: float
    peak_bytes: int | None


def callbacks_of(mode: str, rate: float, gate: GateName) -> list[Any]:
    """Make the callbacks of a mode; none where it is not one of ours."""
    if mode in OTHERS:
        return []
    if mode == "prune":
        selection = SparseSelectionCallback(mode="prune", target_activation_rate=rate, prune_steps="keep")
        return [selection, TwoStageScheduler(warmup_epochs=1)]
    return [SparseSelectionCallback(mode=mode, target_activation_rate=rate, gate=gate)]  # type: ignore[arg-type]


def run(
    case: Case, mode: str, rate: float, data: DataLoader[Any], options: argparse.Namespace, *, split: bool = False
) -> Measured:
    """Train for a short time."""
    gpu = torch.cuda.is_available()
    callbacks = callbacks_of(mode, rate, options.gate)
    dense = len(data) if mode == "prune" else 0  # it remembers scores in an epoch before
    stop = dense + len(data)
    times = Times(skip=dense + options.skip, stop=stop, selection=callbacks[0] if callbacks else None, split=split)
    trainer = pl.Trainer(
        max_epochs=2 if dense else 1,
        limit_val_batches=0,
        precision="bf16-mixed" if gpu else "32-true",
        callbacks=[*callbacks, times],
        **QUIET,
    )
    model = {"infobatch": InfoBatchModel, "selective-backprop": SelectiveBackpropModel}.get(mode, Model)
    trainer.fit(model(case, channels_last=gpu and case.model.startswith("resnet")), data)
    forward = statistics.median(times.forwards) if times.forwards else None
    return Measured(statistics.median(times.steps), forward, times.rate, times.peak_bytes)


def configurations(options: argparse.Namespace) -> list[tuple[str, float]]:
    """List the modes and rates that are measured."""
    return [
        (mode, rate)
        for mode, rate in CONFIGURATIONS
        if mode in OTHERS or options.rates is None or rate in options.rates
        if mode == "dense" or options.modes is None or mode in options.modes
    ]


def measure(case: Case, images: Tensor, labels: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all configurations of a case, in rounds."""
    data = case.data(images, labels, options.steps)
    run(case, "dense", 1.0, data, options)  # warm up
    chosen = configurations(options)
    found: dict[tuple[str, float], list[Measured]] = {each: [] for each in chosen}
    forwards: list[float] = []
    for _ in range(options.rounds):
        whole = run(case, "dense", 1.0, data, options, split=True)
        assert whole.forward is not None
        forwards.append(whole.forward / whole.seconds)
        for mode, rate in chosen:
            found[mode, rate].append(run(case, mode, rate, data, options))
    forward = statistics.median(forwards)
    few = case.data(images, labels, options.steps, batch=HOST_BATCH)
    host = {mode: run(case, mode, rate, few, options).seconds for mode, rate in (("dense", 1.0), ("partial", 0.4))}
    rows = []
    for (mode, rate), measured in found.items():
        rows.append(row_of(mode, rate, measured, found["dense", 1.0], forward))
        print(case.name, rows[-1], flush=True)
    milliseconds = {mode: round(1000 * seconds, 2) for mode, seconds in host.items()}
    return {"forward_share": round(forward, 3), "host_milliseconds": milliseconds, "rows": rows}


def row_of(mode: str, rate: float, measured: list[Measured], dense: list[Measured], forward: float) -> dict[str, Any]:
    """Summarise the rounds of one configuration beside the dense ones of the same rounds."""
    shares = [one.seconds / other.seconds for one, other in zip(measured, dense, strict=True)]
    observed = measured[-1].rate
    peaks = [one.peak_bytes for one in measured if one.peak_bytes is not None]
    return {
        "mode": mode,
        "rate": rate,
        "observed_rate": round(observed, 4),
        "milliseconds": round(1000 * statistics.median(one.seconds for one in measured), 1),
        "share_of_dense": round(statistics.median(shares), 3),
        "share_by_round": [round(share, 3) for share in shares],
        "ideal_share": round(forward + observed * (1 - forward), 3) if mode == "partial" else None,
        "cost_model": None if mode in OTHERS else round(cost_share(mode, observed), 3),  # type: ignore[arg-type]
        "peak_gibibytes": round(max(peaks) / 2**30, 2) if peaks else None,
    }


def step_seconds(case: Case, mode: str, rate: float, data: DataLoader[Any], options: argparse.Namespace) -> float:
    """Return the median step of a short training; what it held of the GPU's memory is free again."""
    seconds = run(case, mode, rate, data, options).seconds
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return seconds


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
    parser.add_argument("--rates", type=float, nargs="+", help="of our modes (all; with --against 0.4 and 0.1)")
    parser.add_argument("--gate", choices=["soft", "topk"], default="soft", help="of the modes that select in a batch")
    parser.add_argument("--modes", nargs="+", choices=sorted({mode for mode, _ in CONFIGURATIONS}), help="beside dense")
    parser.add_argument("--seconds", type=float, help="with --against: of each case's rounds, at most")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.against and options.rates is None:
        options.rates = [0.4, 0.1]
    return options


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
        gate = {} if options.gate == "soft" else {"gate": options.gate}
        records.append({"benchmark": "step-time", **facts(case), **gate, **measured, **provenance()})
        save(records[-1], f"step-time-{kind()}-{case.name}", folder=options.out, indent=1)
    return records


if __name__ == "__main__":
    silence_lightning()
    main()
