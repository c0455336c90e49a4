"""Read an event file that Lightning's TensorBoardLogger writes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lightning_ast.errors import ReportError
from lightning_ast.report.files import UnreadableError, reading
from lightning_ast.report.series import Histogram, is_point, tame
from lightning_ast.words import counted

__all__ = ["Point", "Session", "read_session"]

# TensorBoard's own EventAccumulator checks and keeps every picture too, stops at the first damaged record without a
# word, and fails on a record that holds no event. The messages and their checksum are TensorBoard's here too.

_MOST_RECORD_BYTES = 2**28
_MOST_SECONDS = 1e11  # of a wall time: the year 5138


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


def read_session(path: Path) -> tuple[Session | None, str | None]:
    """Return what an event file holds, None if there is no event in it; and what was left out as damaged, or None."""
    try:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    except ModuleNotFoundError as error:
        raise ReportError(
            f"event files need TensorBoard to be read ({error}): pip install 'lightning-ast[report]'."
        ) from error
    from google.protobuf.message import DecodeError

    session: Session | None = None
    end = lost = 0
    with reading(path) as (file, size):
        for at, data, checksum in _records(file, size, masked_crc32c):
            end = at
            try:
                event = event_pb2.Event.FromString(data)
            except DecodeError:
                lost += 1
                continue
            values = [value for value in event.summary.value if value.WhichOneof("value") in ("simple_value", "histo")]
            if not 0 <= event.wall_time <= _MOST_SECONDS or (values and masked_crc32c(data) != checksum):
                lost += 1
                continue
            session = session or Session(event.wall_time)
            lost += sum(not _add(session, event, value) for value in values)
    if session is None and size:
        raise UnreadableError("holds no event that can be read")
    rest = [f"what follows byte {end:,} of {size:,}, cut off or damaged"] if end < size else []
    damaged = [f"{counted(lost, 'record')} of it, damaged"] if lost else []
    return session, " and ".join([*damaged, *rest]) or None


def _records(file: BinaryIO, size: int, checksum_of: Callable[[bytes], int]) -> Iterator[tuple[int, bytes, int]]:
    """Yield of each record where it ends, its data, and their checksum; end at a damaged length, or a size in bytes."""
    # A record is its length and that length's checksum, then the data and their checksum. `checksum_of` is slow: that
    # of the data is left to the caller, who needs few of them. Behind a damaged length no record can be found any more.
    at = 0
    while at + 16 <= size:
        head = file.read(12)
        if len(head) < 12:
            return
        length, checksum = struct.unpack("<QI", head)
        if checksum_of(head[:8]) != checksum or length > min(_MOST_RECORD_BYTES, size - at - 16):
            return
        data = file.read(length)
        tail = file.read(4)
        if len(tail) < 4:
            return
        at += 16 + length
        yield at, data, struct.unpack("<I", tail)[0]


def _add(session: Session, event: Any, value: Any) -> bool:
    """Keep a scalar or a histogram; return False for a value that is damaged."""
    if not is_point("step", event.step):
        return False
    if value.HasField("simple_value"):
        point = Point(event.step, value.simple_value, event.wall_time)
        if is_point(value.tag, point.value):
            session.scalars.setdefault(value.tag, []).append(point)
            return True
        return False
    histogram = _histogram(event.step, value.histo)
    if histogram is not None:
        session.histograms.setdefault(value.tag, []).append(histogram)
    return histogram is not None


def _histogram(step: int, value: Any) -> Histogram | None:
    """Convert a histogram of TensorBoard, which stores right edges, the outermost of them beyond the values."""
    counts = np.asarray(value.bucket, dtype=np.float64)
    limits = np.asarray([value.min, *value.bucket_limit, value.max], dtype=np.float64)
    if not len(counts) or len(counts) != len(value.bucket_limit) or not np.all(counts >= 0):
        return None
    edges = np.clip(limits[:-1], value.min, value.max)
    usable = np.isfinite(tame(edges)).all() and np.isfinite(tame(counts.sum()))
    return Histogram(step, edges, counts) if usable and np.all(np.diff(edges) >= 0) else None
