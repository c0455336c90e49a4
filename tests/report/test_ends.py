"""The end of a run: the last value written is the one that counts, and what comes after the fit is not of the fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_ast.report import read_runs, write_report
from lightning_ast.report.derive import clip_to_training, last_epoch
from lightning_ast.report.page import summarize
from tests.report.conftest import made

EPOCHS = [(1, 0), (3, 0), (5, 1), (7, 1)]
LAST = {
    "ast/savings_samples": 0.3,
    "ast/savings_flops": 0.196,
    "ast/savings_seconds": -0.05,
    "ast/activation_rate": 1.0,
}


def closed(folder: Path, kind: str, step: int) -> None:
    """A run of two epochs of 4 steps as Lightning logs it, which writes its last values again at ``step``."""
    logger: Logger = TensorBoardLogger(folder, version=0) if kind == "TensorBoard" else CSVLogger(folder, version=0)
    for at, epoch in EPOCHS:
        logger.log_metrics({"epoch": epoch, "train_loss": 1.0, "ast/stage": 2.0, **dict.fromkeys(LAST, 0.5)}, at)
    logger.log_metrics({"ast/stage": 2.0, **LAST}, step)
    logger.save()
    logger.log_metrics({"epoch": 2, "val_loss": 1.0, "val_acc": 0.5}, 8)  # trainer.validate after the fit
    logger.save()
    logger.finalize("success")


@pytest.mark.parametrize("kind", ["TensorBoard", "CSV"])
@pytest.mark.parametrize("step", [7, 8], ids=["last step", "steps done"])
def test_the_last_values_written_are_the_runs_own(tmp_path: Path, kind: str, step: int) -> None:
    closed(tmp_path, kind, step)
    (run,) = read_runs([tmp_path])
    row = summarize(clip_to_training(run))
    assert row.epochs == 2
    assert row.final_accuracy is None, "it was logged after the fit"
    saved = {name: row.savings[name] for name in ("samples", "flops", "seconds")}
    assert saved == {name: pytest.approx(LAST[f"ast/savings_{name}"]) for name in saved}


def test_the_page_shows_them_and_calls_skipped_samples_no_savings(tmp_path: Path) -> None:
    closed(tmp_path / "logs", "CSV", 7)
    page = write_report([tmp_path / "logs"], tmp_path / "out").read_text(encoding="utf-8")
    headings = re.findall(r'<th scope="col">(.*?)</th>', page)[1:]
    cells = [re.sub("<.*", "", cell) for cell in re.findall(r"<td>(.*?)</td>", page)]
    table = dict(zip(headings, cells))
    assert table["samples skipped"] == "30.0%"
    assert table["saved: FLOPs"] == "19.6%"
    assert table["saved: seconds"] == "-5.0%"


def test_a_validation_after_the_fit_is_no_epoch_where_only_it_logs_a_loss() -> None:
    run = made(
        {
            "epoch": [*EPOCHS, (8, 2)],
            "ast/stage": [(1, 1), (3, 1), (5, 1), (7, 1)],
            "val_loss": [(3, 1), (7, 1), (8, 1)],
        }
    )
    assert last_epoch(clip_to_training(run)) == 1
    begun = made({"epoch": [*EPOCHS, (8, 2)], "ast/stage": [(step, 1) for step in (1, 3, 5, 7, 8)]})
    assert clip_to_training(begun) is begun, "training logged a step of its third epoch"
