"""A resumed run sets its loaders up at the epochs where the uninterrupted one does, and ends with its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.training import assert_same_weights, quiet_trainer, weights

BATCH, BATCHES, EPOCHS = 4, 6, 5

pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated", "ignore:You're resuming")


class Net(pl.LightningModule):
    """Two layers with dropout between them."""

    def __init__(self, asks_for_steps: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.asks_for_steps = asks_for_steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.asks_for_steps:  # sets the loaders up before the checkpoint is read
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Data(pl.LightningDataModule):
    """Draws a random number whenever a loader is set up: a reload too many is seen in the parameters."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.loaded: list[int] = []
        self.validated: list[int] = []
        x = torch.randn(BATCH * BATCHES, 6, generator=torch.Generator().manual_seed(0))
        self.samples = TensorDataset(x, x[:, :3].argmax(1))

    def train_dataloader(self) -> Any:
        self.loaded.append(self.trainer.current_epoch)
        torch.rand(1)
        return self.kind(self.samples, batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        self.validated.append(self.trainer.current_epoch)
        torch.rand(1)
        return DataLoader(self.samples, batch_size=24)


class SaveAll(pl.Callback):
    """Several checkpoints of one run, and which loaders it had set up by then."""

    def __init__(self, folder: Path, points: list[tuple[int, int | None]]) -> None:
        self.folder, self.points = folder, points
        self.loaded: dict[Path, tuple[int, int]] = {}

    def save(self, trainer: pl.Trainer, batch: int | None) -> None:
        if (trainer.current_epoch, batch) in self.points:
            path = self.folder / f"{trainer.current_epoch}-{batch}.ckpt"
            trainer.save_checkpoint(path)
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self.loaded[path] = len(data.loaded), len(data.validated)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.save(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save(trainer, None)


def train(
    mode: Any,
    kind: Any,
    *callbacks: Any,
    seed: int = 0,
    ckpt_path: Path | None = None,
    asks: bool = False,
    **options: Any,
) -> tuple[Net, Data, Tensor]:
    """Train five epochs; a resumed run starts from other weights and another random state.

    Returns:
        The module, its data, and the random number that would be drawn next.
    """
    torch.manual_seed(seed)
    module, data = Net(asks), Data(kind)
    selection = [SparseSelectionCallback(mode=mode, target_activation_rate=0.5), TwoStageScheduler(warmup_epochs=1)]
    settings = {"max_epochs": EPOCHS, "limit_val_batches": 0, **options}
    quiet_trainer(callbacks=[*selection, *callbacks], **settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, data, torch.rand(1)


def assert_resumes(mode: Any, kind: Any, saves: SaveAll, same: bool = True, **options: Any) -> None:
    straight, data, drawn = train(mode, kind, saves, **options)
    assert len(saves.loaded) == len(saves.points)
    for path, (loaded, validated) in saves.loaded.items():
        again, after, redrawn = train(mode, kind, seed=7, ckpt_path=path, **options)
        expected = data.loaded[loaded:]
        first = len(after.loaded) - len(expected)
        assert after.loaded[first:] == expected, path.name
        assert 1 <= first <= 1 + bool(options.get("asks")), path.name
        if options.get("limit_val_batches"):
            assert after.validated[1:] == data.validated[validated:], path.name
        if same:
            assert_same_weights(weights(straight), weights(again))
            assert torch.equal(drawn, redrawn), path.name


POINTS = [(0, 2), (1, 1), (1, None), (2, 0), (2, None), (3, 1)]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("mode", ["partial", "mask", "subset"])
def test_a_loader_that_knows_its_place(tmp_path: Path, mode: str, every: int) -> None:
    saves = SaveAll(tmp_path, POINTS)
    assert_resumes(mode, StatefulDataLoader, saves, reload_dataloaders_every_n_epochs=every)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_prune(tmp_path: Path, every: int) -> None:
    assert_resumes("prune", DataLoader, SaveAll(tmp_path, POINTS), reload_dataloaders_every_n_epochs=every)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_plain_loader(tmp_path: Path, every: int) -> None:
    """It does not know its place in the midst of an epoch; it is set up at the right epochs all the same."""
    options: Any = {"reload_dataloaders_every_n_epochs": every}
    assert_resumes("partial", DataLoader, SaveAll(tmp_path, [(0, None), (1, None), (2, None)]), **options)
    assert_resumes("partial", DataLoader, SaveAll(tmp_path, [(1, 1), (2, 0), (3, 1)]), same=False, **options)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(("mode", "kind"), [("partial", StatefulDataLoader), ("prune", DataLoader)])
def test_validation_loaders(tmp_path: Path, mode: str, kind: Any, every: int) -> None:
    options: Any = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "reload_dataloaders_every_n_epochs": every}
    assert_resumes(mode, kind, SaveAll(tmp_path, [(0, None), (1, 1), (2, None), (3, 1)]), **options)


@pytest.mark.parametrize(("mode", "kind"), [("partial", StatefulDataLoader), ("prune", DataLoader)])
@pytest.mark.parametrize(
    "options",
    [{"asks": True}, {"max_epochs": -1, "max_steps": 20}, {"max_epochs": 5, "val_check_interval": 0.5}],
    ids=str,
)
def test_other_runs(tmp_path: Path, mode: str, kind: Any, options: Any) -> None:
    """Loaders that are set up before the checkpoint is read; a run that steps limit; validation within an epoch."""
    validates = {"limit_val_batches": 1, "num_sanity_val_steps": 0} if "val_check_interval" in options else {}
    saves = SaveAll(tmp_path, [(1, 1), (1, None), (2, 0)])
    assert_resumes(mode, kind, saves, reload_dataloaders_every_n_epochs=2, **options, **validates)


def test_a_run_that_another_one_goes_on_from_again(tmp_path: Path) -> None:
    """The resumed run's own checkpoints are as good as the first run's."""
    options: Any = {"reload_dataloaders_every_n_epochs": 3}
    straight, _, drawn = train("partial", StatefulDataLoader, SaveAll(tmp_path, [(1, 1)]), **options)
    train(
        "partial", StatefulDataLoader, SaveAll(tmp_path, [(2, 3)]), seed=7, ckpt_path=tmp_path / "1-1.ckpt", **options
    )
    again, data, redrawn = train("partial", StatefulDataLoader, seed=8, ckpt_path=tmp_path / "2-3.ckpt", **options)
    assert data.loaded == [2, 3]
    assert_same_weights(weights(straight), weights(again))
    assert torch.equal(drawn, redrawn)
