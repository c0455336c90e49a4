"""The largest limits of the Trainer that can be counted with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.command import BORING, run


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.parametrize("name", ["max_epochs", "max_steps"])
def test_the_largest_limit_that_can_be_counted(name: str, tmp_path: Path) -> None:
    options = ("--trainer.accelerator=cpu", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=0")
    done = run(
        "advise",
        "--seed_everything=1",
        "--model",
        BORING,
        "--budget_seconds=0.1",
        *options,
        f"--trainer.{name}={sys.maxsize}",
        cwd=tmp_path,
    )
    assert "epochs of 2 batches" in done.out
