"""Its words and numbers: the library's own, Lightning's numbering, and no chart or plural of nothing."""

from __future__ import annotations

import ast
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from matplotlib.figure import Figure

import lightning_ast.report
from lightning_ast.cli import main
from lightning_ast.report import Run, write_report
from lightning_ast.report.comparison import comparison
from lightning_ast.report.costs import costs
from lightning_ast.report.dashboard import dashboard
from lightning_ast.report.style import GREY
from lightning_ast.words import readable
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer
from tests.report.conftest import long_run, made


def without(run: Run, *words: str) -> Run:
    return replace(run, scalars={tag: s for tag, s in run.scalars.items() if not any(word in tag for word in words)})


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def grey(figure: Figure) -> str:
    return " ".join(
        t.get_text().replace("\n", " ") for axes in figure.axes for t in axes.texts if t.get_color() == GREY
    )


def test_it_needs_neither_torch_nor_lightning() -> None:
    """They take seconds to import, which is more than a report of a run takes."""
    for path in Path(lightning_ast.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "lightning"), path
                light = ("errors", "extras", "mode_facts", "schedule", "words")
                is_light = name == "lightning_ast" or name.removeprefix("lightning_ast.") in light
                assert is_light or not re.match(r"lightning_ast(?!\.report)", name), path


def test_epochs_are_numbered_as_in_lightnings_progress_bar() -> None:
    shown: list[str] = []

    class Bar(TQDMProgressBar):
        def on_train_epoch_start(self, trainer, *_: object) -> None:  # type: ignore[no-untyped-def]
            super().on_train_epoch_start(trainer)
            shown.append(self.train_progress_bar.desc)

    trainer = quiet_trainer(max_epochs=2, callbacks=[Bar()], enable_progress_bar=True)
    from torch import ones, tensor
    from torch.utils.data import DataLoader, TensorDataset

    trainer.fit(PlainNet(batchnorm=False), DataLoader(TensorDataset(ones(2, 1, 8, 8), tensor([0, 1]))))
    axes = dashboard(long_run(len(shown), 3)).axes[0]
    labels = [axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks() if 0 <= tick < len(shown)]
    assert [f"Epoch {label}" for label in labels] == [re.sub(r":? *$", "", text) for text in shown]


@pytest.mark.parametrize("joules", [None, 0.0, float("nan")])
def test_no_chart_of_joules_is_drawn_where_there_are_none(joules: float | None) -> None:
    run = without(long_run(3, 4), "joules")
    if joules is not None:
        run = replace(
            run, scalars={**run.scalars, "energy/gpu_joules": made({"a": [(3, joules), (7, joules)]}).scalars["a"]}
        )
    assert titles(costs(run)) == ["Seconds of an epoch"]
    assert "joules not measured: EnergyMonitor found no counter" in grey(costs(run))
    assert titles(comparison([run, run])) == [
        "Accuracy by epoch",
        "Accuracy by training seconds",
        "Training loss by epoch",
    ]


def test_joules_alone_are_drawn_alone() -> None:
    run = made({"epoch": [(0, 0), (1, 1)], "energy/gpu_joules": [(0, 2.0), (1, 3.0)]})
    assert titles(costs(run)) == ["Joules of an epoch"]
    assert costs(made({"energy/other_seconds": [(0, 0.0)], "energy/gpu_joules": [(0, 0.0)]})) is None


def test_epochs_that_are_missing_between_two_leave_a_gap_and_take_no_memory() -> None:
    run = made({"epoch": [(0, 0), (1, 9_999_999)], "energy/other_seconds": [(0, 2.0), (1, 3.0)]})
    (bars,) = costs(run).axes[0].patches
    assert bars.get_data().values.tolist() == [2.0, 0.0, 3.0]
    assert bars.get_data().edges.tolist() == [-0.5, 0.5, 9_999_998.5, 9_999_999.5]


def test_skipped_samples_are_not_called_savings() -> None:
    (legend,) = [
        axes.get_legend() for axes in dashboard(long_run(3, 4)).axes if axes.get_title(loc="left").startswith("Savings")
    ]
    assert [text.get_text() for text in legend.get_texts()] == [
        "skipped 60%",
        "FLOPs 40%",
        "seconds -10%",
        "joules 20%",
    ]


def test_a_loss_of_validations_is_not_called_the_training_loss() -> None:
    run = made({"epoch": [(0, 0), (1, 1)], "val_loss": [(0, 2.0), (1, 1.0)], "val_acc": [(1, 0.5)]})
    assert "not logged: self.log" in grey(dashboard(run))
    assert "no run logged a training loss" in grey(comparison([run, run]))


def test_names_of_any_bytes_can_be_shown() -> None:
    assert readable("a\tb\x1b[0m\ud800") == r"a\x09b\x1b[0m?"


def test_many_runs_show_how_far_it_is_and_few_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        (tmp_path / "logs" / f"run{number}").mkdir(parents=True)
        (tmp_path / "logs" / f"run{number}" / "metrics.csv").write_text("step,note\n1,text\n")  # nothing to draw
    assert main(["report", str(tmp_path / "logs"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert "12/12" in shown
    assert "Drawing" in shown
    assert main(["report", str(tmp_path / "logs" / "run1"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    write_report([tmp_path / "logs"], tmp_path / "out")
    assert stream.getvalue() == "", "a function shows nothing that was not asked for"
