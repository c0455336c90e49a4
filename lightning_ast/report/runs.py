"""The runs below some folders, each read from its event files, its table and the configuration beside them."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml

from lightning_ast.errors import ReportError
from lightning_ast.extras import needs
from lightning_ast.mode_facts import MODES
from lightning_ast.report.series import Histogram, Points, Run, Series, Source
from lightning_ast.words import counted, readable

__all__ = ["find_runs", "read_logs", "read_runs", "run_names"]

_EVENTS = "events.out.tfevents.*"
_TABLE = "metrics.csv"
_CONFIGURATION = re.compile(r"config(_\d+)?\.yaml")
Content = TypeVar("Content")


def read_runs(log_dirs: Sequence[str | Path]) -> list[Run]:
    """Read every run at or below the folders.

    Args:
        log_dirs: The folders with logs in them, at any depth.

    Returns:
        The runs, by name. A folder with both kinds of log is one run: TensorBoard's values win. A log that cannot be
        read is left out with a warning.

    Raises:
        ReportError: A folder is not there or holds no log, or no log can be read.
        MissingPackageError: There are event files, and TensorBoard is not installed.
    """
    runs, left_out = read_logs(log_dirs)
    for line in left_out:
        warnings.warn(f"Left out of the runs: {line}.", stacklevel=2)
    return runs


def read_logs(log_dirs: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Read runs as ``read_runs`` does; return them, and a line for each log that was left out."""
    left_out: list[str] = []
    read = [run for folder in find_runs(log_dirs) if (run := _read(folder, left_out)) is not None]
    by_folder = {run.folder: run for run in read}
    if parts := [folder for folder, run in by_folder.items() if _is_part(run, by_folder.get(folder.parent))]:
        read = [run for run in read if run.folder not in parts]
        folders = ", ".join(map(str, parts))
        left_out.append(f"{folders}: no epochs, in the folder of a run, as SummaryWriter.add_scalars writes its curves")
    if not read:
        raise ReportError(f"no log can be read: {'; '.join(left_out)}. Give the folders that a logger wrote to.")
    names = run_names([run.folder for run in read])
    named = [replace(run, name=readable(name)) for run, name in zip(read, names, strict=True)]
    return sorted(named, key=lambda run: run.name), left_out


def _is_part(run: Run, parent: Run | None) -> bool:
    """Tell whether it is not a run of its own, but curves that were written beside those of the run it stands in."""
    beside = parent is not None and parent.source != "CSV" and run.source == "TensorBoard"
    return beside and bool(run.scalars) and "epoch" not in run.scalars


def find_runs(log_dirs: Sequence[str | Path]) -> list[Path]:
    """Find folders at or below ``log_dirs`` that hold a log, each once."""
    if not log_dirs:
        raise ReportError("expected at least one folder with logs, got none.")
    found: set[Path] = set()
    for given in log_dirs:
        root = Path(given).expanduser()
        if not root.is_dir():
            what = "a file" if root.exists() else "not there"
            raise ReportError(f"expected a folder with logs, but {given} is {what}: give the folder a logger wrote to.")
        logs = {
            Path(folder)
            for folder, _, files in os.walk(root.resolve())
            if any(file == _TABLE or fnmatchcase(file, _EVENTS) for file in files)
        }
        if not logs:
            raise ReportError(
                f"no logs in or below {given}: looked for {_EVENTS} (TensorBoardLogger) and {_TABLE} (CSVLogger). "
                "Pass one of these loggers to the Trainer, and its save_dir to the report."
            )
        found |= logs
    return sorted(found)


def run_names(folders: Sequence[Path]) -> list[str]:
    """Shorten names: the path from the common parent on, without the last parts that are the same for all runs."""
    common = os.path.commonpath([folder.parent for folder in folders])
    parts = [folder.relative_to(common).parts for folder in folders]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def _read(folder: Path, left_out: list[str]) -> Run | None:
    """Read the run of a folder; None where no log in it can be read."""
    files = sorted(folder.iterdir())
    event_files = [path for path in files if fnmatchcase(path.name, _EVENTS)]
    sessions = [found for path in event_files for found in _try(_read_events, path, left_out)]
    tables = [found for path in files if path.name == _TABLE for found in _try(_read_table, path, left_out)]
    if not sessions and not tables:
        return None
    source: Source = "CSV" if not sessions else "TensorBoard and CSV" if tables else "TensorBoard"
    events: Points = {}
    histograms: dict[str, Histogram] = {}
    for session in sorted(sessions, key=lambda session: session.began):
        histograms |= session.histograms
        for tag, logged in session.scalars.items():
            events.setdefault(tag, []).extend(logged)
    scalars = {tag: series for table in tables for tag, series in table.items()}
    scalars |= {tag: Series.of(logged) for tag, logged in events.items()}  # TensorBoard's values win
    return Run(folder.name, folder, source, scalars, histograms, _read_mode(files))


def _try(read: Callable[[Path, list[str]], Content], path: Path, left_out: list[str]) -> list[Content]:
    """Read a file: one content, or none and a line about it."""
    try:
        return [read(path, left_out)]
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        left_out.append(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return []


@dataclass(frozen=True)
class _Session:
    """The scalars and the last histograms that one process wrote to an event file, by tag."""

    began: float  # the wall time of its first event, in seconds
    scalars: Points = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)


def _read_events(path: Path, left_out: list[str]) -> _Session:
    """Read an event file of Lightning's TensorBoardLogger up to where it ends, or is cut off or damaged."""
    with needs("report", "tensorboard", "google"):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
    path.open("rb").close()  # raises an OSError where it cannot be read; TensorBoard has errors of its own
    reader = PyRecordReader_New(str(path))
    found: _Session | None = None
    try:
        while True:
            reader.GetNext()
            event = Event.FromString(reader.record())
            found = found or _Session(event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
                elif value.HasField("histo"):
                    # TensorBoard stores right edges, the outermost of them beyond the values
                    logged = value.histo
                    edges = np.clip([logged.min, *logged.bucket_limit], logged.min, logged.max)
                    counts = np.asarray(logged.bucket, dtype=np.float64)
                    found.histograms[value.tag] = Histogram(event.step, edges, counts)
    except OutOfRangeError:
        pass
    except DataLossError:
        if found is not None:
            left_out.append(f"{path}: the rest of it, cut off or damaged")
    if found is None:
        raise ValueError("it holds no event")
    return found


def _read_table(path: Path, left_out: list[str]) -> dict[str, Series]:
    """Read the columns by tag of the ``metrics.csv`` that Lightning's CSVLogger writes."""
    points: Points = {}
    lost = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        # of a run that was killed, the last line may lack its end, so that its last number is cut off
        rows = csv.DictReader(line for line in file if line.endswith("\n"))
        header = rows.fieldnames
        if header and "step" not in header:
            raise ValueError("it has no column 'step', so CSVLogger did not write it")
        for row in rows:
            values = {tag: value for tag in header or () if (value := _number(row[tag])) is not None}
            if "step" not in values:
                lost += 1
                continue
            step = int(values.pop("step"))
            for tag, value in values.items():
                points.setdefault(tag, []).append((step, value))
    if lost:
        left_out.append(f"{path}: {counted(lost, 'row')} of it, without a step")
    return {tag: Series.of(logged) for tag, logged in points.items()}


def _number(cell: str | None) -> float | None:
    try:
        return None if cell is None else float(cell)
    except ValueError:  # empty, or text
        return None


def _read_mode(files: Sequence[Path]) -> str | None:
    """Read the mode that ``lightning-ast fit`` saved beside a log; None where it is not known."""
    # A run leaves a config.yaml that is there alone, and takes config_1.yaml and so on: that holds what the command
    # line changed, and the highest number is the last one.
    saved = [path for path in files if _CONFIGURATION.fullmatch(path.name)]
    newest = max(saved, key=lambda path: (len(path.name), path.name), default=None)
    if newest is None:
        return None
    try:
        # every scalar a str: no value can fail to be made
        callbacks = yaml.load(newest.read_bytes(), Loader=yaml.BaseLoader)["trainer"]["callbacks"]
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        own = (each for each in listed if each["class_path"].rsplit(".", 1)[-1] == "SparseSelectionCallback")
        mode = next(own)["init_args"]["mode"]
    except (OSError, ValueError, yaml.YAMLError, StopIteration, KeyError, TypeError, AttributeError):
        return None  # another program's configuration
    return mode if mode in MODES else None
