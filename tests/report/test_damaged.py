"""Logs that are cut off, damaged or foreign: the rest is read, and one line names what was left out."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lightning_ast.cli import main
from lightning_ast.report import Run
from lightning_ast.report.runs import read_logs

EVENTS = "events.out.tfevents.1.host"
CONFIG = "trainer: {{callbacks: [{{class_path: lightning_ast.SparseSelectionCallback, init_args: {}}}]}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a good run and an empty folder ``other``."""
    (tmp_path / "logs" / "good").mkdir(parents=True)
    (tmp_path / "logs" / "good" / "metrics.csv").write_text("epoch,step,val_acc\n0,1,0.5\n")
    (tmp_path / "logs" / "other").mkdir()
    return tmp_path / "logs"


def event(step: int = 1, wall_time: float = 1e9, **value: Any) -> bytes:
    """A record of an event file: a length, an event, and the checksum of each."""
    values = [Summary.Value(tag="val_acc", **value)] if value else []
    data = event_pb2.Event(wall_time=wall_time, step=step, summary=Summary(value=values)).SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


GOOD = event() + event(7, simple_value=0.75)


def read(folder: Path, name: str, content: bytes) -> tuple[list[Run], list[str]]:
    (folder / "other" / name).write_bytes(content)
    return read_logs([folder])


@pytest.mark.parametrize(
    "rest",
    [event(9, simple_value=0.5)[:-1], bytes(1000), event(9, simple_value=0.5)[:-20] + b"\0" * 20],
    ids=["cut", "zeros", "checksum"],
)
def test_an_event_file_is_read_up_to_what_is_damaged(folder: Path, rest: bytes) -> None:
    (_, other), (line,) = read(folder, EVENTS, GOOD + rest)
    assert (other.scalars["val_acc"].steps.tolist(), other.scalars["val_acc"].values.tolist()) == ([7], [0.75])
    assert line == f"{folder / 'other' / EVENTS}: the rest of it, cut off or damaged"


@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 8], ids=["empty", "garbage"])
def test_an_event_file_without_events_is_named(folder: Path, content: bytes) -> None:
    (good,), (line,) = read(folder, EVENTS, content)
    assert good.name == "good"
    assert line == f"{folder / 'other' / EVENTS}: cannot be read (it holds no event)"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"step,val_acc\n1," + b"x" * 200_000 + b"\n", "field larger"),
        (b"step,val_acc\n1e300,0.5\n", "too large"),
        (b"name,score\na,1\n", "no column 'step', so CSVLogger did not write it"),
    ],
    ids=["field", "step", "foreign"],
)
def test_a_table_that_cannot_be_read_is_named(folder: Path, content: bytes, words: str) -> None:
    (good,), (line,) = read(folder, "metrics.csv", content)
    assert good.name == "good"
    assert line.startswith(f"{folder}/other/metrics.csv: cannot be read (")
    assert words in line


def test_a_row_without_a_step_takes_no_other_with_it(folder: Path) -> None:
    (_, other), (line,) = read(folder, "metrics.csv", b"epoch,step,val_acc\n0,7,0.75\n\xff\xfe\xfa\n0,9,0.5\n")
    assert other.scalars["val_acc"].values.tolist() == [0.75, 0.5]
    assert line == f"{folder}/other/metrics.csv: 1 row of it, without a step"


def test_a_number_that_may_be_cut_off_is_not_read(folder: Path) -> None:
    whole = b"epoch,step,val_acc\r\n0,7,0.75\r\n0,9,1.25e-05\r\n"
    for end in range(len(whole) - 13, len(whole)):
        (_, other), lines = read(folder, "metrics.csv", whole[:end])
        assert (other.scalars["val_acc"].values.tolist(), lines) == ([0.75], [])


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (CONFIG.format("{mode: prune}"), "prune"),
        (CONFIG.format("{mode: subset, other: !!timestamp 2001-99-99, sum: !!int abc}"), "subset"),
        (CONFIG.format("{mode: 2001-99-99}"), None),
        (CONFIG.format("{mode: [subset]}"), None),
        (CONFIG.format("{mode: *missing}"), None),
        (CONFIG.format("{mode: prune}").replace("SparseSelection", "Other"), None),
        ("trainer: {callbacks: null}\n", None),
        ("[someone else's]\n", None),
        ("\x01{", None),
    ],
)
def test_the_mode_is_that_of_a_configuration_that_can_be_read(folder: Path, text: str, mode: str | None) -> None:
    (folder / "other" / "config.yaml").write_text(text)
    (_, other), lines = read(folder, "metrics.csv", b"step,val_acc\n1,0.5\n")
    assert (other.mode, lines) == (mode, [])


def test_the_page_is_made_of_what_is_left(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, beside names that are not UTF-8."""
    strange = os.fsdecode(b"caf\xe9\x1b[31m<b>")
    shutil.copytree(folder / "good", folder / strange)
    (folder / "other" / "metrics.csv").write_text("name,score\na,1\n")
    (folder / "other" / EVENTS).write_bytes(GOOD + b"\xff" * 40)
    out = tmp_path / os.fsdecode(b"\xff")
    assert main(["report", str(folder), "--out", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert r"caf\xe9\x1b[31m&lt;b&gt;" in page
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/\\xff/report.html\n"
    for name in ("metrics.csv", EVENTS):
        assert page.count(f"Left out: {folder}/other/{name}: ") == 1
        assert shown.err.count(f"lightning-ast: left out: {folder}/other/{name}: ") == 1
    assert len(shown.err.splitlines()) == 2
