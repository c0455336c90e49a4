"""What is remembered of each sample, as a table in a file: written for the user to read, and read to begin a run with.

CSV needs no package; a file whose name ends with ``.parquet`` is written and read by pyarrow.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_ast.errors import ConfigurationError
from lightning_ast.extras import needs
from lightning_ast.words import counted

__all__ = ["IndexSet", "ScoreSource", "read_indices", "read_scores", "write_parts", "write_scores"]

ScoreSource: TypeAlias = str | Path | Tensor | np.ndarray[Any, Any] | Sequence[float]
"""A file with the columns ``index`` (may be left out) and ``significance``, or one number for each sample."""
IndexSet: TypeAlias = str | Path | Tensor | np.ndarray[Any, Any] | Sequence[int]
"""A file with the column ``index``, or dataset indices."""

_ROWS = 1 << 18  # written at once
_Column: TypeAlias = Any  # a masked array of numpy: what is masked is not known
_Write: TypeAlias = Callable[[list[_Column]], None]


def write_scores(path: str | Path, epochs: dict[str, Any]) -> None:
    """Write a table of the samples from what a checkpoint holds of them; a file that is there stays until it is whole.

    Args:
        path: The file; with the ending ``.parquet`` it is a Parquet file, else CSV. Its columns are ``index``,
            ``label``, ``times_selected``, ``significance`` (the last one) and ``significance_epoch_E`` for each epoch
            that was kept. What is not known is empty, a significance that was not finite too.
        epochs: The ``"epochs"`` of the state of a selection callback in mode ``prune``.
    """
    path = Path(path)
    columns = _columns(epochs)
    beside = path.with_name(f".{path.name}.part")
    try:
        with (_parquet if path.suffix == ".parquet" else _csv)(beside, list(columns)) as write:
            for start in range(0, len(columns["index"]), _ROWS):
                write([column[start : start + _ROWS] for column in columns.values()])
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_parts(path: str | Path, state: dict[str, Any]) -> list[Path]:
    """Write the samples in the state of a selection callback; where each process has a part of its own, a file of each.

    Returns:
        The files: ``path`` itself, or beside it ``NAME-partR.SUFFIX`` for each process of rank R.
    """
    path = Path(path)
    parts = state.get("parts")
    if parts is None:
        write_scores(path, state["epochs"])
        return [path]
    written = []
    for rank, part in enumerate(parts):
        written.append(path.with_name(f"{path.stem}-part{rank}{path.suffix}"))
        write_scores(written[-1], part)
    return written


def _columns(epochs: dict[str, Any]) -> dict[str, _Column]:
    history = epochs["history"]
    recent = history["recent"].cpu()
    last = torch.where(recent >= 0, recent, history["scores"])
    columns = {"index": np.ma.arange(len(last))}
    samples = epochs.get("samples")  # a checkpoint of an older release has none
    by_epoch: dict[int, Tensor] = {}
    if samples is not None:
        if samples["labels"] is not None:
            columns["label"] = np.ma.masked_less(samples["labels"].numpy(), 0)
        columns["times_selected"] = np.ma.array(samples["times"].numpy())
        by_epoch = dict(samples["epochs"])
        if samples["keeps_epochs"] and bool((recent >= 0).any()):
            by_epoch[samples["epoch"]] = recent.bfloat16()
    columns["significance"] = _known(last)
    latest = sorted(by_epoch)[-samples["keeps_epochs"] :] if by_epoch and samples else []
    return columns | {f"significance_epoch_{epoch}": _known(by_epoch[epoch]) for epoch in latest}


def _known(scores: Tensor) -> _Column:
    values = scores.float().numpy()
    return np.ma.masked_where(~np.isfinite(values) | (values < 0), values)


@contextmanager
def _csv(path: Path, names: list[str]) -> Iterator[_Write]:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(names)
        yield lambda columns: rows.writerows(zip(*map(_texts, columns), strict=True))


def _texts(column: _Column) -> list[str]:
    # The shortest text that reads as the same number in its own precision.
    return ["" if hidden else str(value) for value, hidden in zip(column.data, np.ma.getmaskarray(column), strict=True)]


@contextmanager
def _parquet(path: Path, names: list[str]) -> Iterator[_Write]:
    with needs("parquet", "pyarrow"):
        import pyarrow
        import pyarrow.parquet
    opened: list[Any] = []

    def write(columns: list[_Column]) -> None:
        table = pyarrow.table([pyarrow.array(c.data, mask=np.ma.getmaskarray(c)) for c in columns], names=names)
        if not opened:  # the types are known now
            opened.append(pyarrow.parquet.ParquetWriter(path, table.schema))
        opened[0].write_table(table)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


def read_scores(source: ScoreSource, size: int) -> tuple[Tensor, Tensor | None]:
    """Read the scores that a run begins with.

    Args:
        source: One number for each sample, or a file as :func:`write_scores` writes it. In a file with an ``index``
            samples may be left out, and a significance may be empty: such samples have no score.
        size: The number of samples in the data set.

    Returns:
        ``(N,)`` float32 scores, -1 where there is none, and ``(N,)`` int64 classes, -1 where not known, or None.
    """
    name = "initial_scores"
    if not isinstance(source, (str, Path)):
        return _checked(name, _tensor(name, source), size, None), None
    table = _read(name, source, ("significance",), ("index", "label"))
    values = torch.tensor([-1.0 if value is None else _number(name, value) for value in table["significance"]])
    given = torch.tensor([value is not None for value in table["significance"]], dtype=torch.bool)
    indices = _indices_of(name, table["index"], size) if "index" in table else None
    scores = _checked(name, values, size, indices, given=given)
    if "label" not in table:
        return scores, None
    labels = torch.tensor([-1.0 if value is None else _number(name, value) for value in table["label"]])
    labels = labels.nan_to_num(-1.0, -1.0, -1.0).long()
    return scores, labels if indices is None else torch.full((size,), -1).index_copy_(0, indices, labels)


def read_indices(name: str, source: IndexSet, size: int) -> Tensor:
    """Read a set of dataset indices as ``(N,)`` bool; ``name`` is the setting that it was given as."""
    if isinstance(source, (str, Path)):
        indices = _indices_of(name, _read(name, source, ("index",), ())["index"], size)
    else:
        given = _tensor(name, source)
        if given.ndim != 1 or (given.numel() and (given.is_floating_point() or given.dtype == torch.bool)):
            raise _fault(name, "expected dataset indices, a list of ints", f"{given.dtype} of {tuple(given.shape)}")
        indices = _indices_of(name, given.tolist(), size)
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, indices, True)


def _checked(name: str, values: Tensor, size: int, indices: Tensor | None, *, given: Tensor | None = None) -> Tensor:
    values = values.detach().to("cpu", torch.float32)
    expected = f"expected the significance of {counted(size, 'sample')}, as many as the data set has"
    if indices is None and values.shape != (size,):
        raise _fault(name, expected, f"shape {tuple(values.shape)}")
    given = torch.ones_like(values, dtype=torch.bool) if given is None else given
    wrong = (given & ~(values.isfinite() & (values >= 0))).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        where = f"{counted(len(wrong), 'value')} that are not, such as {values[row]:g} in row {row}"
        raise _fault(name, "expected finite numbers of at least 0, larger ones for samples that matter more", where)
    if indices is None:
        return values
    ordered = indices.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.numel():
        raise _fault(name, "expected each index once", f"index {int(twice[0])} several times")
    return torch.full((size,), -1.0).index_copy_(0, indices, values)


def _indices_of(name: str, values: list[Any], size: int) -> Tensor:
    numbers = [_number(name, value) for value in values]
    wrong = next((number for number in numbers if not (0 <= number < size and number == int(number))), None)
    if wrong is not None:
        raise _fault(name, f"expected dataset indices in [0, {size})", f"{wrong:g}")
    return torch.tensor([int(number) for number in numbers], dtype=torch.int64)


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise _fault(name, "expected a tensor, a list of numbers, or a file", type(values).__name__) from None


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise _fault(name, "expected numbers", repr(value)) from None


def _read(name: str, path: str | Path, needed: tuple[str, ...], wanted: tuple[str, ...]) -> dict[str, list[Any]]:
    """Read columns of a table; what is not known is None."""
    path = Path(path)
    try:
        table = (_read_parquet if path.suffix == ".parquet" else _read_csv)(path)
    except OSError as error:
        raise _fault(name, f"expected a file that can be read at {path}", str(error.strerror or error)) from error
    except (ValueError, csv.Error) as error:  # bytes of another format
        raise _fault(name, f"expected a CSV file, or one that ends with .parquet, at {path}", str(error)) from error
    if missing := [column for column in needed if column not in table]:
        found = ", ".join(map(repr, table)) or "none"
        raise _fault(name, f"expected the column {missing[0]!r} in {path}", f"the columns {found}")
    return {column: table[column] for column in (*needed, *wanted) if column in table}


def _read_csv(path: Path) -> dict[str, list[Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
        names, *rows = [row for row in csv.reader(file) if row] or [[]]
    return {
        column.strip(): [row[place] if place < len(row) and row[place] != "" else None for row in rows]
        for place, column in enumerate(names)
    }


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    with needs("parquet", "pyarrow"):
        import pyarrow.parquet
    table = pyarrow.parquet.read_table(path)
    return {column: table[column].to_pylist() for column in table.column_names}


def _fault(name: str, expected: str, got: str) -> ConfigurationError:
    return ConfigurationError([f"{name}: {expected}; got {got}."])
