"""``SparseTrainingMonitor`` beside a Trainer: its lines, its summary, and a training that it does not change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache
from torch.utils.data import DataLoader

from lightning_ast import (
    EnergyMonitor,
    SparseTrainingMonitor,
)
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.monitoring.monitored_run import Net, Numbered, chain


@pytest.mark.parametrize("mode", ["partial", "subset", "prune"])
def test_watching_changes_nothing(digits: Digits, tmp_path: Path, mode: str) -> None:
    ends = []
    for watched in (False, True):
        dataset = Numbered(digits)
        extra = [SparseTrainingMonitor(), EnergyMonitor(meters=[])] if watched else []
        _, callbacks = chain(mode, *extra)
        logger = TensorBoardLogger(str(tmp_path), name=mode) if watched else False
        torch.manual_seed(1)
        trainer = quiet_trainer(max_epochs=4, callbacks=callbacks, logger=logger)
        module = Net()
        given = DataLoader(dataset, batch_size=64, shuffle=True)
        trainer.fit(module, given)
        assert trainer.train_dataloader is given
        ends.append((weights(module), torch.get_rng_state(), type(trainer.fit_loop)))
    assert_same_weights(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1]), "the data set's random numbers are put back"
    assert ends[0][2] is ends[1][2]


def test_an_epoch_without_validation_shows_no_accuracy(digits: Digits, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = quiet_trainer(callbacks=[SparseTrainingMonitor()], max_epochs=4, check_val_every_n_epoch=2)
    trainer.fit(PlainNet(), loader(digits), loader(digits))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert ["Val Acc" in line for line in lines] == [False, True, False, True]


@pytest.mark.parametrize(("name", "found"), [("retrieval_acc", False), ("val_acc", True), ("valid/accuracy", True)])
def test_which_name_is_a_validation_accuracy(
    digits: Digits, capsys: pytest.CaptureFixture[str], name: str, found: bool
) -> None:
    class Named(PlainNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(name, 93.2)

    quiet_trainer(callbacks=[SparseTrainingMonitor()]).fit(Named(), loader(digits), loader(digits))
    assert ("Val Acc: 93.20%" in capsys.readouterr().out) is found


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_the_line_starts_anew_where_the_first_batch_is_skipped(
    digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    class First(pl.Callback):
        def __init__(self) -> None:
            self.lines: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            if outputs:
                self.lines.append(float(outputs["loss"]))

        def on_train_epoch_start(self, *_: Any) -> None:
            self.lines.clear()

    class Missing:
        calls = 0

        def __call__(self, rows: list[Any]) -> Any:
            self.calls += 1
            return None if self.calls == 9 else torch.utils.data.default_collate(rows)

    spy = First()
    trainer = quiet_trainer(callbacks=[SparseTrainingMonitor(), spy], max_epochs=2)
    data = DataLoader(torch.utils.data.TensorDataset(*digits), batch_size=64, collate_fn=Missing())
    trainer.fit(PlainNet(), data)
    line = re.search(r"Epoch 1/1 \| Loss: (\S+)", capsys.readouterr().out)
    assert len(spy.lines) == 7
    assert float(line[1]) == pytest.approx(np.mean(spy.lines), abs=1e-4)


def test_a_checkpoint_without_the_monitor_or_of_an_older_one(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, callbacks = chain("partial", SaveAt(tmp_path / "mid.ckpt", "batch end", 2, 3))
    quiet_trainer(max_epochs=4, callbacks=callbacks).fit(PlainNet(), loader(digits, batch_size=64))
    checkpoint = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    for older in (False, True):
        if older:
            key = str(SparseTrainingMonitor().state_key)
            checkpoint["callbacks"][key] = {"loss_sum": 3.0, "steps": 4, "before": [1024, 900, 0.0, 0.0]}
            torch.save(checkpoint, tmp_path / "mid.ckpt")
        _, callbacks = chain("partial", SparseTrainingMonitor())
        trainer = quiet_trainer(max_epochs=4, callbacks=callbacks)
        trainer.fit(PlainNet(), loader(digits, batch_size=64), ckpt_path=tmp_path / "mid.ckpt")
        (rate,) = re.findall(r"Epoch 2/3 .* Act: (\S+)%", capsys.readouterr().out)
        assert float(rate) < 40, "of the epoch's rest, and not of the run"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_lines_and_summary_with_each_progress_bar(
    digits: Digits, capfd: pytest.CaptureFixture[str], bar: Any, first: bool
) -> None:
    if bar is RichProgressBar and not RequirementCache("lightning>=2.6"):
        pytest.skip("Lightning's bar of then does not work with the Rich of now")
    selection, callbacks = chain("partial", SparseTrainingMonitor(), EnergyMonitor(meters=[]))
    extra = [] if bar is None else [bar()]
    ordered = [*extra, *callbacks] if first else [*callbacks, *extra]
    trainer = quiet_trainer(max_epochs=4, callbacks=ordered, enable_progress_bar=bar is not None)
    trainer.fit(PlainNet(), loader(digits, batch_size=32), loader(digits, batch_size=512))
    out = capfd.readouterr().out
    lines = re.findall(r"Epoch (\d)/3 \| Loss: .* \| Val Acc: .* \| Act: .* \| FLOPs saved: \S+(.*)", out)
    assert [number for number, _ in lines] == ["0", "1", "2", "3"]
    assert [bool(re.match(r" \| ETA: \d+\.\ds", rest)) for _, rest in lines] == [True, True, True, False]
    samples, flops = (f"{selection.savings[name]:.1%}" for name in ("samples", "flops"))
    assert re.search(
        rf"saved        FLOPs {flops} \| seconds -?\d+\.\d% \| joules not known.*\n  skipped      samples {samples}\n",
        out,
    )
    assert f"(mode='partial' at best: FLOPs {flops})" in out
    assert re.search(r"lightning-ast: 4 epochs in \d+\.\ds \| Val Acc: \S+%, best \S+% in epoch \d", out)
    assert re.search(r"activation   \S+% of all samples, \S+% in the sparse stage \(target 30.0%\)", out)
    assert re.search(
        r"time         loading \d+% \| scoring \d+% \| forward backward \d+% \| .* \| monitoring \S+%", out
    )
