"""Find the runs below some folders, and read their logs: TensorBoard's event files, Lightning's ``metrics.csv``."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ast.report.series import Histogram, ReportError, Run, Series, Source

__all__ = ["find_runs", "read_runs", "run_names", "session_offsets"]

EVENTS = "events.out.tfevents.*"
CSV = "metrics.csv"


def read_runs(log_dirs: Sequence[str | Path]) -> list[Run]:
    """Read every run at or below the folders.

    Args:
        log_dirs: folders with logs in them, at any depth.

    Returns:
        The runs, by name. A folder with both kinds of log is one run: TensorBoard's values win.

    Raises:
        ReportError: a folder is not there or holds no log, a ``metrics.csv`` is not Lightning's, or TensorBoard is not
            installed and there are event files.
    """
    folders = find_runs(log_dirs)
    runs = [_read(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
    return sorted(runs, key=lambda run: run.name)


def find_runs(log_dirs: Sequence[str | Path]) -> list[Path]:
    """Folders at or below ``log_dirs`` that hold a log, each once.

    Args:
        log_dirs: to look in.

    Raises:
        ReportError: one of them is no folder, or there is no log in or below it.
    """
    if not log_dirs:
        raise ReportError("expected at least one folder with logs, got none.")
    found: set[Path] = set()
    for given in log_dirs:
        root = Path(given).expanduser()
        if not root.is_dir():
            what = "a file" if root.exists() else "not there"
            raise ReportError(f"expected a folder with logs, but {given} is {what}: give the folder a logger wrote to.")
        logs = [path.resolve().parent for pattern in (EVENTS, CSV) for path in root.rglob(pattern)]
        if not logs:
            raise ReportError(
                f"no logs in or below {given}: looked for {EVENTS} (TensorBoardLogger) and {CSV} (CSVLogger). "
                "Pass one of these loggers to the Trainer, and its save_dir to the report."
            )
        found.update(logs)
    return sorted(found)


def run_names(folders: Sequence[Path]) -> list[str]:
    """Short names: the path from the common parent on, without the last parts where those of all runs are the same.

    Args:
        folders: absolute, no two the same.

    Example:
        >>> run_names([Path("/logs/dense/version_0"), Path("/logs/prune/version_0")])
        ['dense', 'prune']
        >>> run_names([Path("/logs/dense/version_0")])
        ['version_0']
    """
    parents = [folder.parent for folder in folders]
    common = Path(os.path.commonpath(folders if len(folders) > 1 else parents))
    parts = [folder.relative_to(common).parts or (folder.name,) for folder in folders]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def session_offsets(sessions: Sequence[tuple[float, Sequence[int], Sequence[float]]]) -> list[float]:
    """Where the clock stands when each process of a resumed run begins: breaks, and steps that were undone, left out.

    Args:
        sessions: in the order of time, for each when it began (seconds), the steps it logged and when it did.

    Returns:
        Seconds at the start of each.

    Example:
        >>> session_offsets([(100.0, [1, 2, 3], [110.0, 120.0, 130.0]), (500.0, [3, 4], [505.0, 515.0])])
        [0.0, 20.0]
    """
    offsets = [0.0] if sessions else []
    for (start, steps, times), (_, later, _) in pairwise(sessions):
        kept = [time for step, time in zip(steps, times, strict=True) if not later or step < min(later)]
        offsets.append(offsets[-1] + (max(kept) - start if kept else 0.0))
    return offsets


def _read(folder: Path, name: str) -> Run:
    events, table = sorted(folder.glob(EVENTS)), folder / CSV
    from_csv = _csv(table) if table.is_file() else {}
    scalars, histograms = _events(events) if events else ({}, {})
    source: Source = "CSV" if not events else "TensorBoard and CSV" if table.is_file() else "TensorBoard"
    return Run(name, folder, source, {**from_csv, **scalars}, histograms, _mode(folder / "config.yaml"))


def _csv(path: Path) -> dict[str, Series]:
    points: dict[str, tuple[list[int], list[float]]] = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if "step" not in (rows.fieldnames or ("step",)):  # an empty file is a run that logged nothing
            raise ReportError(
                f"{path} has no column 'step', so CSVLogger did not write it: give the folders of the runs themselves."
            )
        for row in rows:
            step = _number(row.pop("step", None))
            for tag, cell in row.items():
                value = _number(cell)
                if step is not None and math.isfinite(step) and value is not None:
                    steps, values = points.setdefault(tag, ([], []))
                    steps.append(int(step))
                    values.append(value)
    return {tag: Series.of(steps, values) for tag, (steps, values) in points.items()}


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):  # empty, cut off, or text
        return None


def _events(paths: Iterable[Path]) -> tuple[dict[str, Series], dict[str, Histogram]]:
    try:
        from tensorboard.backend.event_processing import event_accumulator as tensorboard
    except ModuleNotFoundError as error:
        raise ReportError(
            f"event files need TensorBoard to be read ({error}): pip install 'lightning-ast[report]'."
        ) from error
    sessions = []
    for path in paths:
        session = tensorboard.EventAccumulator(str(path), tensorboard.STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
        if session.Tags()["scalars"] or session.Tags()["histograms"]:
            sessions.append(session)
    sessions.sort(key=lambda session: float(session.FirstEventTimestamp()))
    points: dict[str, tuple[list[int], list[float], list[float]]] = {}
    histograms: dict[str, Histogram] = {}
    for session, offset in zip(sessions, session_offsets([_times(s) for s in sessions]), strict=True):
        start = session.FirstEventTimestamp()
        for tag in session.Tags()["scalars"]:
            steps, values, clock = points.setdefault(tag, ([], [], []))
            for event in session.Scalars(tag):
                steps.append(event.step)
                values.append(event.value)
                clock.append(event.wall_time - start + offset)
        for tag in session.Tags()["histograms"]:
            last = session.Histograms(tag)[-1]
            histograms[tag] = _histogram(last.step, last.histogram_value)
    return {tag: Series.of(*columns) for tag, columns in points.items()}, histograms


def _times(session: Any) -> tuple[float, list[int], list[float]]:
    """The steps at which Lightning logged: it adds the epoch to all but what a logger writes when it is made."""
    events = session.Scalars("epoch") if "epoch" in session.Tags()["scalars"] else []
    return session.FirstEventTimestamp(), [event.step for event in events], [event.wall_time for event in events]


def _histogram(step: int, value: Any) -> Histogram:
    """TensorBoard stores the right edges of the buckets, the outermost of which reach beyond the values."""
    edges = np.clip(np.asarray([value.min, *value.bucket_limit], dtype=np.float64), value.min, value.max)
    return Histogram(step, edges, np.asarray(value.bucket, dtype=np.float64))


def _mode(config: Path) -> str | None:
    """The mode of ``SparseSelectionCallback`` in the configuration that LightningCLI saves."""
    if not config.is_file():
        return None
    import yaml

    try:
        callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if callback["class_path"].rsplit(".", 1)[-1] == "SparseSelectionCallback":
                return str(callback["init_args"]["mode"])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):  # somebody else's config.yaml
        return None
    return None
