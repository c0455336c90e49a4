"""The runs below some folders, each read from its event files and its table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from lightning_ast.errors import ReportError
from lightning_ast.report.configuration import configuration_among, read_mode
from lightning_ast.report.events import Point, Session, read_session
from lightning_ast.report.files import CSV, EVENTS, UnreadableError, find_runs, run_names
from lightning_ast.report.series import Histogram, Run, Series, Source
from lightning_ast.report.table import read_table
from lightning_ast.words import readable

__all__ = ["MANY_RUNS", "Logs", "read_logs", "read_runs", "session_offsets", "undone_from"]

MANY_RUNS = 10  # from so many on, a report may show how far it is
Content = TypeVar("Content")


class Logs(NamedTuple):
    """The runs by name, and a line for each log or folder that was left out."""

    runs: list[Run]
    left_out: list[str]


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


def read_logs(log_dirs: Sequence[str | Path], *, progress: bool = False) -> Logs:
    """Read runs as ``read_runs`` does, but return what was left out; ``progress`` shows a bar where there are many."""
    folders, left_out = find_runs(log_dirs)
    read: dict[Path, Run] = {}
    for folder in tqdm(folders, "Reading", unit="run", disable=not progress or len(folders) < MANY_RUNS):
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
    named = [replace(run, name=readable(name)) for run, name in zip(runs.values(), run_names(list(runs)), strict=True)]
    return Logs(sorted(named, key=lambda run: run.name), left_out)


def _is_part(run: Run, parent: Run | None) -> bool:
    """Tell whether it is not a run of its own, but curves that were written beside those of the run it stands in."""
    beside = parent is not None and parent.source != "CSV" and run.source == "TensorBoard"
    return beside and bool(run.scalars) and "epoch" not in run.scalars


def session_offsets(sessions: Sequence[tuple[float, Sequence[int], Sequence[float]]]) -> list[float]:
    """Find where the clock stands (seconds) as each process of a resumed run begins, less breaks and undone steps."""
    # of each, in the order of time: when it began (seconds), its steps and when it logged them
    offsets = [0.0] if sessions else []
    for (start, steps, times), (_, later, _) in pairwise(sessions):
        kept = [time for step, time in zip(steps, times, strict=True) if not later or step < min(later)]
        offsets.append(offsets[-1] + (max(kept) - start if kept else 0.0))
    return offsets


def undone_from(sessions: Sequence[tuple[Sequence[int], bool]]) -> list[float]:
    """Find the step from which on the points of each process of a resumed run were undone by a later one, or inf."""
    # the earliest step of any later process: a second resume may go further back than the first. A test undoes nothing.
    firsts = [float(min(steps)) if steps and trained else math.inf for steps, trained in sessions]
    return [min(firsts[i + 1 :], default=math.inf) for i in range(len(firsts))]


def _read(folder: Path) -> tuple[Run | None, list[str]]:
    """Read the run of a folder, None where no log in it can be read; and a line for each file that is left out."""
    lines: list[str] = []
    try:
        files = sorted(folder.iterdir())  # links that lead nowhere are among them
    except OSError as error:
        return None, [f"{folder}: cannot be listed ({error.strerror})"]
    events = [found for path in files if fnmatchcase(path.name, EVENTS) for found in _try(read_session, path, lines)]
    tables = [found for path in files if path.name == CSV for found in _try(read_table, path, lines)]
    if not events and not tables:
        return None, lines
    configuration = configuration_among(files)
    modes = [] if configuration is None else _try(read_mode, configuration, lines)
    scalars, histograms = _joined([session for session in events if session is not None])
    source: Source = "CSV" if not events else "TensorBoard and CSV" if tables else "TensorBoard"
    # TensorBoard's values win: they come with wall times
    together = {tag: series for found in [*tables, scalars] for tag, series in found.items()}
    return Run(folder.name, folder, source, together, histograms, modes[0] if modes else None), lines


def _try(read: Callable[[Path], tuple[Content, str | None]], path: Path, lines: list[str]) -> list[Content]:
    """Read a file: one content, or none; add a line about what is left out of it."""
    try:
        content, left_out = read(path)
    except UnreadableError as error:
        lines.append(f"{path}: {error}")
        return []
    if left_out:
        lines.append(f"{path}: {left_out}")
    return [content]


def _joined(sessions: Sequence[Session]) -> tuple[dict[str, Series], dict[str, Histogram]]:
    """Join what the processes of a run wrote: its series, and the last histogram of each tag."""
    sessions = sorted((s for s in sessions if s.scalars or s.histograms), key=lambda session: session.began)
    times = [_times(session) for session in sessions]
    ends = undone_from([(steps, _trained(s, steps)) for s, (_, steps, _) in zip(sessions, times, strict=True)])
    points: dict[str, list[Point]] = {}
    histograms: dict[str, Histogram] = {}
    for session, offset, end in zip(sessions, session_offsets(times), ends, strict=True):
        for tag, logged in session.scalars.items():
            points.setdefault(tag, []).extend(
                Point(step, value, wall_time - session.began + offset)
                for step, value, wall_time in logged
                if _counts(tag, step, end)
            )
        for tag, found in session.histograms.items():
            if kept := [histogram for histogram in found if _counts(tag, histogram.step, end)]:
                histograms[tag] = kept[-1]
    return {tag: Series.of(*zip(*logged, strict=True)) for tag, logged in points.items() if logged}, histograms


def _counts(tag: str, step: int, end: float) -> bool:
    """Tell whether a step was not undone; callbacks log at the number of steps done, one further on."""
    return step < end or (step == end and tag.startswith(("ast/", "energy/")))


def _trained(session: Session, steps: Sequence[int]) -> bool:
    """Tell whether it trained: a test or a validation alone logs once, and no training loss."""
    return len(set(steps)) > 1 or any("train" in tag or tag.startswith("ast/") for tag in session.scalars)


def _times(session: Session) -> tuple[float, list[int], list[float]]:
    """List the steps at which Lightning logged: it adds the epoch to all but what a logger writes when it is made."""
    epochs = session.scalars.get("epoch", [])
    return session.began, [point.step for point in epochs], [point.wall_time for point in epochs]
