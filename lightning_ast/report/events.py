"""Read an event file that Lightning's TensorBoardLogger writes."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lightning_ast.errors import ReportError
from lightning_ast.report.files import UnreadableError, reading
from lightning_ast.report.series import Histogram
from lightning_ast.words import counted

__all__ = ["Point", "Session", "read_session"]

# TensorBoard's own EventAccumulator checks and keeps every picture too, stops at the first damaged record without a
# word, and fails on a record that holds no event. The messages and their checksum are TensorBoard's here too.

_FRAME_BYTES = 16  # of a record, around its data


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
    with reading(path) as file:
        for data, checksum in _records(file, masked_crc32c):
            end += len(data) + _FRAME_BYTES
            try:
                event = event_pb2.Event.FromString(data)
            except DecodeError:
                lost += 1
                continue
            values = [value for value in event.summary.value if value.WhichOneof("value") in ("simple_value", "histo")]
            if (values or session is None) and masked_crc32c(data) != checksum:
                lost += 1
                continue
            session = session or Session(event.wall_time)
            for value in values:
                _add(session, event, value)
        size = file.seek(0, os.SEEK_END)
    if session is None and size:
        raise UnreadableError("holds no event that can be read")
    rest = [f"what follows byte {end:,} of {size:,}, cut off or damaged"] if end < size else []
    damaged = [f"{counted(lost, 'record')} of it, damaged"] if lost else []
    return session, " and ".join([*damaged, *rest]) or None


def _records(file: BinaryIO, checksum_of: Callable[[bytes], int]) -> Iterator[tuple[bytes, int]]:
    """Yield the data of each record and their checksum; end where the file is cut off, or a length is damaged."""
    # A record is its length and that length's checksum, then the data and their checksum. `checksum_of` is slow: that
    # of the data is left to the caller, who needs few of them. Behind a damaged length no record can be found any more.
    while len(head := file.read(12)) == 12:
        length, checksum = struct.unpack("<QI", head)
        if checksum_of(head[:8]) != checksum:
            return
        data = file.read(length)
        tail = file.read(4)
        if len(tail) < 4:
            return
        yield data, struct.unpack("<I", tail)[0]


def _add(session: Session, event: Any, value: Any) -> None:
    """Keep a scalar or a histogram."""
    if value.HasField("simple_value"):
        session.scalars.setdefault(value.tag, []).append(Point(event.step, value.simple_value, event.wall_time))
        return
    # TensorBoard stores right edges, the outermost of them beyond the values
    logged = value.histo
    edges = np.clip([logged.min, *logged.bucket_limit], logged.min, logged.max)
    histogram = Histogram(event.step, edges, np.asarray(logged.bucket, dtype=np.float64))
    session.histograms.setdefault(value.tag, []).append(histogram)
