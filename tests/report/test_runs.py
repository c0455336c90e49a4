"""Reading logs: the numbers that Lightning's loggers wrote, from either of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_ast.report import ReportError, Run, read_runs
from lightning_ast.report.runs import find_runs, run_names, session_offsets
from tests.report.conftest import EPOCHS, PARTS, train


def by_name(folder: Path) -> dict[str, Run]:
    return {run.name: run for run in read_runs([folder])}


def test_both_kinds_of_log_give_the_same_numbers(logs: Path) -> None:
    events, tables = by_name(logs / "tb"), by_name(logs / "csv")
    assert list(events) == list(tables) == ["dense", "partial", "prune"]
    for name, run in events.items():
        table = tables[name]
        assert (run.source, table.source) == ("TensorBoard", "CSV")
        assert set(run.scalars) - {"hp_metric"} == set(table.scalars)
        for tag, series in table.scalars.items():
            assert series.steps.tolist() == run.scalars[tag].steps.tolist(), tag
            np.testing.assert_allclose(series.values, run.scalars[tag].values, rtol=1e-6, err_msg=tag)
            assert series.clock_seconds is None


def test_the_values_are_those_that_were_logged(logs: Path) -> None:
    run = by_name(logs / "tb")["partial"]
    assert run.scalars["epoch"].steps[[0, -1]].tolist() == [1, 39]  # 4 x 10 batches, every second one is logged
    assert run.scalars["energy/loading_seconds"].values.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert run.scalars["energy/loading_seconds"].steps.tolist() == [10, 20, 30, 40]
    assert run.scalars["energy/epoch_seconds"].values.tolist() == [sum(PARTS.values()) * (e + 1) for e in range(EPOCHS)]
    assert set(run.scalars["ast/stage"].values[run.scalars["ast/stage"].steps < 10]) == {0.0}
    clock = run.scalars["epoch"].clock_seconds
    assert clock is not None
    assert (np.diff(clock) >= 0).all()
    assert 0 < clock[0] < clock[-1] < 60


def test_the_last_histogram_holds_all_its_samples(logs: Path) -> None:
    run = by_name(logs / "tb")["prune"]
    everything, selected = run.histograms["ast/significance"], run.histograms["ast/significance_selected"]
    assert everything.counts.sum() == 101
    assert selected.counts.sum() == 41
    assert everything.edges[[0, -1]].tolist() == [0.0, 4.0]  # of the last epoch, not of the first
    assert selected.edges[0] == pytest.approx(2.4)
    assert len(everything.edges) == len(everything.counts) + 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_that_was_killed_and_resumed_is_one_run_and_the_later_steps_count(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    train(TensorBoardLogger(tmp_path / "logs", name="run", version=0), keep, epochs=3, enable_checkpointing=True)
    folder = tmp_path / "logs" / "run" / "version_0"
    shutil.copytree(folder, tmp_path / "first")
    (first,) = read_runs([tmp_path / "first"])
    again = TensorBoardLogger(tmp_path / "logs", name="run", version=0)
    train(again, keep, epochs=3, enable_checkpointing=True, ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    (second,) = read_runs([tmp_path / "logs"])
    assert len(list(folder.glob("events.*"))) == 2
    steps, loss = second.scalars["train_loss"].steps, second.scalars["train_loss"].values
    assert steps.tolist() == first.scalars["train_loss"].steps.tolist()
    undone = steps >= 10
    assert np.array_equal(loss[~undone], first.scalars["train_loss"].values[~undone])
    assert not np.array_equal(loss[undone], first.scalars["train_loss"].values[undone])  # other samples in each batch
    clock, before = second.scalars["epoch"].clock_seconds, first.scalars["epoch"].clock_seconds
    assert clock is not None
    assert before is not None
    assert (np.diff(clock) > 0).all()
    at = int(np.searchsorted(second.scalars["epoch"].steps, 10))
    assert clock[at - 1] == before[at - 1]  # the undone epochs' seconds are not between the two


def test_breaks_and_undone_steps_are_not_on_the_clock() -> None:
    first = (100.0, [1, 2, 3], [110.0, 120.0, 130.0])
    assert session_offsets([first, (500.0, [3, 4], [505.0, 515.0]), (900.0, [5], [910.0])]) == [0.0, 20.0, 35.0]
    assert session_offsets([first, (500.0, [], [])]) == [0.0, 30.0]  # a test run: nothing is undone
    assert session_offsets([first, (500.0, [0], [501.0])]) == [0.0, 0.0]  # begun anew
    assert session_offsets([]) == []


def test_a_file_that_was_cut_off_is_read_up_to_there(logs: Path, tmp_path: Path) -> None:
    shutil.copytree(logs / "tb" / "dense", tmp_path / "cut")
    (path,) = (tmp_path / "cut").rglob("events.*")
    path.write_bytes(path.read_bytes()[:-1000])
    (whole,), (cut,) = read_runs([logs / "tb" / "dense"]), read_runs([tmp_path / "cut"])
    length = len(cut.scalars["train_loss"])
    assert 0 < length < len(whole.scalars["train_loss"])
    assert np.array_equal(cut.scalars["train_loss"].values, whole.scalars["train_loss"].values[:length])


def test_two_loggers_in_one_folder_are_one_run(logs: Path, tmp_path: Path) -> None:
    shutil.copytree(logs / "tb" / "dense", tmp_path / "both")
    shutil.copy(logs / "csv" / "dense" / "version_0" / "metrics.csv", tmp_path / "both" / "version_0")
    with (tmp_path / "both" / "version_0" / "metrics.csv").open("a") as file:
        file.write("9,99,1,1,1\n")
    (run,) = read_runs([tmp_path])
    assert (run.name, run.source) == ("version_0", "TensorBoard and CSV")
    assert run.scalars["val_acc"].clock_seconds is not None  # TensorBoard's values win
    assert run.scalars["epoch"].last == 3


def test_nan_empty_and_cut_off_cells_break_nothing(tmp_path: Path) -> None:
    table = "epoch,step,train_loss,note\n0,1,nan,\n0,2,0.5,words\n0,3,inf,\n1,4,,\n1,5,0.25\n1,"
    (tmp_path / "metrics.csv").write_text(table)
    (run,) = read_runs([tmp_path])
    assert run.scalars["train_loss"].steps.tolist() == [1, 2, 3, 5]
    np.testing.assert_array_equal(run.scalars["train_loss"].values, [np.nan, 0.5, np.inf, 0.25])
    assert run.scalars["train_loss"].last == 0.25
    assert "note" not in run.scalars
    assert run.series("note") is None


def test_folders_are_found_at_any_depth_and_once(logs: Path) -> None:
    found = find_runs([logs, logs / "tb", str(logs / "tb" / "dense")])
    assert found == sorted(
        (logs / kind / name / "version_0").resolve() for kind in ("tb", "csv") for name in ("dense", "partial", "prune")
    )


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/dense/version_0", "/a/prune/version_0"], ["dense", "prune"]),
        (["/a/dense/version_0", "/a/dense/version_1"], ["version_0", "version_1"]),
        (["/a/x/version_0", "/a/x/version_1", "/a/y/version_0"], ["x/version_0", "x/version_1", "y/version_0"]),
        (["/a/b", "/a/b/c"], ["b", "c"]),
        (["/a/b/1/tb/v", "/a/c/1/tb/v"], ["b", "c"]),
        (["/a"], ["a"]),
    ],
)
def test_names_are_short_and_tell_the_runs_apart(folders: list[str], names: list[str]) -> None:
    assert run_names([Path(folder) for folder in folders]) == names


def test_the_mode_is_read_from_the_configuration_beside_the_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val_acc\n1,0.5\n")
    configuration = tmp_path / "config.yaml"
    for text, mode in (
        ("trainer:\n  callbacks:\n  - class_path: lightning_ast.SparseSelectionCallback\n    init_args: {mode: prune}\n", "prune"),
        ("trainer:\n  callbacks:\n  - class_path: lightning_ast.TwoStageScheduler\n    init_args: {}\n", None),
        ("trainer: {callbacks: null}\n", None),
        ("- someone else's\n", None),
        ("{", None),
    ):  # fmt: skip
        configuration.write_text(text)
        assert read_runs([tmp_path])[0].mode == mode


def test_errors_say_what_to_do(tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match=r"no logs in or below .*events\.out\.tfevents.*metrics\.csv.*save_dir"):
        read_runs([tmp_path])
    with pytest.raises(ReportError, match="nowhere is not there"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match="at least one folder"):
        read_runs([])
    other = tmp_path / "metrics.csv"
    other.write_text("name,score\na,1\n")
    with pytest.raises(ReportError, match=r"metrics\.csv has no column 'step'"):
        read_runs([tmp_path])
    with pytest.raises(ReportError, match="is a file"):
        read_runs([other])
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    with pytest.raises(ReportError, match=r"pip install 'lightning-ast\[report\]'"):
        read_runs([logs / "tb"])
    assert len(read_runs([logs / "csv"])) == 3  # needs no TensorBoard
