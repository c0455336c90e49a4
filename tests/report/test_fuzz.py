"""Mutations of real logs: nothing but true values is read from them, nothing fails, nothing takes long."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from lightning_ast.errors import ReportError
from lightning_ast.report import Run
from lightning_ast.report.runs import read_logs

SPECIAL = [b"\0", b"\xff", b'"', b"\n", b",", b"-", b"1e300", b"nan", b"\x7f" * 9]


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Cut off, overwritten, put in, taken out, doubled or moved, a few times."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 1, 4, 16, 200])
        kind = rng.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            data[at:at] = rng.choice(SPECIAL) * rng.choice([1, 1, 500])
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = bytes(length)
    return bytes(data)


def points(run: Run) -> set[tuple[str, int, float]]:
    return {
        (tag, step, value)
        for tag, series in run.scalars.items()
        for step, value in zip(series.steps.tolist(), series.values.tolist())
    }


def damaged(folder: Path, name: str, rounds: int, check: Callable[[Run], None]) -> int:
    """Read a folder with one of its files mutated; count the rounds in which something was left out."""
    (path,) = folder.glob(name)
    whole = path.read_bytes()
    left_out = 0
    for seed in range(rounds):
        path.write_bytes(mutated(random.Random(seed), whole))
        start = time.perf_counter()
        try:
            runs, lines = read_logs([folder])
        except ReportError as error:  # the only log there is
            runs, lines = [], [str(error)]
        assert time.perf_counter() - start < 5, seed
        assert len(lines) <= 1, (seed, lines)
        assert all(str(path) in line for line in lines), (seed, lines)
        for run in runs:
            check(run)
        left_out += bool(lines)
    return left_out


def test_a_mutated_event_file(logs: Path, tmp_path: Path) -> None:
    """Its checksums tell what is damaged: no value is read that was not logged."""
    shutil.copytree(logs / "tb" / "partial" / "version_0", tmp_path / "run", ignore=shutil.ignore_patterns("*.yaml"))
    (whole,) = read_logs([tmp_path]).runs
    true = points(whole)

    def check(run: Run) -> None:
        assert points(run) <= true
        for tag, histogram in run.histograms.items():
            assert histogram.counts.sum() <= whole.histograms[tag].counts.sum()

    assert damaged(tmp_path / "run", "events.*", 150, check) > 100


def test_a_mutated_table(logs: Path, tmp_path: Path) -> None:
    shutil.copytree(logs / "csv" / "partial" / "version_0", tmp_path / "run")

    def check(run: Run) -> None:
        for series in run.scalars.values():
            assert (series.steps >= 0).all()
            assert len(series.steps) == len(set(series.steps.tolist()))

    assert damaged(tmp_path / "run", "metrics.csv", 150, check) > 75


def test_a_table_that_is_cut_off_holds_no_value_that_was_not_logged(logs: Path, tmp_path: Path) -> None:
    shutil.copytree(logs / "csv" / "partial" / "version_0", tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    whole, true = path.read_bytes(), points(read_logs([tmp_path]).runs[0])
    header = whole.index(b"\n") + 1
    for end in range(header, len(whole), 41):
        path.write_bytes(whole[:end])
        assert points(read_logs([tmp_path]).runs[0]) <= true
        path.write_bytes(whole[:end] + bytes(512))
        assert points(read_logs([tmp_path]).runs[0]) <= true
