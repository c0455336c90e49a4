"""Trains a cell of the compatibility matrix with Lightning, and writes down what every rank trained on.

``python -m tests.compatibility.train_cell popen FOLDER`` trains all cells of Lightning's ``ddp`` strategy, which starts the second
process by running this very command again.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import PIController, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.demo.data import load_images
from lightning_ast.mode_facts import Mode
from tests.compatibility.matrix import Cell, cells, verdict
from tests.compatibility.oracle import Micro, network, optimizers_of
from tests.helpers.training import quiet_trainer

__all__ = ["record_of", "run"]

BATCH, EACH = 24, 111  # batches of 24, 24, 24, 24 and 15 samples for each process
CUT = 3.2
"""Threshold on the losses: about half of an untrained network's are above it."""


@dataclass
class Labelled:
    """A batch as a dataclass."""

    x: Tensor
    y: Tensor


def collate(kind: str, rows: list[tuple[Tensor, Tensor]]) -> Any:
    """A batch of a kind."""
    x, y = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    if kind == "nested":
        return {"images": [x, {"size": torch.tensor(8)}], "names": [f"digit {int(i)}" for i in y], "targets": (y,)}
    return {"tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}, "dataclass": Labelled(x, y)}[kind]


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch of any kind."""
    if isinstance(batch, Labelled):
        return batch.x, batch.y
    if isinstance(batch, dict):
        if "names" not in batch:
            return batch["x"], batch["y"]
        assert batch["names"] == [f"digit {int(i)}" for i in batch["targets"][0]], "the rows belong together"
        return batch["images"][0], batch["targets"][0]
    return batch[0], batch[1]


class Captured(pl.LightningModule):
    """A module with an ordinary loss."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.automatic_optimization = cell.optimization in ("automatic", "lbfgs")
        net = network(cell.batchnorm != "none")
        self.net = torch.compile(net, backend="aot_eager") if cell.compile == "on" else net

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = unpack(batch)
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return None

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers_of(self.cell, list(self.parameters()))


class Explicit(SparseLossMixin, Captured):
    """The same with per-sample losses of its own."""

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = unpack(batch)
        return F.cross_entropy(self.net(x), y, reduction="none")

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch, batch_idx).mean()


class Record(pl.Callback):
    """Keeps each micro-batch with its selection; stands behind the selection callback, which shows it."""

    def __init__(self, selection: SparseSelectionCallback, stem: Path) -> None:
        self.selection, self.stem = selection, stem
        self.micros: list[Micro] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        stepped_file(self.stem).touch()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        x, y = (part.detach().cpu() for part in unpack(batch))
        kept = self.selection.last_selection
        indices = weights = None
        if kept.weights is not None or kept.indices.numel() < y.numel():
            indices, weights = kept.indices.cpu(), kept.weights
        weights = None if weights is None else weights.cpu()
        self.micros.append(Micro(trainer.current_epoch, x, y, indices, weights))

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        parameters = [parameter.detach().float().cpu() for parameter in module.parameters()]
        kept = [vars(micro) for micro in self.micros]
        torch.save({"micros": kept, "parameters": parameters}, f"{self.stem}.rank{trainer.global_rank}.pt")


def stepped_file(stem: Path) -> Path:
    """Exists once an optimizer is about to step."""
    return Path(f"{stem}.stepped")


def error_file(stem: Path, rank: int = 0) -> Path:
    """Holds the error of a run that failed."""
    return Path(f"{stem}.rank{rank}.error")


def record_of(stem: Path, ranks: int) -> tuple[list[list[Micro]], list[list[Tensor]]]:
    """What each rank trained on, and each one's parameters at the end."""
    saved = [torch.load(f"{stem}.rank{rank}.pt") for rank in range(ranks)]
    return [[Micro(**micro) for micro in one["micros"]] for one in saved], [one["parameters"] for one in saved]


def selection_of(cell: Cell) -> SparseSelectionCallback:
    """The callback of a cell. A threshold that stands still makes the micro-batches keep unequal numbers."""
    mode: Mode = cell.mode  # type: ignore[assignment]
    gate: GateName = cell.gate  # type: ignore[assignment]
    weighting: Weighting = cell.weighting  # type: ignore[assignment]
    fixed = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=CUT * (2 if gate == "soft" else 1))
    return SparseSelectionCallback(
        target_activation_rate=0.5,
        mode=mode,
        gate=gate,
        weighting=weighting,
        significance="loss",
        controller=None if mode == "prune" or gate == "topk" else fixed,
        batchnorm="exact" if cell.batchnorm == "exact" else "selected",
    )


def run(cell: Cell, folder: Path) -> Path:
    """Train a cell: some optimizer steps, in ``prune`` behind a dense epoch.

    Args:
        cell: the set-up.
        folder: where the record is written.

    Returns:
        The stem of the record's files.
    """
    stem = folder / cell.id
    if cell.compile == "on":
        torch._dynamo.reset()
    processes = 1 if cell.devices == "1" else 2
    images = load_images("digits")
    x, y = images.train_images[: EACH * processes].float() / 255, images.train_labels[: EACH * processes]
    selection = selection_of(cell)
    callbacks: list[pl.Callback] = [selection, Record(selection, stem)]
    if cell.mode == "prune":
        callbacks.append(TwoStageScheduler(warmup_epochs=1))
    trainer = quiet_trainer(
        max_epochs=(1 if cell.accumulation == "1" else 2) + (cell.mode == "prune"),
        callbacks=callbacks,
        accelerator="gpu" if cell.precision == "16-mixed" else "cpu",
        devices=processes,
        strategy={"1": "auto", "popen": "ddp", "spawn": "ddp_spawn"}[cell.devices],
        precision=cell.precision,
        accumulate_grad_batches=int(cell.accumulation),
    )
    module = (Explicit if cell.loss == "explicit" else Captured)(cell)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=BATCH, collate_fn=partial(collate, cell.batch)))
    return stem


def main(folder: Path) -> None:
    """Train all cells of two processes that Lightning starts by running this script again."""
    for cell in cells():
        if cell.devices == "popen" and verdict(cell) != "untested":
            try:
                run(cell, folder)
            except Exception:
                rank = int(os.environ.get("LOCAL_RANK", "0"))
                error_file(folder / cell.id, rank).write_text(traceback.format_exc())


if __name__ == "__main__" and sys.argv[1] == "popen":
    main(Path(sys.argv[2]))
