"""Read the ``metrics.csv`` that Lightning's CSVLogger writes."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning_ast.report.files import UnreadableError, reading
from lightning_ast.report.series import Series
from lightning_ast.words import counted

__all__ = ["read_table"]

_MOST = {"step": 2.0**53, "epoch": 1e7}  # both count from 0


def read_table(path: Path) -> tuple[dict[str, Series], str | None]:
    """Return the columns of a table of metrics by tag; and what was left out as damaged, or None."""
    with reading(path) as file:
        lines = io.StringIO(file.read().decode("utf-8-sig", "replace"), newline="").readlines()
    if not lines:
        return {}, None  # a run that logged nothing
    # a crash leaves NUL bytes, or a last line without its end, whose last number may be cut off
    whole = [line for line in lines if "\0" not in line and line.endswith(("\n", "\r"))]
    try:
        rows = csv.DictReader(whole)
        header = rows.fieldnames or ()
        read = [_values(row) for row in rows]
    except csv.Error as error:
        raise UnreadableError(f"cannot be read as a table ({error})") from error
    if "step" not in header:
        raise UnreadableError("has no column 'step', so CSVLogger did not write it")
    points: dict[str, tuple[list[int], list[float]]] = {}
    for values in filter(None, read):
        step = int(values.pop("step"))
        for tag, value in values.items():
            steps, logged = points.setdefault(tag, ([], []))
            steps.append(step)
            logged.append(value)
    lost = len(lines) - len(whole) + read.count(None)
    columns = {tag: Series.of(steps, logged) for tag, (steps, logged) in points.items()}
    return columns, f"{counted(lost, 'row')} of it, damaged or without a step" if lost else None


def _values(row: dict[str | None, str | None]) -> dict[str, float] | None:
    """Return the numbers of a row by tag; None where they are not those of a step."""
    values = {tag: value for tag, cell in row.items() if tag and (value := _number(cell)) is not None}
    is_whole = None not in row and "step" in values  # what is beyond the header stands under None
    in_range = all(0 <= values[tag] <= most for tag, most in _MOST.items() if tag in values)
    return values if is_whole and in_range else None


def _number(cell: str | None) -> float | None:
    try:
        return None if cell is None else float(cell)
    except ValueError:  # empty, or text
        return None
