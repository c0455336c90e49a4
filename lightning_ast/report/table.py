"""Read the ``metrics.csv`` that Lightning's CSVLogger writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from lightning_ast.report.files import UnreadableError, reading
from lightning_ast.report.series import Series, is_point
from lightning_ast.words import counted

__all__ = ["read_table"]

_MOST_BYTES = 2**28


def read_table(path: Path) -> tuple[dict[str, Series], str | None]:
    """Return the columns of a table of metrics by tag; and what was left out as damaged, or None."""
    with reading(path, most_bytes=_MOST_BYTES) as (file, size):
        text = file.read(size).decode("utf-8-sig", "replace")
    lines = io.StringIO(text, newline="").readlines()
    if lines and "\0" in lines[0]:
        raise UnreadableError("is not text in UTF-8")
    # a crash leaves NUL bytes, or a last line without its end, whose last number may be cut off
    whole = [line for line in lines if "\0" not in line and line.endswith(("\n", "\r"))]
    header, *rows = [_cells(line) for line in whole if line.strip("\r\n")] or [None]
    if header is None and not lines:
        return {}, None  # a run that logged nothing
    if header is None or "step" not in header:
        raise UnreadableError("has no column 'step', so CSVLogger did not write it")
    columns, lost = _columns(header, rows)
    lost += len(lines) - len(whole)
    return columns, f"{counted(lost, 'row')} of it, damaged or without a step" if lost else None


def _cells(line: str) -> list[str] | None:
    """Split a line into its cells; None where it cannot be split: CSVLogger writes a row a line."""
    try:
        return next(csv.reader([line], strict=True), None)
    except csv.Error:
        return None


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
