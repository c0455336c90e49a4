"""Limits of the Trainer that are too large to count with are named; the largest that can be counted are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.command import BORING, run

HUGE = "9" * 26


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.parametrize("name", ["max_epochs", "max_steps", "limit_train_batches", "limit_val_batches"])
def test_a_limit_that_is_too_large_is_named(name: str, tmp_path: Path) -> None:
    options = ("--trainer.accelerator=cpu", "--trainer.callbacks+=lightning_ast.SparseSelectionCallback")
    options += ("--trainer.callbacks+=lightning_ast.TwoStageScheduler", "--budget_seconds=99999")
    done = run(
        "advise", "--seed_everything=1", "--model", BORING, *options, f"--trainer.{name}={HUGE}", cwd=tmp_path, status=2
    )
    assert done.last == f"lightning-ast: {name}: expected at most {sys.maxsize}, got {HUGE}."


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
