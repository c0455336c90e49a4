"""What the wheel must do in an environment that holds nothing but its dependencies: ``python tests/installed.py``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ast
from lightning_ast import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.advice import advise


class Net(pl.LightningModule):
    """What a user writes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    """Train in every mode; ask the command line for what is not installed."""
    place = Path(lightning_ast.__file__)
    assert "site-packages" in place.parts, f"this is the source tree's: {place}"
    assert (place.parent / "py.typed").exists()
    for name in ("sklearn", "jsonargparse", "hypothesis"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed: the environment is not empty"
    data = DataLoader(TensorDataset(torch.randn(256, 8), torch.randint(0, 3, (256,))), batch_size=32)
    for mode in ("mask", "subset", "partial", "prune"):
        callback = SparseSelectionCallback(mode=mode)  # type: ignore[arg-type]
        trainer = pl.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            callbacks=[callback, TwoStageScheduler(warmup_epochs=1), SparseTrainingMonitor(), EnergyMonitor()],
        )
        trainer.fit(Net(), data)
        rate = callback.ledger.stages["sparse"].selected / callback.ledger.stages["sparse"].offered
        assert 0.3 < rate < 0.5, (mode, rate)
    advice = advise(pl.Trainer(max_epochs=3, accelerator="cpu", logger=False), Net(), data, budget_seconds=1)
    assert advice.at("prune", 0.4) is not None, advice
    Path("metrics.csv").write_text("epoch,step,train_loss\n0,1,0.5\n")
    script = Path(sys.executable).parent / "lightning-ast"
    commands = {"fit": "cli", "demo": "vision", "advise --config none.yaml": "cli", "report .": "report"}
    for command, extra in commands.items():
        done = subprocess.run([str(script), *command.split()], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert f"pip install 'lightning-ast[{extra}" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
    print("the wheel works in an empty environment")  # noqa: T201


if __name__ == "__main__":
    main()
