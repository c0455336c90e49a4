"""What the recipes share to compare methods: the random share, the schedule, the work of a run."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.recipes import QUIET, chance, counting, one_cycle, work_share


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        self.rates: list[float] = []
        self.seen: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.seen += index.tolist()
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> object:
        return one_cycle(self, torch.optim.SGD(self.parameters(), lr=0.1))


def run(*callbacks: pl.Callback, epochs: int = 4) -> tuple[Classifier, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    x = torch.randn(512, 4)
    data = TensorDataset(x, (x[:, 0] > 0).long(), torch.arange(512))
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **QUIET)
    model = Classifier()
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    return model, trainer


def test_a_dense_run_costs_one_and_a_shortened_one_its_length() -> None:
    _, trainer = run(counting(), epochs=1)
    assert work_share(trainer) == 1
    assert work_share(trainer, length=0.25) == 0.25


def test_the_learning_rate_rises_and_ends_with_the_run() -> None:
    model, _ = run(counting(), epochs=2)
    assert max(model.rates) == pytest.approx(0.1, rel=0.01)
    assert model.rates.index(max(model.rates)) == pytest.approx(0.1 * len(model.rates), abs=1.5)
    assert model.rates[-1] < 0.002


def test_chance_keeps_a_share_that_has_nothing_to_do_with_the_loss() -> None:
    half = SparseSelectionCallback(
        mode="prune", prune_steps="keep", target_activation_rate=0.5, significance=chance, seed=1
    )
    model, trainer = run(half, TwoStageScheduler(warmup_epochs=1))
    assert work_share(trainer) == pytest.approx((1 + 3 * 0.5) / 4, abs=0.02)
    kept = [set(model.seen[start:stop]) for start, stop in ((512, 768), (768, 1024))]
    assert len(kept[0] & kept[1]) == pytest.approx(128, abs=40)  # two random halves have a quarter in common
