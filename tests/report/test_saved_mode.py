"""The mode on the page is the one that the run had, not the one of a file that a person left in the log folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_ast.report import read_runs
from tests.helpers.command import run

CALLBACK = "{{class_path: lightning_ast.SparseSelectionCallback, init_args: {{mode: {}}}}}"
CONFIG = "trainer: {{callbacks: [" + CALLBACK + "]}}\n"
MODEL = """
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 4), torch.arange(16) % 2), batch_size=8)
"""
FIT = f"""
seed_everything: 1
model: {{class_path: saved_mode_net.Net}}
trainer:
  accelerator: cpu
  max_epochs: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: ., name: '', version: ''}}}}
  callbacks: [{CALLBACK.format("partial")}]
"""


def saved(path: Path, mode: str, *, at: int) -> None:
    path.write_text(CONFIG.format(mode))
    os.utime(path, (at, at))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text("epoch,step,train_loss\n0,0,1.0\n0,1,0.5\n")
    return tmp_path


def mode_of(folder: Path) -> str | None:
    (found,) = read_runs([folder])
    return found.mode


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_an_option_of_the_command_line_wins_over_the_users_file(tmp_path: Path) -> None:
    (tmp_path / "saved_mode_net.py").write_text(MODEL)
    (tmp_path / "config.yaml").write_text(FIT)
    run("fit", "--config", "config.yaml", "--trainer.callbacks.mode=subset", cwd=tmp_path)
    assert (tmp_path / "config_1.yaml").exists()
    run("report", ".", "--out", "page", cwd=tmp_path)
    page = (tmp_path / "page" / "report.html").read_text()
    assert "subset" in page
    assert "partial" not in page
    assert mode_of(tmp_path) == "subset"


def test_the_newest_file(folder: Path) -> None:
    saved(folder / "config.yaml", "mask", at=2_000)
    saved(folder / "config_1.yaml", "subset", at=3_000)
    saved(folder / "config_2.yaml", "partial", at=1_000)
    assert mode_of(folder) == "subset"
    for number in (2, 10, 9):
        saved(folder / f"config_{number}.yaml", "prune" if number == 10 else "mask", at=3_000)
    assert mode_of(folder) == "prune", "of the same time, as after a copy: the highest number, which is the last one"


def test_files_that_no_run_saved(folder: Path) -> None:
    saved(folder / "config.yaml", "partial", at=1_000)
    saved(folder / "config_old.yaml", "mask", at=9_000)
    assert mode_of(folder) == "partial"
    (folder / "config_1.yaml").write_bytes(bytes(range(256)) * 1_000)
    assert mode_of(folder) is None
