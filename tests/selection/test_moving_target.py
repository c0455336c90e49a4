"""A target that a function of the metrics gives at the start of each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import ConfigurationError
from tests.helpers.command import run
from tests.helpers.modules import OneLayer
from tests.helpers.training import MODES, SaveAt, assert_same_weights, gloo, quiet_trainer, weights

RATES = (0.75, 0.5, 0.25)


class Learner(OneLayer):
    """Logs a metric that is another one after each validation, and writes down what the selection aimed at."""

    def __init__(self, score: float = 0.0) -> None:
        super().__init__()
        self.score, self.held = score, []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", torch.tensor(self.score + self.current_epoch / 4))

    def on_train_batch_end(self, *_: Any) -> None:
        selection: Any = self.trainer.callbacks[0]
        self.held.append((self.current_epoch, selection.session.selector.target))


def data(samples: int = 128, **options: Any) -> DataLoader:
    torch.manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(samples, 6), torch.randint(0, 3, (samples,))), batch_size=32, **options)


def by_score(epoch: int, metrics: Any) -> float:
    """3/4, and from the first validation on a quarter less with each."""
    return 0.75 if "val_score" not in metrics else 0.5 - float(metrics["val_score"])


def train(target: Any = by_score, *others: Any, ckpt_path: Any = None, score: float = 0.0, **options: Any) -> Any:
    limits = {name: options.pop(name) for name in list(options) if name in ("max_epochs", "devices", "strategy")}
    callback = SparseSelectionCallback(
        **{"target_activation_rate": target, "gate": "topk", "count_flops": False, **options}
    )
    module = Learner(score)
    callbacks = [callback, TwoStageScheduler(warmup_epochs=0), *others]
    trainer = quiet_trainer(callbacks=callbacks, num_sanity_val_steps=0, **{"max_epochs": 3, **limits})
    trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    return module, callback, trainer


@pytest.mark.parametrize("mode", MODES)
def test_each_epoch_has_the_target_that_the_metrics_ask_for(mode: Any) -> None:
    module, callback, _ = train(mode=mode)
    held = dict(module.held)
    assert held == dict(enumerate(RATES))
    assert callback.ledger.stages["sparse"].selected == sum(round(128 * rate) for rate in RATES)


def test_the_target_is_logged(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    callback = SparseSelectionCallback(target_coverage=lambda epoch, metrics: 0.9 - epoch / 10, count_flops=False)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2, logger=logger, log_every_n_steps=1)
    trainer.fit(OneLayer(), data())
    names, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = names.index("ast/target_coverage")
    assert {round(float(row[column]), 3) for row in rows if row[column]} == {0.9, 0.8}


@pytest.mark.parametrize("mode", ["partial", "prune"])
@pytest.mark.parametrize("point", [("batch end", 1, 1), ("epoch end", 1, None), ("validation end", 1, 3)], ids=str)
def test_a_resumed_run_holds_the_same_targets(tmp_path: Path, mode: Any, point: Any) -> None:
    path = tmp_path / "run.ckpt"
    straight, _, _ = train(by_score, SaveAt(path, *point), mode=mode)
    saved = torch.load(path, weights_only=True)
    done = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    again, _, _ = train(by_score, ckpt_path=path, mode=mode)
    assert again.held == straight.held[done:]
    if mode == "prune" or point[0] == "epoch end":  # else the plain loader begins its epoch anew
        assert_same_weights(weights(straight), weights(again))


def test_it_is_asked_once_an_epoch_and_not_again_in_the_middle(tmp_path: Path) -> None:
    asked: list[int] = []

    def count(epoch: int, metrics: Any) -> float:
        asked.append(epoch)
        return 0.5

    path = tmp_path / "run.ckpt"
    train(count, SaveAt(path, "batch end", 1, 1), mode="prune")
    assert asked == [0, 1, 2]
    train(count, ckpt_path=path, mode="prune")
    assert asked == [0, 1, 2, 2]


@pytest.mark.parametrize("value", [0.0, 1.5, float("nan"), True, "half", torch.ones(2), None], ids=repr)
def test_what_is_out_of_range_is_refused_with_the_value(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"a number in \(0, 1\], the activation rate of epoch 0, got") as error:
        train(lambda epoch, metrics: value)
    assert repr(value) in str(error.value)


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"start of epoch 0 .* metric 'val_acc', .* none"):
        train(lambda epoch, metrics: metrics["val_acc"])


def test_a_mistake_of_the_functions_own_is_told_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        train(lambda epoch, metrics: {}["mine"] if metrics.setdefault("mine", 1) else 0.5)


def test_faults_of_the_setting() -> None:
    with pytest.raises(ConfigurationError, match="two arguments"):
        train(lambda epoch: 0.5)
    with pytest.raises(ConfigurationError, match="a function for the rate"):
        train(mode="prune", prune_steps="replan")
    with pytest.raises(ConfigurationError, match="got both"):
        train(target_coverage=by_score)


class Spread(pl.Callback):
    """Keeps what each rank aimed at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        torch.save(module.held, self.folder / f"{trainer.global_rank}.pt")


class RankScore(Learner):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", torch.tensor((self.current_epoch + self.global_rank / 2) / 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["partial", "prune"])
def test_two_processes_hold_the_target_of_the_first(tmp_path: Path, mode: Any) -> None:
    callback = SparseSelectionCallback(target_activation_rate=by_score, mode=mode, gate="topk", count_flops=False)
    callbacks = [callback, TwoStageScheduler(warmup_epochs=0), Spread(tmp_path)]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=3, devices=2, strategy=gloo(), num_sanity_val_steps=0)
    trainer.fit(RankScore(), data(), data())
    held = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert held[0] == held[1]
    assert dict(held[0]) == dict(enumerate(RATES))


class Falling:
    """A rate for a configuration: less with each epoch."""

    def __init__(self, first: float = 0.5) -> None:
        self.first = first

    def __call__(self, epoch: int, metrics: dict[str, Tensor]) -> float:
        return self.first / (epoch + 1)


CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  limit_train_batches: 2
  limit_val_batches: 0
  log_every_n_steps: 1
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs, name: ""}}
  callbacks:
    - class_path: SparseSelectionCallback
      init_args:
        target_activation_rate: {class_path: tests.selection.test_moving_target.Falling, init_args: {first: 0.8}}
model: {class_path: lightning_ast.demo.ResNet9, init_args: {in_channels: 1, width: 4}}
data: {class_path: lightning_ast.demo.ImageData, init_args: {data: digits, batch_size: 64}}
"""


def test_a_function_by_its_class_path(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    done = run("fit", "--config", "config.yaml", cwd=tmp_path)
    assert done.status == 0, done.err
    metrics = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("ast/target_activation_rate")
    assert {round(float(line.split(",")[column]), 3) for line in metrics[1:] if line.split(",")[column]} == {0.8, 0.4}
    assert "first: 0.8" in (tmp_path / "logs" / "version_0" / "config.yaml").read_text()
