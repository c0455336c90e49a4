"""Read the event files that Lightning's TensorBoardLogger writes, one for each process of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lightning_ast.errors import ReportError
from lightning_ast.report.series import Histogram, Points

__all__ = ["Events", "read_events"]


@dataclass(frozen=True)
class Events:
    """The scalars and the last histograms that one process wrote, by tag."""

    began: float  # the wall time of its first event, in seconds
    scalars: Points = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)


def read_events(path: Path, left_out: list[str]) -> Events:
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
    found: Events | None = None
    try:
        while True:
            reader.GetNext()
            event = Event.FromString(reader.record())
            found = found or Events(event.wall_time)
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
