"""The runs below some folders, each read from its event files, its table and the configuration beside them."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import yaml
from tqdm import tqdm

from lightning_ast.errors import ReportError
from lightning_ast.mode_facts import MODES
from lightning_ast.report.events import join_sessions, read_session
from lightning_ast.report.series import Run, Series, Source
from lightning_ast.words import counted, readable

__all__ = ["MANY_RUNS", "find_runs", "read_logs", "read_runs", "run_names"]

MANY_RUNS = 10  # from so many on, a report may show how far it is
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
        ReportError: A folder is not there or holds no log, no log can be read, or TensorBoard is not installed and
            there are event files.
    """
    runs, left_out = read_logs(log_dirs)
    for line in left_out:
        warnings.warn(f"Left out of the runs: {line}.", stacklevel=2)
    return runs


def read_logs(log_dirs: Sequence[str | Path], *, progress: bool = False) -> tuple[list[Run], list[str]]:
    """Read runs as ``read_runs`` does; return them, and a line for each log or folder that was left out.

    With ``progress`` a bar is shown where there are many.
    """
    folders, left_out = find_runs(log_dirs)
    read: dict[Path, Run] = {}
    for folder in tqdm(folders, "Reading", unit="run", disable=not progress or len(folders) < MANY_RUNS):
        run = _read(folder, left_out)
        if run is not None:
            read[folder] = run
    runs = {folder: run for folder, run in read.items() if not _is_part(run, read.get(folder.parent))}
    if parts := [str(folder) for folder in read if folder not in runs]:
        left_out.append(
            f"{', '.join(parts)}: no epochs, in the folder of a run, as SummaryWriter.add_scalars writes its curves"
        )
    if not runs:
        raise ReportError(f"no log can be read: {'; '.join(left_out)}. Give the folders that a logger wrote to.")
    named = [replace(run, name=readable(name)) for run, name in zip(runs.values(), run_names(list(runs)), strict=True)]
    return sorted(named, key=lambda run: run.name), left_out


def _is_part(run: Run, parent: Run | None) -> bool:
    """Tell whether it is not a run of its own, but curves that were written beside those of the run it stands in."""
    beside = parent is not None and parent.source != "CSV" and run.source == "TensorBoard"
    return beside and bool(run.scalars) and "epoch" not in run.scalars


def find_runs(log_dirs: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Find folders at or below ``log_dirs`` that hold a log, each once; and a line for each that cannot be listed."""
    if not log_dirs:
        raise ReportError("expected at least one folder with logs, got none.")
    found: dict[Path, Path] = {}
    left_out: list[str] = []
    for given in log_dirs:
        root = Path(given).expanduser()
        if not root.is_dir():
            what = "a file" if root.exists() else "not there"
            raise ReportError(f"expected a folder with logs, but {given} is {what}: give the folder a logger wrote to.")
        # a link keeps its own name, which is the one the user gave; .. after a link must be resolved
        logs, unreadable = _walk(root.resolve() if ".." in root.parts else root.absolute())
        if not logs and not unreadable:
            raise ReportError(
                f"no logs in or below {given}: looked for {_EVENTS} (TensorBoardLogger) and {_TABLE} (CSVLogger). "
                "Pass one of these loggers to the Trainer, and its save_dir to the report."
            )
        found = {**logs, **found}
        left_out += unreadable
    return sorted(found.values()), left_out


def _walk(root: Path) -> tuple[dict[Path, Path], list[str]]:
    """Find folders with logs by their real paths, also behind links, and a line for each that cannot be listed."""
    unreadable: list[str] = []

    def refused(error: OSError) -> None:
        unreadable.append(f"{error.filename}: cannot be listed ({error.strerror})")

    top = root.resolve()
    found: dict[Path, Path] = {}
    visited: set[Path] = set()
    for name, folders, files in os.walk(root, onerror=refused, followlinks=True):
        real = Path(name).resolve()
        if real in visited:  # by a link
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        if any(file == _TABLE or fnmatchcase(file, _EVENTS) for file in files):
            # not the name of a link, such as "latest", to what is there under its own
            found[real] = root / real.relative_to(top) if real.is_relative_to(top) else Path(name)
    return found, unreadable


def run_names(folders: Sequence[Path]) -> list[str]:
    """Shorten names: the path from the common parent on, without the last parts that are the same for all runs."""
    parents = [folder.parent for folder in folders]
    common = Path(os.path.commonpath(folders if len(folders) > 1 else parents))
    parts = [folder.relative_to(common).parts or (folder.name,) for folder in folders]
    if len(set(parts)) < len(parts):  # dup and dup/dup: the parent tells them apart
        parts = [folder.relative_to(common.parent).parts for folder in folders]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def _read(folder: Path, left_out: list[str]) -> Run | None:
    """Read the run of a folder; None where no log in it can be read."""
    files = sorted(folder.iterdir())
    events = [path for path in files if fnmatchcase(path.name, _EVENTS)]
    sessions = [session for path in events for session in _try(read_session, path, left_out)]
    tables = [found for path in files if path.name == _TABLE for found in _try(_read_table, path, left_out)]
    if not sessions and not tables:
        return None
    scalars, histograms = join_sessions(sessions)
    source: Source = "CSV" if not sessions else "TensorBoard and CSV" if tables else "TensorBoard"
    # TensorBoard's values win: they come with wall times
    together = {tag: series for found in [*tables, scalars] for tag, series in found.items()}
    return Run(folder.name, folder, source, together, histograms, _read_mode(files))


def _try(read: Callable[[Path, list[str]], Content], path: Path, left_out: list[str]) -> list[Content]:
    """Read a file: one content, or none and a line about it."""
    try:
        return [read(path, left_out)]
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        left_out.append(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return []


def _read_table(path: Path, left_out: list[str]) -> dict[str, Series]:
    """Read the columns by tag of the ``metrics.csv`` that Lightning's CSVLogger writes."""
    points: dict[str, tuple[list[int], list[float]]] = {}
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
                steps, logged = points.setdefault(tag, ([], []))
                steps.append(step)
                logged.append(value)
    if lost:
        left_out.append(f"{path}: {counted(lost, 'row')} of it, without a step")
    return {tag: Series.of(steps, logged) for tag, (steps, logged) in points.items()}


def _number(cell: str | None) -> float | None:
    try:
        return None if cell is None else float(cell)
    except ValueError:  # empty, or text
        return None


def _read_mode(files: Sequence[Path]) -> str | None:
    """Read the mode that ``lightning-ast fit`` saved beside a log; None where it is not known."""
    try:
        # A run leaves a config.yaml that is there alone, and takes config_1.yaml: only that holds what the command line
        # changed. Of the same time, as after a copy, the highest number is the last one.
        found = (path for path in files if _CONFIGURATION.fullmatch(path.name))
        newest = max(found, key=lambda path: (path.stat().st_mtime_ns, len(path.name), path.name))
        # every scalar a str: no value can fail to be made
        callbacks = yaml.load(newest.read_bytes(), Loader=yaml.BaseLoader)["trainer"]["callbacks"]
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        own = (each for each in listed if each["class_path"].rsplit(".", 1)[-1] == "SparseSelectionCallback")
        mode = next(own)["init_args"]["mode"]
    except (OSError, ValueError, yaml.YAMLError, StopIteration, KeyError, TypeError, AttributeError):
        return None  # no configuration, or another program's
    return mode if mode in MODES else None
