"""Search coverage, gate and stages with Optuna; each trial is made by LightningCLI and stopped early where it is poor.

What is maximised is the accuracy less a price for the work: with a price of 0.02, two points of accuracy are worth as
much as the whole work of a dense run.
"""

from pathlib import Path
from typing import Literal

import lightning as L
import optuna
from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningCLI

from lightning_ast import SparseSelectionCallback

Method = Literal["dense", "search"]
CONFIG = Path(__file__).parent / "digits.yaml"
SELECTION = "--trainer.callbacks+=lightning_ast.SparseSelectionCallback"
STAGES = "--trainer.callbacks+=lightning_ast.TwoStageScheduler"


class StopPoorTrials(L.Callback):
    """Reports the accuracy of each epoch, and ends a trial that is behind the others at its epoch."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report, and raise Optuna's signal to stop."""
        if trainer.sanity_checking:
            return
        self.trial.report(float(trainer.callback_metrics["val_acc"]), trainer.current_epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def arguments(trial: optuna.Trial) -> list[str]:
    """Return the options of a trial, as one would write them behind `lightning-ast fit`."""
    return [
        SELECTION,
        "--trainer.callbacks.mode=prune",
        f"--trainer.callbacks.target_coverage={trial.suggest_float('coverage', 0.8, 0.99)}",
        f"--trainer.callbacks.gate={trial.suggest_categorical('gate', ['soft', 'topk'])}",
        STAGES,
        f"--trainer.callbacks.warmup_epochs={trial.suggest_int('warmup_epochs', 1, 3)}",
        f"--trainer.callbacks.cooldown_epochs={trial.suggest_int('cooldown_epochs', 0, 2)}",
    ]


def run(arguments: list[str], *callbacks: L.Callback) -> tuple[float, float]:
    """Train as `lightning-ast fit` does; return the accuracy, and the work as a share of a dense run's."""
    cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
    cli.trainer.callbacks += callbacks
    cli.trainer.fit(cli.model, cli.datamodule)
    selection = next(each for each in cli.trainer.callbacks if isinstance(each, SparseSelectionCallback))
    return float(cli.trainer.callback_metrics["val_acc"]), 1 - selection.ledger.savings()["flops"]


def search(trials: int, *, price: float = 0.02, seed: int = 0, options: tuple[str, ...] = ()) -> optuna.Study:
    """Run a study and return it.

    Args:
        trials: The number of trials.
        price: The accuracy, in [0, 1], that the whole work of a dense run is worth.
        seed: The seed of the trials and of what is proposed for them.
        options: Further options of every trial.
    """

    def objective(trial: optuna.Trial) -> float:
        given = [f"--config={CONFIG}", f"--seed_everything={seed}", *options, *arguments(trial)]
        accuracy, work = run(given, StopPoorTrials(trial))
        trial.set_user_attr("accuracy", accuracy)
        trial.set_user_attr("work", work)
        return accuracy - price * work

    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=3)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    study.optimize(objective, n_trials=trials)
    return study


def train(
    method: Method = "search", *, seed: int = 0, max_steps: int = -1, trials: int = 12, price: float = 0.02
) -> dict[str, float]:
    """Search, and return what the best trial reached and cost; or train the run without a selection once.

    Args:
        method: "search", or "dense" for one run on all samples.
        seed: The seed of all runs.
        max_steps: The optimizer steps of a run, enough for its stages and a validation; -1 is all of its epochs.
        trials: The number of trials.
        price: The accuracy, in [0, 1], that the whole work of a dense run is worth.
    """
    options = (f"--trainer.max_steps={max_steps}", "--trainer.logger=false")
    if method == "dense":
        everything = [SELECTION, "--trainer.callbacks.target_activation_rate=1.0"]
        accuracy, work = run([f"--config={CONFIG}", f"--seed_everything={seed}", *options, *everything])
        return {"accuracy": accuracy, "work": work}
    study = search(trials, price=price, seed=seed, options=options)
    print(f"best: {study.best_params}")
    stopped = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    best = study.best_trial.user_attrs
    return {"accuracy": best["accuracy"], "work": best["work"], "trials_stopped": stopped / len(study.trials)}


if __name__ == "__main__":
    print(auto_cli(train))
