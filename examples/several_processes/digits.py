"""Compare one process with two of the same batch, dense and ours: `ddp.yaml` beside this file, half a minute a run.

    python examples/several_processes/digits.py --method ours_2

The number behind a method is that of its processes. Each run is the command ``lightning-ast fit``, which starts them.
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

Method = Literal["dense_1", "dense_2", "ours_1", "ours_2"]
BATCH_SIZE = 64  # of all processes together
DENSE = '{"class_path": "SparseSelectionCallback", "init_args": {"target_activation_rate": 1.0}}'  # counts the FLOPs


def train(method: Method = "ours_2", *, seed: int = 0, max_steps: int = -1) -> dict[str, float]:
    """Train by one method; return the test accuracy, and the work of process 0 as a share of its dense run's."""
    kind, processes = method.split("_")
    settings = {
        "seed_everything": seed,
        "trainer.devices": processes,
        "trainer.strategy": "auto" if processes == "1" else "ddp",
        "trainer.enable_checkpointing": "false",
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "data.init_args.batch_size": BATCH_SIZE // int(processes),
    }
    if kind == "dense":
        settings["trainer.callbacks"] = DENSE
    if max_steps > 0:
        settings["trainer.limit_train_batches"] = max_steps  # of each epoch: the stages need several epochs
    command = [sys.executable, "-m", "lightning_ast", "fit", "--config", str(Path(__file__).parent / "ddp.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        subprocess.run([*command, *arguments, f"--trainer.logger.save_dir={folder}"], check=True, capture_output=True)
        [log] = Path(folder).rglob("metrics.csv")
        with log.open(newline="") as file:
            rows = list(csv.DictReader(file))
    accuracy, saved = (
        float([row[name] for row in rows if row.get(name)][-1]) for name in ("val_acc", "ast/savings_flops")
    )
    return {"test_accuracy": accuracy, "work": 1 - saved}


if __name__ == "__main__":
    print(auto_cli(train))
