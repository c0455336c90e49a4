"""Read the event files that Lightning's TensorBoardLogger writes, one for each process of a run, and join them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_ast.errors import ReportError
from lightning_ast.report.series import Histogram, Series

__all__ = ["Point", "Session", "join_sessions", "read_session", "session_offsets", "undone_from"]


class Point(NamedTuple):
    """A scalar as it was logged."""

    step: int
    value: float
    wall_time: float


@dataclass(frozen=True)
class Session:
    """The scalars and histograms that one process wrote, by tag, in the order in which they were logged."""

    began: float  # the wall time of its first event, in seconds
    scalars: dict[str, list[Point]] = field(default_factory=dict)
    histograms: dict[str, list[Histogram]] = field(default_factory=dict)

    @property
    def epochs(self) -> list[Point]:
        """List the points at which Lightning logged: it adds the epoch to all but what a new logger writes."""
        return self.scalars.get("epoch", [])

    @property
    def first_trained_step(self) -> float:
        """Return the first logged step; infinite for a test or a validation alone, which undoes no training."""
        steps = {point.step for point in self.epochs}
        # they log once, and no training loss
        trained = len(steps) > 1 or any("train" in tag or tag.startswith("ast/") for tag in self.scalars)
        return float(min(steps)) if steps and trained else math.inf


def read_session(path: Path, left_out: list[str]) -> Session:
    """Read an event file up to where it ends, or is cut off or damaged, which adds a line to ``left_out``."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
    except ModuleNotFoundError as error:
        raise ReportError(
            f"event files need TensorBoard to be read ({error}): pip install 'lightning-ast[report]'."
        ) from error
    path.open("rb").close()  # raises an OSError where it cannot be read; TensorBoard has errors of its own
    reader = PyRecordReader_New(str(path))
    session: Session | None = None
    try:
        while True:
            reader.GetNext()
            event = Event.FromString(reader.record())
            session = session or Session(event.wall_time)
            for value in event.summary.value:
                _add(session, event.step, event.wall_time, value)
    except OutOfRangeError:
        pass
    except DataLossError:
        if session is not None:
            left_out.append(f"{path}: the rest of it, cut off or damaged")
    if session is None:
        raise ValueError("it holds no event")
    return session


def _add(session: Session, step: int, wall_time: float, value: Any) -> None:
    """Keep a value that is a scalar or a histogram."""
    if value.HasField("simple_value"):
        session.scalars.setdefault(value.tag, []).append(Point(step, value.simple_value, wall_time))
    elif value.HasField("histo"):
        # TensorBoard stores right edges, the outermost of them beyond the values
        logged = value.histo
        edges = np.clip([logged.min, *logged.bucket_limit], logged.min, logged.max)
        histogram = Histogram(step, edges, np.asarray(logged.bucket, dtype=np.float64))
        session.histograms.setdefault(value.tag, []).append(histogram)


def session_offsets(sessions: Sequence[Session]) -> list[float]:
    """Find where the clock stands (seconds) as each process of a resumed run begins, less breaks and undone steps."""
    offsets = [0.0]
    for session, later in pairwise(sessions):
        first = min((point.step for point in later.epochs), default=math.inf)
        kept = [point.wall_time for point in session.epochs if point.step < first]
        offsets.append(offsets[-1] + (max(kept) - session.began if kept else 0.0))
    return offsets


def undone_from(sessions: Sequence[Session]) -> list[float]:
    """Find the step from which on the points of each process of a resumed run were undone by a later one, or inf."""
    # the earliest step of any later process: a second resume may go further back than the first
    firsts = [session.first_trained_step for session in sessions]
    return [min(firsts[i + 1 :], default=math.inf) for i in range(len(firsts))]


def join_sessions(sessions: Sequence[Session]) -> tuple[dict[str, Series], dict[str, Histogram]]:
    """Join what the processes of a run wrote: its series, and the last histogram of each tag."""
    sessions = sorted((s for s in sessions if s.scalars or s.histograms), key=lambda session: session.began)
    points: dict[str, list[Point]] = {}
    histograms: dict[str, Histogram] = {}
    for session, offset, end in zip(sessions, session_offsets(sessions), undone_from(sessions), strict=False):
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
