"""What is remembered of each sample, as a table in a file: written for the user to read, and read to begin a run with.

CSV needs no package; a file whose name ends with ``.parquet`` is written and read by pyarrow.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_ast.errors import ConfigurationError
from lightning_ast.extras import needs
from lightning_ast.words import counted

__all__ = ["IndexSet", "ScoreSource", "read_indices", "read_scores", "write_parts"]

ScoreSource: TypeAlias = str | Path | Tensor | np.ndarray[Any, Any] | Sequence[float]
"""A file with the columns ``index`` (may be left out) and ``significance``, or one number for each sample."""
IndexSet: TypeAlias = str | Path | Tensor | np.ndarray[Any, Any] | Sequence[int]
"""A file with the column ``index``, or dataset indices."""

_Column: TypeAlias = Any  # a masked array of numpy: what is masked is not known


def write_parts(path: str | Path, state: dict[str, Any]) -> None:
    """Write the samples in the state of a selection callback; a file that is there stays until the new one is whole.

    Its columns are ``index``, ``label``, ``times_selected``, ``significance`` (the last one) and
    ``significance_epoch_E`` for each epoch that was kept. What is not known is empty, a significance that was not
    finite too. Where each process has a part of its own, there is a file ``NAME-partR.SUFFIX`` for each rank R.
    """
    path = Path(path)
    parts = state.get("parts")
    if parts is None:
        _write(path, state["epochs"])
    else:
        for rank, part in enumerate(parts):
            _write(path.with_name(f"{path.stem}-part{rank}{path.suffix}"), part)


def _write(path: Path, epochs: dict[str, Any]) -> None:
    columns = _columns(epochs)
    beside = path.with_name(f".{path.name}.part")
    try:
        (_write_parquet if path.suffix == ".parquet" else _write_csv)(beside, columns)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _columns(epochs: dict[str, Any]) -> dict[str, _Column]:
    history = epochs["history"]
    recent = history["recent"].cpu()
    last = torch.where(recent >= 0, recent, history["scores"])
    columns = {"index": np.ma.arange(len(last))}
    samples = epochs.get("samples")  # a checkpoint of an older release has none
    if samples is None:
        return {**columns, "significance": _known(last)}
    if samples["labels"] is not None:
        columns["label"] = np.ma.masked_less(samples["labels"].numpy(), 0)
    columns["times_selected"] = np.ma.array(samples["times"].numpy())
    columns["significance"] = _known(last)
    by_epoch = dict(samples["epochs"])
    if samples["keeps_epochs"] and bool((recent >= 0).any()):
        by_epoch[samples["epoch"]] = recent.bfloat16()
    for epoch in sorted(by_epoch)[-samples["keeps_epochs"] :]:
        columns[f"significance_epoch_{epoch}"] = _known(by_epoch[epoch])
    return columns


def _known(scores: Tensor) -> _Column:
    values = scores.float().numpy()
    return np.ma.masked_where(~np.isfinite(values) | (values < 0), values)


def _write_csv(path: Path, columns: dict[str, _Column]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*map(_texts, columns.values()), strict=True))


def _texts(column: _Column) -> Iterator[str]:
    # The shortest text that reads as the same number in its own precision.
    for value, hidden in zip(column.data, np.ma.getmaskarray(column), strict=True):
        yield "" if hidden else str(value)


def _write_parquet(path: Path, columns: dict[str, _Column]) -> None:
    with needs("parquet", "pyarrow"):
        import pyarrow
        import pyarrow.parquet
    arrays = {name: pyarrow.array(c.data, mask=np.ma.getmaskarray(c)) for name, c in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)


def read_scores(name: str, source: ScoreSource, size: int) -> tuple[Tensor, Tensor | None]:
    """Read the scores ``(N,)`` that a run begins with, -1 where there is none, and the classes, or None.

    In a file with an ``index`` samples may be left out, and a significance may be empty: such samples have no score.
    """
    if not isinstance(source, (str, Path)):
        values = _tensor(name, source)
        return _checked(name, values, torch.ones_like(values, dtype=torch.bool), size), None
    table = _read(name, source, "significance")
    given = torch.tensor([value is not None for value in table["significance"]], dtype=torch.bool)
    indices = _indices_of(name, table["index"], size) if "index" in table else None
    scores = _checked(name, _numbers(name, table["significance"]), given, size if indices is None else len(indices))
    labels = None
    if "label" in table:
        labels = _numbers(name, table["label"]).nan_to_num(-1.0, -1.0, -1.0).long()
    if indices is None:
        return scores, labels
    twice = (indices.bincount() > 1).nonzero()
    if twice.numel():
        raise _fault(name, "expected each index once", f"index {int(twice[0])} several times")
    scores = torch.full((size,), -1.0).index_copy_(0, indices, scores)
    return scores, None if labels is None else torch.full((size,), -1).index_copy_(0, indices, labels)


def _checked(name: str, values: Tensor, given: Tensor, size: int) -> Tensor:
    """Return the scores as float32; refuse another number of them, and values of those given that are no scores."""
    values = values.detach().to("cpu", torch.float32)
    if values.shape != (size,):
        expected = f"expected the significance of {counted(size, 'sample')}, as many as the data set has"
        raise _fault(name, expected, f"shape {tuple(values.shape)}")
    wrong = (given.cpu() & ~(values.isfinite() & (values >= 0))).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        where = f"{counted(len(wrong), 'value')} that are not, such as {values[row]:g} in row {row}"
        raise _fault(name, "expected finite numbers of at least 0, larger ones for samples that matter more", where)
    return values


def read_indices(name: str, source: IndexSet, size: int) -> Tensor:
    """Read a set of dataset indices as ``(N,)`` bool; ``name`` is the setting that it was given as."""
    if isinstance(source, (str, Path)):
        values = _read(name, source, "index")["index"]
    else:
        given = _tensor(name, source)
        if given.ndim != 1 or (given.numel() and (given.is_floating_point() or given.dtype == torch.bool)):
            raise _fault(name, "expected dataset indices, a list of ints", f"{given.dtype} of {tuple(given.shape)}")
        values = given.tolist()
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, _indices_of(name, values, size), True)


def _indices_of(name: str, values: list[Any], size: int) -> Tensor:
    numbers = _numbers(name, values)
    wrong = numbers[~((numbers >= 0) & (numbers < size) & (numbers == numbers.floor()))]
    if wrong.numel():
        raise _fault(name, f"expected dataset indices in [0, {size})", f"{wrong[0]:g}")
    return numbers.long()


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise _fault(name, "expected a tensor, a list of numbers, or a file", type(values).__name__) from None


def _numbers(name: str, values: list[Any]) -> Tensor:
    """Return the numbers of a column as float64; -1 where one is not known."""
    numbers = []
    for value in values:
        try:
            numbers.append(-1.0 if value is None else float(value))
        except (TypeError, ValueError):
            raise _fault(name, "expected numbers", repr(value)) from None
    return torch.tensor(numbers, dtype=torch.float64)


def _read(name: str, path: str | Path, needed: str) -> dict[str, list[Any]]:
    """Read the columns of a table, one of which is needed; what is not known is None."""
    path = Path(path)
    try:
        table = (_read_parquet if path.suffix == ".parquet" else _read_csv)(path)
    except OSError as error:
        raise _fault(name, f"expected a file that can be read at {path}", str(error.strerror or error)) from error
    except (ValueError, csv.Error) as error:  # bytes of another format
        raise _fault(name, f"expected a CSV file, or one that ends with .parquet, at {path}", str(error)) from error
    if needed not in table:
        found = ", ".join(map(repr, table)) or "none"
        raise _fault(name, f"expected the column {needed!r} in {path}", f"the columns {found}")
    return table


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
    return ConfigurationError(f"{name}: {expected}; got {got}.")
