"""What the tests of mode ``prune`` share: images that know their index, a module that writes down what it saw, and the
significance and the plans that follow from it by hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import SampleSelector, SignificanceHistory, plan_epoch
from lightning_ast.demo.data import load_images
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer

SIZE = 300


class Indexed(Dataset[tuple[Tensor, Tensor, int]]):
    """Real handwritten digits, each with its index; ``noise`` draws from the global generator of the process."""

    def __init__(self, size: int = SIZE, noise: float = 0.0) -> None:
        images = load_images("digits")
        self.x, self.y, self.noise = images.train_images[:size].float() / 255, images.train_labels[:size], noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.x[index]
        return x + self.noise * torch.randn_like(x) if self.noise else x, self.y[index], index


class Recorded(Sampler[int]):
    """Another sampler, which keeps what it drew, epoch by epoch."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.drawn = sampler, []

    def __iter__(self) -> Iterator[int]:
        self.drawn.append([])
        for index in self.sampler:
            self.drawn[-1].append(int(index))
            yield index

    def __len__(self) -> int:
        return len(self.sampler)


class Witness(PlainNet):
    """Writes down, batch by batch: epoch, index of the batch, dataset indices, and each sample's EL2N by hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.batches: list[tuple[int, int, list[int], list[float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, indices = (batch["x"], batch["y"], batch["i"]) if isinstance(batch, dict) else batch
        scores = self(x)
        errors = [
            float((row.softmax(0) - nn.functional.one_hot(label, 10)).norm()) for row, label in zip(scores.detach(), y)
        ]
        self.batches.append((self.trainer.current_epoch, batch_idx, indices.tolist(), errors))
        return nn.functional.cross_entropy(scores, y)

    def epochs(self) -> dict[int, list[int]]:
        """Dataset indices in the order of training, by epoch."""
        seen: dict[int, list[int]] = defaultdict(list)
        for epoch, _, indices, _ in self.batches:
            seen[epoch] += indices
        return dict(seen)


class Cycle(Witness):
    """With a one-cycle schedule over the number of steps that the trainer estimates."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=self.steps + 1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def history_by_hand(module: Witness, before_epoch: int, size: int = SIZE) -> SignificanceHistory:
    """What was remembered before an epoch began: the last epoch's score of each sample (the largest within one)."""
    latest: dict[int, tuple[int, float]] = {}
    for epoch, _, indices, errors in module.batches:
        for index, error in zip(indices, errors):
            if epoch < before_epoch:
                then, largest = latest.get(index, (-1, 0.0))
                latest[index] = (epoch, max(error, largest) if then == epoch else error)
    history = SignificanceHistory(size)
    history.observe(torch.tensor(list(latest), dtype=torch.long), torch.tensor([e for _, e in latest.values()]))
    history.fold()
    return history


def plan_by_hand(
    module: Witness, draws: list[int], *, epoch: int, count: int, size: int = SIZE, rank: int = 0
) -> list[int]:
    """The indices that a pruned epoch must load, in order."""
    history = history_by_hand(module, epoch, size)
    selector = SampleSelector(weighting="none", rank=rank)
    return plan_epoch(history, torch.tensor(draws), epoch=epoch, count=count, selector=selector).indices.tolist()


def epochs_by_hand(module: Witness) -> dict[int, list[int]]:
    """What a run without shuffling must load."""
    everyone = list(range(SIZE))
    return {e: everyone if e in (0, 3) else plan_by_hand(module, everyone, epoch=e, count=120) for e in range(4)}


def pruned(**options: Any) -> SparseSelectionCallback:
    return SparseSelectionCallback(**{"mode": "prune", "target_activation_rate": 0.4, **options})


def loader(**options: Any) -> DataLoader[Any]:
    dataset = options.pop("dataset", None) or Indexed()
    return DataLoader(dataset, **{"batch_size": 32, **options})


def fit(
    module: pl.LightningModule,
    data: Any,
    *callbacks: pl.Callback,
    warmup: Any = 1,
    cooldown: Any = 1,
    ckpt_path: Any = None,
    val: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Four epochs: dense, pruned, pruned, dense."""
    schedule = TwoStageScheduler(warmup_epochs=warmup, cooldown_epochs=cooldown)
    trainer = quiet_trainer(callbacks=[*callbacks, schedule], **{"max_epochs": 4, **options})
    trainer.fit(module, data, val, ckpt_path=ckpt_path)
    return trainer


def fresh(cls: type[Any] = Witness, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return cls(**options)
