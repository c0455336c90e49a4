"""Read the ``metrics.csv`` that Lightning's CSVLogger writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from lightning_ast.report.files import UnreadableError, reading
from lightning_ast.report.series import Series, is_point
from lightning_ast.words import counted

__all__ = ["read_table"]

_MOST_BYTES = 2**28
# Rows that cannot be taken apart before the rest is given up: a row without an end makes the reader look far ahead.
_MOST_BROKEN = 100


def read_table(path: Path) -> tuple[dict[str, Series], str | None]:
    """Return the columns of a table of metrics by tag; and what was left out as damaged, or None."""
    with reading(path, most_bytes=_MOST_BYTES) as (file, size):
        text = file.read(size).decode("utf-8-sig", "replace")
    lines = io.StringIO(text, newline="").readlines()
    if lines and "\0" in lines[0]:
        raise UnreadableError("is not text in UTF-8")
    # a crash leaves NUL bytes, or a last line without its end, whose last number may be cut off
    whole = [line for line in lines if "\0" not in line and line.endswith(("\n", "\r"))]
    with _cells_of(max(map(len, whole), default=0)):
        header, *rows = list(_rows(whole)) or [None]
    if header is None and not lines:
        return {}, None  # a run that logged nothing
    if header is None or "step" not in header:
        raise UnreadableError("has no column 'step', so CSVLogger did not write it")
    columns, lost = _columns(header, rows)
    lost += len(lines) - len(whole)
    return columns, f"{counted(lost, 'row')} of it, damaged or without a step" if lost else None


@contextmanager
def _cells_of(most_characters: int) -> Iterator[None]:
    """Allow cells of that length: a row without an end may be long."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, most_characters))  # of the whole process, so that it is put back
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(lines: Sequence[str]) -> Iterator[list[str] | None]:
    """Split lines into cells; give None for a line that cannot be split, and go on behind it."""
    start = broken = 0
    while start < len(lines):
        reader = csv.reader(islice(lines, start, None), strict=True)
        read = 0
        try:
            for row in reader:
                read = reader.line_num
                if row:
                    yield row
            return
        except csv.Error:
            broken += 1
            start += read + 1
            yield None
        if broken == _MOST_BROKEN:
            yield from [None] * (len(lines) - start)
            return


def _columns(header: Sequence[str], rows: Sequence[list[str] | None]) -> tuple[dict[str, Series], int]:
    """Collect the points of each column, and count the rows that cannot be used."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    at = header.index("step")
    lost = 0
    for row in rows:
        step = None if row is None or not at < len(row) <= len(header) else _number(row[at])
        if row is None or step is None or not is_point("step", step):
            lost += 1
            continue
        cells = {tag: value for tag, cell in zip(header, row, strict=False) if (value := _number(cell)) is not None}
        lost += not all(is_point(tag, value) for tag, value in cells.items())
        for tag, value in cells.items():
            if tag != "step" and is_point(tag, value):
                steps, values = points.setdefault(tag, ([], []))
                steps.append(int(step))
                values.append(value)
    return {tag: Series.of(steps, values) for tag, (steps, values) in points.items()}, lost


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # empty, or text
        return None
