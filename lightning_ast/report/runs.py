"""Read the logs of runs: TensorBoard's event files, Lightning's ``metrics.csv``."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_ast.report.find import CSV, EVENTS, find_runs, run_names
from lightning_ast.report.series import Histogram, ReportError, Run, Series, Source

__all__ = ["Logs", "read_logs", "read_runs", "session_offsets", "undone_from"]


class Logs(NamedTuple):
    """The runs by name, and a line for each log or folder that was left out."""

    runs: list[Run]
    left_out: list[str]


def read_runs(log_dirs: Sequence[str | Path]) -> list[Run]:
    """Read every run at or below the folders.

    Args:
        log_dirs: folders with logs in them, at any depth.

    Returns:
        The runs, by name. A folder with both kinds of log is one run: TensorBoard's values win. A log that cannot be
        read is left out with a warning.

    Raises:
        ReportError: a folder is not there or holds no log, no log can be read, or TensorBoard is not installed and
            there are event files.
    """
    runs, left_out = read_logs(log_dirs)
    for line in left_out:
        warnings.warn(f"Left out of the runs: {line}.", stacklevel=2)
    return runs


def read_logs(log_dirs: Sequence[str | Path]) -> Logs:
    """As ``read_runs``, but what was left out is returned.

    Args:
        log_dirs: folders with logs in them, at any depth.

    Raises:
        ReportError: as ``read_runs``.
    """
    folders, left_out = find_runs(log_dirs)
    read: dict[Path, Run] = {}
    for folder in folders:
        run, lines = _read(folder)
        left_out += lines
        if run is not None:
            read[folder] = run
    runs = {folder: run for folder, run in read.items() if not _is_part(run, read.get(folder.parent))}
    if parts := [str(folder) for folder in read if folder not in runs]:
        left_out.append(
            f"{', '.join(parts)}: no epochs, in the folder of a run, as SummaryWriter.add_scalars writes its curves"
        )
    if not runs:
        raise ReportError(f"no log can be read: {'; '.join(left_out)}. Give the folders that a logger wrote to.")
    named = [replace(run, name=name) for run, name in zip(runs.values(), run_names(list(runs)), strict=True)]
    return Logs(sorted(named, key=lambda run: run.name), left_out)


def _is_part(run: Run, parent: Run | None) -> bool:
    """Whether it is not a run of its own, but curves that were written beside those of the run it stands in."""
    beside = parent is not None and parent.source != "CSV" and run.source == "TensorBoard"
    return beside and bool(run.scalars) and "epoch" not in run.scalars


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


def undone_from(sessions: Sequence[tuple[Sequence[int], bool]]) -> list[float]:
    """The step from which on the points of each process of a resumed run were undone by a later one.

    Args:
        sessions: in the order of time, for each the steps it logged, and whether it trained: a test undoes nothing.

    Returns:
        A step each; infinite where all points count.

    Example:
        >>> undone_from([([9, 19, 29], True), ([14], True), ([0], False)])
        [14.0, inf, inf]
    """
    firsts = [float(min(steps)) if steps and trained else math.inf for steps, trained in sessions]
    return [min(firsts[i + 1 :], default=math.inf) for i in range(len(firsts))]


def _read(folder: Path) -> tuple[Run | None, list[str]]:
    """The run of a folder, None where no log in it can be read, and a line for each that cannot."""
    lines: list[str] = []
    files = sorted(folder.iterdir())  # links that lead nowhere are among them
    events = [path for path in files if fnmatchcase(path.name, EVENTS) and _opens(path, lines)]
    scalars, histograms = _events(events) if events else ({}, {})
    table = folder / CSV
    from_csv: dict[str, Series] | None = None
    if table in files and _opens(table, lines):
        from_csv = _csv(table)
        if from_csv is None:
            lines.append(f"{table}: has no column 'step', so CSVLogger did not write it")
    if not events and from_csv is None:
        return None, lines
    source: Source = "CSV" if not events else "TensorBoard" if from_csv is None else "TensorBoard and CSV"
    scalars = {**(from_csv or {}), **scalars}
    return Run(folder.name, folder, source, scalars, histograms, _mode(folder / "config.yaml")), lines


def _opens(path: Path, lines: list[str]) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError as error:
        lines.append(f"{path}: cannot be read ({error.strerror})")
        return False


def _csv(path: Path) -> dict[str, Series] | None:
    """None where CSVLogger did not write it. A crash can leave anything at its end, which is passed over."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(line.replace("\0", "") for line in file)
        try:
            if "step" not in (rows.fieldnames or ("step",)):  # an empty file is a run that logged nothing
                return None
            for row in rows:
                step = _number(row.pop("step", None))
                for tag, cell in row.items():
                    value = _number(cell)
                    if step is not None and 0 <= step < 2**62 and value is not None:
                        steps, values = points.setdefault(tag, ([], []))
                        steps.append(int(step))
                        values.append(value)
        except csv.Error:  # a field without an end: what was read before it counts
            pass
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
    times = [_times(session) for session in sessions]
    ends = undone_from([(steps, _trained(s, steps)) for s, (_, steps, _) in zip(sessions, times, strict=True)])
    return _joined(sessions, session_offsets(times), ends)


def _joined(
    sessions: Sequence[Any], offsets: Sequence[float], ends: Sequence[float]
) -> tuple[dict[str, Series], dict[str, Histogram]]:
    points: dict[str, tuple[list[int], list[float], list[float]]] = {}
    histograms: dict[str, Histogram] = {}
    for session, offset, end in zip(sessions, offsets, ends, strict=True):
        start = session.FirstEventTimestamp()
        for tag in session.Tags()["scalars"]:
            for event in _counting(session.Scalars(tag), tag, end):
                steps, values, clock = points.setdefault(tag, ([], [], []))
                steps.append(event.step)
                values.append(event.value)
                clock.append(event.wall_time - start + offset)
        for tag in session.Tags()["histograms"]:
            for last in _counting(session.Histograms(tag), tag, end)[-1:]:
                histograms[tag] = _histogram(last.step, last.histogram_value)
    return {tag: Series.of(*columns) for tag, columns in points.items()}, histograms


def _counting(events: Sequence[Any], tag: str, end: float) -> list[Any]:
    """Those that were not undone; what callbacks log themselves stands at the number of steps done, one further on."""
    by_callback = tag.startswith(("ast/", "energy/"))
    return [event for event in events if event.step < end or (by_callback and event.step == end)]


def _trained(session: Any, steps: Sequence[int]) -> bool:
    """Not a test or a validation alone: those log once, and no training loss."""
    return len(set(steps)) > 1 or any("train" in tag or tag.startswith("ast/") for tag in session.Tags()["scalars"])


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
        callbacks = yaml.safe_load(config.read_text(encoding="utf-8", errors="replace"))["trainer"]["callbacks"]
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if callback["class_path"].rsplit(".", 1)[-1] == "SparseSelectionCallback":
                return str(callback["init_args"]["mode"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):  # somebody else's config.yaml
        return None
    return None
