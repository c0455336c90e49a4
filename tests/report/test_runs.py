"""Reading logs: the numbers that Lightning's loggers wrote, from either of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_ast.errors import MissingPackageError, ReportError
from lightning_ast.report import Run, read_runs
from lightning_ast.report.runs import read_logs
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


def test_the_values_are_those_that_were_logged(logs: Path) -> None:
    run = by_name(logs / "tb")["partial"]
    # 4 x 10 batches: every second one is logged, and where a stage begins
    assert run.scalars["epoch"].steps[[0, -1]].tolist() == [0, 39]
    assert run.scalars["energy/loading_seconds"].values.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert run.scalars["energy/loading_seconds"].steps.tolist() == [9, 19, 29, 39]
    assert run.scalars["energy/epoch_seconds"].values.tolist() == [sum(PARTS.values()) * (e + 1) for e in range(EPOCHS)]
    assert set(run.scalars["ast/stage"].values[run.scalars["ast/stage"].steps < 10]) == {0.0}


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


def test_what_add_scalars_writes_beside_a_run_is_no_run(tmp_path: Path) -> None:
    for folder, accuracy in ((tmp_path / "run", 0.5), (tmp_path / "run" / "nested", 0.7)):
        writer = SummaryWriter(folder)
        writer.add_scalar("epoch", 0, 1)
        writer.add_scalar("val_acc", accuracy, 1)
        if folder.name == "run":
            writer.add_scalars("loss", {"train": 0.2, "val": 0.3}, 1)
        writer.close()
    runs, (line,) = read_logs([tmp_path])
    assert [(run.name, run.scalars["val_acc"].last) for run in runs] == [
        ("run", 0.5),
        ("run/nested", pytest.approx(0.7)),
    ]
    assert all(part in line for part in ("loss_train", "loss_val", "add_scalars"))
    alone = read_logs([tmp_path / "run" / "loss_val"])  # asked for, it is shown
    assert ([run.name for run in alone[0]], alone[1]) == (["loss_val"], [])


def test_a_log_that_cannot_be_read_is_left_out_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good", "locked", "gone", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,val_acc\n1,0.5\n")
    (tmp_path / "data" / "metrics.csv").write_text("name,score\na,1\n")
    (tmp_path / "gone" / "metrics.csv").unlink()
    (tmp_path / "gone" / "metrics.csv").symlink_to(tmp_path / "not-fetched")
    whole = Path.open

    def locked(path: Path, *args: Any, **options: Any) -> Any:
        if "locked" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *args, **options)

    monkeypatch.setattr(Path, "open", locked)
    (run,), left_out = read_logs([tmp_path])
    assert run.name == "good"
    assert left_out == [
        f"{tmp_path}/data/metrics.csv: cannot be read (it has no column 'step', so CSVLogger did not write it)",
        f"{tmp_path}/gone/metrics.csv: cannot be read (No such file or directory)",
        f"{tmp_path}/locked/metrics.csv: cannot be read (Permission denied)",
    ]
    with pytest.warns(UserWarning, match=r"Left out of the runs: .*metrics\.csv") as warned:
        assert len(read_runs([tmp_path])) == 1
    assert len(warned) == 3


def test_runs_whose_files_link_into_one_store_stay_apart(logs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store" / "cas"
    store.mkdir(parents=True)
    for name in ("dense", "partial"):
        (path,) = (logs / "tb" / name).rglob("events.*")
        shutil.copy(path, store / f"{path.name}.{name}")
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / path.name).symlink_to(store / f"{path.name}.{name}")
    shutil.copy(logs / "csv" / "partial" / "version_0" / "metrics.csv", store / "abc")
    (tmp_path / "logs" / "table").mkdir()
    (tmp_path / "logs" / "table" / "metrics.csv").symlink_to(store / "abc")
    runs = by_name(tmp_path / "logs")
    assert list(runs) == ["dense", "partial", "table"]
    for name, original in (("dense", "tb/dense"), ("partial", "tb/partial"), ("table", "csv/partial")):
        (whole,) = read_runs([logs / original])
        assert runs[name].scalars["val_acc"].values.tolist() == whole.scalars["val_acc"].values.tolist()


def test_a_file_that_was_cut_off_is_read_up_to_there(logs: Path, tmp_path: Path) -> None:
    shutil.copytree(logs / "tb" / "dense", tmp_path / "cut")
    (path,) = (tmp_path / "cut").rglob("events.*")
    path.write_bytes(path.read_bytes()[:-1000])
    (whole,) = read_runs([logs / "tb" / "dense"])
    with pytest.warns(UserWarning, match=r"events\.out.*: the rest of it, cut off or damaged"):
        (cut,) = read_runs([tmp_path / "cut"])
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
    assert run.scalars["epoch"].last == 3, "TensorBoard's values win"


def test_nan_empty_and_cut_off_cells_break_nothing(tmp_path: Path) -> None:
    table = "epoch,step,train_loss,note\n0,1,nan,\n0,2,0.5,words\n0,3,inf,\n1,4,,\n1,5,0.25\n1,6,0.2"
    (tmp_path / "metrics.csv").write_text(table)
    (run,) = read_runs([tmp_path])  # of the last row nobody knows how much is missing
    assert run.scalars["train_loss"].steps.tolist() == [1, 2, 3, 5]
    np.testing.assert_array_equal(run.scalars["train_loss"].values, [np.nan, 0.5, np.inf, 0.25])
    assert run.scalars["train_loss"].last == 0.25
    assert "note" not in run.scalars
    assert run.series("note") is None


def test_errors_say_what_to_do(tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match=r"no logs in or below .*events\.out\.tfevents.*metrics\.csv.*save_dir"):
        read_runs([tmp_path])
    with pytest.raises(ReportError, match="nowhere is not there"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match="at least one folder"):
        read_runs([])
    other = tmp_path / "metrics.csv"
    other.write_text("name,score\na,1\n")
    with pytest.raises(ReportError, match=r"no log can be read: .*metrics\.csv: .*has no column 'step'"):
        read_runs([tmp_path])
    with pytest.raises(ReportError, match="is a file"):
        read_runs([other])
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(MissingPackageError, match=r"tensorboard is missing: pip install 'lightning-ast\[report\]'"):
        read_runs([logs / "tb"])
    assert len(read_runs([logs / "csv"])) == 3  # needs no TensorBoard
