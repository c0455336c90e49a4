"""The configuration for several processes, started by Lightning and by torchrun; loggers that write without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import lightning as L
import pytest
import yaml

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo import ImageData, ResNet9
from tests.helpers.command import run

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "several_processes" / "ddp.yaml"
SHORT = (
    "--trainer.max_epochs=4",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=logs",
)


def test_one_process_takes_the_same_file(tmp_path: Path) -> None:
    done = run("fit", "--config", str(CONFIG), *SHORT, "--trainer.devices=1", "--trainer.strategy=auto", cwd=tmp_path)
    assert re.search(r"Epoch 3/3 \| Loss: \S+ \| Val Acc: (\S+)%", done.out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [(), ("-m", "torch.distributed.run", "--nproc_per_node=2")], ids=["own", "torchrun"]
)
def test_two_processes(launcher: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, *launcher, "-m", "lightning_ast", "fit", "--config", str(CONFIG), *SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stdout + done.stderr
    assert done.stdout.count("Epoch 3/3 |") == 1, "one process tells"
    assert "self.log('ast/" not in done.stderr, "Lightning asks for no sync_dist of what rank 0 alone has"
    [saved] = tmp_path.glob("logs/lightning_logs/version_0/config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["devices"] == 2


@pytest.mark.parametrize("method", ["dense_1", pytest.param("ours_2", marks=pytest.mark.slow)])
def test_the_comparison(recipe: Callable[[str], ModuleType], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = recipe("several_processes/digits")
    assert method in get_args(script.Method)
    figures = script.train(method, max_steps=6)
    assert 0 < figures["test_accuracy"] < 1
    assert figures["work"] == 1 if method == "dense_1" else 0.5 < figures["work"] < 1


def trained_with(logger: object) -> SparseSelectionCallback:
    """A short run that selects and logs each step."""
    selection = SparseSelectionCallback(target_activation_rate=0.5)
    trainer = L.Trainer(
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=1,
        callbacks=[selection, TwoStageScheduler(warmup_epochs=1)],
        logger=logger,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ResNet9(in_channels=1, width=4), datamodule=ImageData("digits", batch_size=32))
    return selection


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    [uri] = re.findall(r"tracking_uri: (\S+)", (ROOT / "docs" / "recipes" / "several-processes.md").read_text())
    logger = L.pytorch.loggers.MLFlowLogger(tracking_uri=uri)
    selection = trained_with(logger)
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    rates = [each.value for each in client.get_metric_history(logger.run_id, "ast/activation_rate")]
    assert rates[0] == 1
    assert rates[-1] == pytest.approx(selection.activation_rate)
    assert client.get_run(logger.run_id).data.metrics["ast/savings_flops"] == pytest.approx(
        selection.ledger.savings()["flops"]
    )


def records(log: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as W&B writes it: blocks of 32 KiB behind a header of 7 bytes."""
    place, found = 7, b""
    while place + 7 <= len(log):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, part = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        found += log[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # the whole of a record, or its last part
            yield found
            found = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_keeps_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.chdir(tmp_path)
    selection = trained_with(L.pytorch.loggers.WandbLogger(offline=True, save_dir=str(tmp_path), project="ast"))
    wandb.finish()
    [file] = tmp_path.rglob("run-*.wandb")
    until = time.monotonic() + 30
    while b"ast/activation_rate" not in file.read_bytes() and time.monotonic() < until:  # another process writes it
        time.sleep(0.5)
    rates = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            if "ast/activation_rate" in (item.key, *item.nested_key):
                rates.append(float(item.value_json))
    assert rates[0] == 1
    assert rates[-1] == pytest.approx(selection.activation_rate)
