"""What a person reads in the terminal: epochs counted once, savings named by what was saved, nothing that is not so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache
from matplotlib.axes import Axes

from lightning_ast import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.monitoring.text import RunSummary, format_epoch, format_summary
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import SaveAt, quiet_trainer


def chain(*extra: pl.Callback, **settings: Any) -> list[pl.Callback]:
    """A selection with a warmup epoch, and what shows it."""
    return [SparseSelectionCallback(**settings), TwoStageScheduler(warmup_epochs=1), SparseTrainingMonitor(), *extra]


def data(digits: Digits, samples: int = 512) -> Any:
    return loader((digits[0][:samples], digits[1][:samples]), batch_size=64)


# ---------------------------------------------------------------------- one numbering of epochs


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_line_has_the_number_of_lightnings_bar(digits: Digits, capfd: pytest.CaptureFixture[str], bar: Any) -> None:
    if bar is RichProgressBar and not RequirementCache("lightning>=2.6"):
        pytest.skip("Lightning's bar of then does not work with the Rich of now")
    trainer = quiet_trainer(max_epochs=3, callbacks=chain(bar()), enable_progress_bar=True)
    trainer.fit(PlainNet(), data(digits, 128))
    out = "".join(capfd.readouterr())
    ours = [f"Epoch {epoch}/2" for epoch in range(3)]
    assert [line in out for line in (f"{number} | Loss" for number in ours)] == [True] * 3
    theirs = re.findall(r"Epoch (\d)(?:/(\d))?[^|\d]*(?:\d|━)", out)
    assert {number for number, _ in theirs} == {"0", "1", "2"}
    assert {last for _, last in theirs if last} <= {"2"}


def test_every_message_of_a_run_counts_from_zero(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines, mid = [], tmp_path / "mid.ckpt"
    for path in (None, mid):
        torch.manual_seed(0)
        callbacks = chain(*([] if path else [SaveAt(mid, "batch end", 2, 0)]), mode="prune", gate="soft")
        quiet_trainer(max_epochs=4, callbacks=callbacks).fit(
            PlainNet(dropout=0.0), data(digits), data(digits, 64), ckpt_path=path
        )
        out = capsys.readouterr().out
        lines.append(re.findall(r"Epoch (\d)/3 ", out))
        best = int(re.search(r"best \S+% in epoch (\d)", out)[1])
        accuracies = dict(re.findall(r"Epoch (\d)/3 .*?Val Acc: (\S+)%", out))
        if path is None:
            assert float(accuracies[str(best)]) == max(map(float, accuracies.values()))
    assert lines == [["0", "1", "2", "3"], ["2", "3"]]
    assert "resuming epoch 2 behind batch 1," in caplog.text


def test_heatmaps_count_from_zero(digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[list[str]] = []
    set_xticks = Axes.set_xticks

    def spy(axes: Axes, ticks: Any, *labels: Any) -> Any:
        columns.extend(labels)
        return set_xticks(axes, ticks, *labels)

    monkeypatch.setattr(Axes, "set_xticks", spy)
    logger = TensorBoardLogger(tmp_path, name="")
    quiet_trainer(max_epochs=2, callbacks=chain(), logger=logger).fit(PlainNet(), data(digits, 128))
    assert columns
    assert all(epochs == ["1"] for epochs in columns), "the sparse one, after the warmup"


# ---------------------------------------------------------------------- savings by what was saved


def test_samples_are_called_skipped_in_the_line() -> None:
    line = format_epoch(0, 4, loss=None, accuracy=None, activation_rate=0.4, flops_savings=0.2)
    assert line == "Epoch 0/3 | Act: 40.0% | Skipped: 60.0% | FLOPs saved: 20.0%"


# ---------------------------------------------------------------------- what is left out


def closing(digits: Digits, capsys: pytest.CaptureFixture[str], callbacks: list[pl.Callback]) -> dict[str, str]:
    """The rows of the closing summary by name."""
    quiet_trainer(max_epochs=2, callbacks=callbacks).fit(PlainNet(), data(digits, 256))
    text = capsys.readouterr().out
    return dict(re.findall(r"^  (\w+) +(.*)$", text[text.index("lightning-ast:") :], re.M))


def test_joules_are_left_out_where_nobody_asked_for_them(digits: Digits, capsys: pytest.CaptureFixture[str]) -> None:
    assert "joules" not in closing(digits, capsys, chain())["saved"]
    assert closing(digits, capsys, chain(EnergyMonitor(meters=[])))["saved"].count("joules not known") == 1


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_dense_run_has_no_sparse_stage(digits: Digits, capsys: pytest.CaptureFixture[str], warmup: int) -> None:
    dense = [SparseSelectionCallback(target_activation_rate=1.0), SparseTrainingMonitor()]
    dense += [TwoStageScheduler(warmup_epochs=warmup)] * warmup
    rows = closing(digits, capsys, dense)
    assert rows["activation"] == "100.0% of all samples"
    assert "at best" not in rows["saved"]
    sparse = closing(digits, capsys, chain())
    assert re.fullmatch(r"\S+% of all samples, \S+% in the sparse stage \(target 40.0%\)", sparse["activation"])
    assert "at best" in sparse["saved"]


def test_one_of_a_thing_is_singular() -> None:
    text = format_summary(RunSummary(1, 8.0, quarantined=1))
    assert text.startswith("lightning-ast: 1 epoch in 8.0s\n")
    assert text.endswith("1 sample that is not finite")
    assert "2 samples that are not finite" in format_summary(RunSummary(1, 8.0, quarantined=2))
