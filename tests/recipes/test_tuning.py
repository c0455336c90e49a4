"""Tuning: a search whose trials are made by LightningCLI, and a sweep of rates from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import run

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "tuning" / "digits.yaml"
SMALL = ("--trainer.max_epochs=5", "--trainer.limit_train_batches=6", "--model.width=4")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_search_tells_accuracy_and_work(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    recipe = benchmark("recipes").load_recipe("tuning/optuna_search")
    study = recipe.search(2, price=0.5, options=(*SMALL, "--trainer.logger=false"))
    assert set(study.best_params) == {"coverage", "gate", "warmup_epochs", "cooldown_epochs"}
    best = study.best_trial.user_attrs
    assert study.best_value == pytest.approx(best["accuracy"] - 0.5 * best["work"])
    assert 0 < best["work"] <= 1
    assert [len(trial.intermediate_values) for trial in study.trials] == [5, 5], "one report an epoch"
    assert study.trials[0].state == optuna.trial.TrialState.COMPLETE


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_poor_trials_are_stopped(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    recipe = benchmark("recipes").load_recipe("tuning/optuna_search")
    monkeypatch.setattr(recipe.optuna.pruners, "MedianPruner", lambda **_: optuna.pruners.ThresholdPruner(lower=1.1))
    study = recipe.search(1, options=(*SMALL, "--trainer.logger=false"))
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    assert len(study.trials[0].intermediate_values) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_best_trial_is_told_beside_a_dense_run(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    recipe = benchmark("recipes").load_recipe("tuning/optuna_search")
    assert recipe.train("dense", max_steps=44)["work"] == 1
    found = recipe.train("search", max_steps=120, trials=1)
    assert found["trials_stopped"] == 0
    assert 0 < found["work"] <= 1


def test_a_sweep_ends_in_one_report(tmp_path: Path) -> None:
    for rate in ("0.4", "1.0"):
        run(
            "fit",
            f"--config={CONFIG}",
            *SMALL,
            f"--trainer.logger.name=rate-{rate}",
            "--trainer.callbacks+=lightning_ast.SparseSelectionCallback",
            "--trainer.callbacks.mode=prune",
            f"--trainer.callbacks.target_activation_rate={rate}",
            "--trainer.callbacks+=lightning_ast.TwoStageScheduler",
            cwd=tmp_path,
        )
    run("report", "logs/rate-0.4", "logs/rate-1.0", "--out", "page", cwd=tmp_path)
    page = (tmp_path / "page" / "report.html").read_text()
    assert "rate-0.4" in page
    assert "rate-1.0" in page
