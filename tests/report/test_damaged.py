"""Logs that others wrote: whatever stands in a folder, the rest is read, and one line names what was left out."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lightning_ast.cli import main
from lightning_ast.report.runs import Logs, read_logs

EVENTS = "events.out.tfevents.1.host"
CONFIG = "trainer: {{callbacks: [{{class_path: lightning_ast.SparseSelectionCallback, init_args: {}}}]}}\n"

_LONG_SECONDS = 180  # on a busy machine a test of one second takes twenty


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A file that never ends must fail the test, not stop the suite."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"reading took more than {_LONG_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_LONG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a good run and an empty folder ``other``."""
    (tmp_path / "logs" / "good").mkdir(parents=True)
    (tmp_path / "logs" / "good" / "metrics.csv").write_text("epoch,step,val_acc\n0,1,0.5\n")
    (tmp_path / "logs" / "other").mkdir()
    return tmp_path / "logs"


def record(message: bytes) -> bytes:
    length = struct.pack("<Q", len(message))
    return b"".join(
        [length, struct.pack("<I", masked_crc32c(length)), message, struct.pack("<I", masked_crc32c(message))]
    )


def event(step: int = 1, wall_time: float = 1e9, **value: Any) -> bytes:
    values = [Summary.Value(tag="val_acc", **value)] if value else []
    return record(event_pb2.Event(wall_time=wall_time, step=step, summary=Summary(value=values)).SerializeToString())


GOOD = event() + event(7, simple_value=0.75)


def link(target: str) -> Any:
    return lambda path: path.symlink_to(target)


KINDS = {
    "pipe": os.mkfifo,
    "endless device": link("/dev/zero"),
    "terminal": link("/dev/tty"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": link("/nowhere/at/all"),
}


@pytest.mark.parametrize("name", ["metrics.csv", EVENTS, "config.yaml"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_or_never_ends_is_named_and_not_read(folder: Path, name: str, kind: str) -> None:
    path = folder / "other" / name
    KINDS[kind](path)
    if name == "config.yaml":
        (folder / "other" / "metrics.csv").write_text("step,val_acc\n1,0.25\n")
    runs, lines = read_logs([folder])
    assert [run.name for run in runs] == (["good", "other"] if name == "config.yaml" else ["good"])
    (line,) = lines
    assert line.startswith(f"{path}: ")


def read(folder: Path, name: str, content: bytes) -> Logs:
    (folder / "other" / name).write_bytes(content)
    return read_logs([folder])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + record(b"\xff" * 40), "1 record of it, damaged"),
        (GOOD + record(b"\xff" * 40) * 2 + event(9, simple_value=0.5), "2 records of it"),
        (GOOD + event(9, simple_value=0.5)[:-1], f"what follows byte {len(GOOD)} of"),
        (GOOD + bytes(1000), f"what follows byte {len(GOOD)} of"),
        (GOOD + event(9, simple_value=0.5)[:-20] + b"\0" * 20, "1 record"),
    ],
    ids=["message", "two", "cut", "zeros", "checksum"],
)  # fmt: skip
def test_a_damaged_record_takes_no_other_with_it(folder: Path, content: bytes, words: str) -> None:
    (_, other), (line,) = read(folder, EVENTS, content)
    series = other.scalars["val_acc"]
    assert (series.steps[0], series.values[0]) == (7, 0.75)
    assert series.steps.tolist() == ([7, 9] if words.startswith("2") else [7])
    assert line.startswith(f"{folder / 'other' / EVENTS}: ")
    assert words in line


@pytest.mark.parametrize("epoch", [1e300, -1.0, float("nan"), 1e9, float("inf")])
def test_a_row_of_an_absurd_epoch_is_left_out(folder: Path, epoch: float) -> None:
    (_, other), (line,) = read(folder, "metrics.csv", f"epoch,step,val_acc\n0,7,0.75\n{epoch},9,0.5\n".encode())
    assert other.scalars["val_acc"].values.tolist() == [0.75]
    assert "1 row of it" in line


@pytest.mark.parametrize("content", [b"step,val_acc\n1,%b\n", b"%b,step\n1,2\n"], ids=["row", "header"])
def test_a_file_that_is_no_table_of_metrics_is_named(folder: Path, content: bytes) -> None:
    runs, (line,) = read(folder, "metrics.csv", content % (b"x" * 200_000))
    assert [run.name for run in runs] == ["good"]
    assert line.startswith(f"{folder}/other/metrics.csv: cannot be read as a table")


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (b"0,\0\0\0,0.1\n", 1),
        (bytes(5000) + b"\n", 1),
        (b"0,8,0.1,0.2,0.3\n", 1),
        (b"\xff\xfe\xfa\n", 1),
        (b"epoch,step,val_acc\n", 1),
        (b"\r\n\n", 0),
    ],
    ids=["NUL", "zeros", "too many", "binary", "header", "blank"],
)
def test_a_damaged_row_takes_no_other_with_it(folder: Path, damage: bytes, lost: int) -> None:
    (_, other), lines = read(
        folder, "metrics.csv", b"epoch,step,val_acc\n0,7,0.75\n" + damage + b"0,9,0.5\n1,10,0.25\n"
    )
    assert other.scalars["val_acc"].values.tolist() == [0.75, 0.5, 0.25]
    assert len(lines) == (lost > 0)
    if lost:
        assert lines[0] == f"{folder}/other/metrics.csv: 1 row of it, damaged or without a step"


def test_a_number_that_may_be_cut_off_is_not_read(folder: Path) -> None:
    whole = b"epoch,step,val_acc\r\n0,7,0.75\r\n0,9,1.25e-05\r\n"
    for end in range(len(whole) - 13, len(whole)):
        (_, other), _ = read(folder, "metrics.csv", whole[:end])
        assert set(other.scalars["val_acc"].values) <= {0.75, 1.25e-05}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1"])
def test_a_table_in_another_encoding_is_read_or_named(folder: Path, encoding: str) -> None:
    runs, lines = read(folder, "metrics.csv", "step,val_acc,é\n1,0.5,0.25\n".encode(encoding))
    if encoding.startswith("utf-8") or encoding == "latin-1":
        assert (lines, runs[1].scalars["val_acc"].values.tolist()) == ([], [0.5])
    else:
        assert lines == [f"{folder}/other/metrics.csv: has no column 'step', so CSVLogger did not write it"]


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (CONFIG.format("{mode: prune}"), "prune"),
        (CONFIG.format("{mode: 2001-99-99}"), None),
        (CONFIG.format("{mode: !!int abc}"), None),
        (CONFIG.format("{mode: [subset]}"), None),
        (CONFIG.format("{mode: \x01}"), None),
        (CONFIG.format("{mode: subset, other: !!timestamp 2001-99-99, sum: !!int abc}"), "subset"),
        (CONFIG.format("{mode: *missing}"), None),
        (CONFIG.format("{mode: prune}").replace("SparseSelection", "Other"), None),
        ("# SparseSelectionCallback\n", None),
        ("[SparseSelectionCallback]\n", None),
    ],
    ids=["good", "date", "int", "list", "control", "others", "missing", "foreign", "comment", "no mapping"],
)  # fmt: skip
def test_a_configuration_that_cannot_be_read_costs_the_mode_alone(folder: Path, text: str, mode: str | None) -> None:
    (folder / "other" / "config.yaml").write_text(text)
    (_, other), lines = read(folder, "metrics.csv", b"step,val_acc\n1,0.5\n")
    assert other.mode == mode
    foreign = text.startswith(("#", "[")) or "OtherCallback" in text
    assert [line.split(":")[0] for line in lines] == ([] if mode or foreign else [f"{folder}/other/config.yaml"])


def test_a_link_does_not_lead_out_of_the_folder(folder: Path) -> None:
    (folder / "other" / "up").symlink_to(folder.parent)
    (folder / "other" / "all").symlink_to("/")
    (folder / "other" / "circle").symlink_to("circle")
    (folder.parent / "outside").mkdir()
    shutil.copy(folder / "good" / "metrics.csv", folder.parent / "outside")
    assert [run.name for run in read_logs([folder]).runs] == ["good"]


def test_the_page_is_made_of_what_is_left(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, beside names that are not UTF-8."""
    strange = os.fsdecode(b"caf\xe9\x1b[31m<b>")
    shutil.copytree(folder / "good", folder / strange)
    os.mkfifo(folder / "other" / "metrics.csv")
    (folder / "other" / EVENTS).write_bytes(GOOD + record(b"\xff" * 40))
    (folder / "other" / "config.yaml").write_text(CONFIG.format("{mode: 2001-99-99}"))
    out = tmp_path / os.fsdecode(b"\xff")
    assert main(["report", str(folder), "--out", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert r"caf\xe9\x1b[31m&lt;b&gt;" in page
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/\\xff/report.html\n"
    for name in ("metrics.csv", EVENTS, "config.yaml"):
        assert page.count(f"Left out: {folder}/other/{name}: ") == 1
        assert shown.err.count(f"lightning-ast: left out: {folder}/other/{name}: ") == 1
    assert len(shown.err.splitlines()) == 3
    assert np.all([run.scalars["val_acc"].last == 0.5 for run in read_logs([folder / strange]).runs])
