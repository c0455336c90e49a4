"""What a person sees: scalars in TensorBoard and CSV, the progress bar, the line of an epoch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_ast import SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.core.ledger import Ledger
from lightning_ast.monitoring.text import format_epoch
from lightning_ast.selection.accounting import StepClock
from tests.helpers.data import Digits, loader
from tests.helpers.logs import scalars, table
from tests.helpers.modules import PlainNet
from tests.helpers.training import SaveAt, quiet_trainer

ALWAYS = {
    "ast/activation_rate",
    "ast/coverage",
    "ast/target_activation_rate",
    "ast/stage",
    "ast/savings_samples",
    "ast/savings_flops",
}


def run(
    digits: Digits, logger: Any, *extra: pl.Callback, **options: Any
) -> tuple[SparseSelectionCallback, list[float], list[float | None]]:
    selection = SparseSelectionCallback(target_activation_rate=0.3)
    rates: list[float] = []
    thresholds: list[float | None] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(selection.activation_rate)
            thresholds.append(selection.threshold)

    trainer = quiet_trainer(
        **{"max_epochs": 3, "logger": logger, "log_every_n_steps": 1, **options},
        callbacks=[selection, TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1), Spy(), *extra],
    )
    trainer.fit(PlainNet(), loader(digits, batch_size=32), loader(digits, batch_size=256))
    return selection, rates, thresholds


def test_tensorboard_event_file_read_back(digits: Digits, tmp_path: Path) -> None:
    selection, rates, thresholds = run(digits, TensorBoardLogger(str(tmp_path), name=""))
    series = {tag: points for tag, points in scalars(tmp_path / "version_0").items() if tag.startswith("ast/")}
    assert set(series) == ALWAYS | {"ast/threshold", "ast/activation_rate_ema", "ast/savings_seconds"}
    assert [value for _, value in series["ast/activation_rate"]] == pytest.approx(rates)
    assert [step for step, _ in series["ast/activation_rate"]] == list(range(48))
    coverages = [value for _, value in series["ast/coverage"]]
    assert coverages[:16] == coverages[32:] == [1.0] * 16
    assert all(0.3 < value < 0.99 for value in coverages[16:32]), "of the significant samples more than of all"
    assert [value for _, value in series["ast/stage"]] == [0.0] * 16 + [1.0] * 16 + [2.0] * 16
    assert [value for _, value in series["ast/threshold"]] == pytest.approx(thresholds[16:32], rel=1e-5)
    assert series["ast/savings_samples"][-1][1] == pytest.approx(selection.savings["samples"])
    assert series["ast/savings_samples"][-1][1] == pytest.approx(0.7 / 3, abs=0.03)
    assert series["ast/savings_flops"][-1][1] == pytest.approx(selection.savings["flops"])
    assert 0 < series["ast/savings_flops"][-1][1] < series["ast/savings_samples"][-1][1]
    assert series["ast/savings_seconds"][-1][1] <= 1


def test_csv(digits: Digits, tmp_path: Path) -> None:
    _, rates, _ = run(digits, CSVLogger(str(tmp_path), name=""))
    series = table(tmp_path / "version_0")
    assert [value for _, value in series["ast/activation_rate"]] == pytest.approx(rates)
    assert set(series) >= ALWAYS


def test_it_logs_when_the_logger_does(digits: Digits, tmp_path: Path) -> None:
    run(digits, CSVLogger(str(tmp_path), name=""), log_every_n_steps=5)
    steps = [step for step, _ in table(tmp_path / "version_0")["ast/activation_rate"]]
    assert steps == [*range(4, 48, 5), 47], "and where training ended"


def test_no_logger_and_two_loggers(digits: Digits, tmp_path: Path) -> None:
    run(digits, False)
    run(digits, [CSVLogger(str(tmp_path), name="a"), TensorBoardLogger(str(tmp_path), name="b")])
    assert "ast/threshold" in (tmp_path / "a" / "version_0" / "metrics.csv").read_text()


def test_savings_without_a_warmup_have_no_seconds(digits: Digits) -> None:
    selection = SparseSelectionCallback()
    quiet_trainer(callbacks=[selection], max_epochs=2).fit(PlainNet(), loader(digits, batch_size=32))
    assert selection.savings["seconds"] is None
    assert selection.savings["joules"] is None
    assert selection.savings["flops"] is not None


def test_progress_bar_shows_activation_and_savings(digits: Digits) -> None:
    seen: list[dict[str, Any]] = []

    class Bar(ProgressBar):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            seen.append(dict(self.get_metrics(trainer, pl_module)))

        def disable(self) -> None: ...

        def enable(self) -> None: ...

    selection, rates, _ = run(digits, False, Bar(), enable_progress_bar=True)
    assert seen[-1]["act"] == pytest.approx(1.0)
    assert seen[20]["act"] == pytest.approx(rates[20])
    assert seen[-1]["flops_saved"] == pytest.approx(selection.savings["flops"])
    assert all(isinstance(value, (int, float)) for value in seen[-1].values())


LINE = re.compile(
    r"Epoch (\d+)/2 \| Loss: (\d\.\d{4}) \| Val Acc: (\d+\.\d{2})% \| Act: (\d+\.\d)% \| Skipped: (\d+\.\d)% \| FLOPs saved: (-?\d+\.\d)%"
)


def test_one_line_an_epoch(digits: Digits, capsys: pytest.CaptureFixture[str]) -> None:
    selection, rates, _ = run(digits, False, SparseTrainingMonitor())
    lines = LINE.findall(capsys.readouterr().out)
    assert [int(line[0]) for line in lines] == [0, 1, 2]
    act = [float(line[3]) for line in lines]
    assert act[0] == act[2] == 100.0
    assert act[1] == pytest.approx(100 * sum(rates[16:32]) / 16, abs=0.06)
    assert [float(a[3]) + float(a[4]) for a in lines] == pytest.approx([100.0] * 3)
    assert float(lines[0][5]) == 0.0
    assert 0 < float(lines[1][5]) < float(lines[1][4])
    assert float(lines[2][1]) < float(lines[0][1]), "the loss falls"
    assert selection.ledger.offered == 3 * 512


def test_the_line_in_a_plain_dense_run(digits: Digits, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = quiet_trainer(callbacks=[SparseTrainingMonitor(accuracy="val_acc")], accumulate_grad_batches=4)
    trainer.fit(PlainNet(), loader(digits), loader(digits))
    out = capsys.readouterr().out
    match = re.search(r"Epoch 0/0 \| Loss: (\d\.\d{4}) \| Val Acc: .* \| Act: 100.0% \| Skipped: 0.0%\n", out)
    assert match, out
    assert 1.5 < float(match[1]) < 3.5, "the user's own loss, not divided by the accumulation"


def test_format_leaves_out_what_is_unknown() -> None:
    assert (
        format_epoch(3, None, loss=None, accuracy=None, activation_rate=0.25) == "Epoch 3 | Act: 25.0% | Skipped: 75.0%"
    )


def test_the_line_after_a_resume_in_mid_epoch(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_once(path: Path | None = None, save: bool = False) -> str:
        torch.manual_seed(0)
        chain = [SparseSelectionCallback(), TwoStageScheduler(warmup_epochs=0.25), SparseTrainingMonitor()]
        if save:
            chain.append(SaveAt(tmp_path / "mid.ckpt", "batch end", 0, 4))
        quiet_trainer(callbacks=chain).fit(PlainNet(dropout=0.0), loader(digits, batch_size=64), ckpt_path=path)
        return re.findall(r"Epoch 0/0 .*", capsys.readouterr().out)[0]

    whole = run_once(save=True)
    # Lightning starts the dataloader anew: other batches, but the same books
    resumed = run_once(tmp_path / "mid.ckpt")
    act = [re.search(r"Act: (\S+)%", line)[1] for line in (whole, resumed)]
    assert float(act[0]) == pytest.approx(float(act[1]), abs=1.5)
    assert float(act[1]) > 45, "the warmup before the checkpoint counts"


def test_the_clock_leaves_out_validation_and_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock, ledger = StepClock(), Ledger()
    for step in range(8):
        now[0] += 100.0 if step < 4 else 1.0  # start-up is slow
        if step == 6:
            now[0] += 50.0  # validation
            clock.interrupt()
        clock.finish_batch(ledger, "warmup", offered=10)
    assert ledger.stages["warmup"].timed_seconds == 100.0 + 3 * 1.0
    assert ledger.stages["warmup"].timed_offered == 40


def test_the_line_after_a_resume_from_an_epochs_last_batch(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning does not call on_train_epoch_start then: the finished epoch must not be counted into the next."""
    last, lines = tmp_path / "last.ckpt", []
    for path in (None, last):
        torch.manual_seed(0)
        save = SaveAt(last, "batch end", 0, 3)
        chain = [SparseSelectionCallback(), TwoStageScheduler(warmup_epochs=1), SparseTrainingMonitor(), save]
        trainer = quiet_trainer(callbacks=chain, max_epochs=2)
        trainer.fit(PlainNet(dropout=0.0), loader(digits, batch_size=128), ckpt_path=path)
        lines.append(re.findall(r"Epoch 1/1 .*", capsys.readouterr().out)[0])
    assert lines[0] == lines[1]


def test_a_stage_that_is_shorter_than_the_interval_of_the_loggers_is_logged(digits: Digits, tmp_path: Path) -> None:
    run(digits, TensorBoardLogger(str(tmp_path), name=""), log_every_n_steps=40)
    series = scalars(tmp_path / "version_0")
    assert series["ast/stage"] == [(0, 0.0), (16, 1.0), (32, 2.0), (39, 2.0), (47, 2.0)]
    assert [step for step, _ in series["ast/activation_rate"]] == [39, 47]
