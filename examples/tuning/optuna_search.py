"""Search coverage, gate and stages with Optuna; each trial is made by LightningCLI and stopped early where it is poor.

What is maximised is the accuracy less a price for the work: with a price of 0.02, two points of accuracy are worth as
much as the whole work of a dense run.
"""

from pathlib import Path
from typing import Any

import lightning as L
import optuna
from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningCLI

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


def search(trials: int, *, price: float = 0.02, config: Path = CONFIG, options: tuple[str, ...] = ()) -> optuna.Study:
    """Run a study and return it.

    Args:
        trials: The number of trials.
        price: The accuracy, in [0, 1], that the whole work of a dense run is worth.
        config: The configuration of the run without its selection.
        options: Further options of every trial.
    """

    def objective(trial: optuna.Trial) -> float:
        given: dict[str, Any] = {"run": False, "save_config_callback": None}
        cli = LightningCLI(args=[f"--config={config}", *options, *arguments(trial)], **given)
        selection = next(each for each in cli.trainer.callbacks if type(each).__name__ == "SparseSelectionCallback")
        cli.trainer.callbacks.append(StopPoorTrials(trial))
        cli.trainer.fit(cli.model, cli.datamodule)
        accuracy = float(cli.trainer.callback_metrics["val_acc"])
        work = 1 - selection.ledger.savings()["flops"]
        trial.set_user_attr("accuracy", accuracy)
        trial.set_user_attr("work", work)
        return accuracy - price * work

    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=3)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(objective, n_trials=trials)
    return study


def main(trials: int = 12, price: float = 0.02) -> None:
    """Search, and print what was found.

    Args:
        trials: The number of trials.
        price: The accuracy, in [0, 1], that the whole work of a dense run is worth.
    """
    study = search(trials, price=price)
    stopped = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{len(study.trials)} trials, {stopped} of them stopped early")
    print(f"best: {study.best_params}")
    print(f"accuracy {study.best_trial.user_attrs['accuracy']:.2%}, work {study.best_trial.user_attrs['work']:.2f}")


if __name__ == "__main__":
    auto_cli(main)
