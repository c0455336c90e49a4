"""The seconds of an epoch by section: loading, scoring, forward and backward. Nothing is waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

__all__ = ["Clock", "Section", "StepSections", "clock_of"]

Section = Literal["loading", "scoring", "forward_backward"]


class Clock:
    """A clock that marks moments, and tells later how far apart they were: here the wall time of this process."""

    def mark(self) -> Any:
        """Mark this moment."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float | None:
        """Return the time from one mark to a later one; None where it is not known yet."""
        passed: float = end - start
        return passed

    def wait(self) -> None:
        """Wait until every mark is known."""


class _CudaClock(Clock):
    """The time of a CUDA device: a mark is an event in its stream, reached when what was enqueued before it is done."""

    # Loading is then what the device waited for, not what went on beside it.

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return start.elapsed_time(end) / 1e3 if end.query() else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


def clock_of(device: torch.device) -> Clock:
    """Choose the clock for what runs on a device."""
    return _CudaClock(device) if device.type == "cuda" else Clock()


class StepSections:
    """The sections of training steps, added up; what is in none of them is the caller's to name."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: dict[Section, float] = {}  # without what the clock does not know yet
        self._pending: deque[tuple[Section, Any, Any]] = deque()
        self._idle: Any = None
        self._start: Any = None
        self._ready: Any = None
        self._backward: Any = None

    def restart(self) -> None:
        """Begin to load a batch now, after something else than training."""
        self._start = self._ready = self._backward = None
        self._idle = self._clock.mark()

    def start_batch(self) -> None:
        """Begin a step: its batch is on the device."""
        if self._start is None:  # a scoring forward may have begun it already
            self._start = self._ready = self._clock.mark()
            self._add("loading", self._idle, self._start)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Time the scoring forward inside."""
        self.start_batch()
        begin = self._clock.mark()
        yield
        self._ready = self._clock.mark()
        self._add("scoring", begin, self._ready)

    def finish_backward(self) -> None:
        """Mark the end of a backward: of several in a batch the last one counts."""
        self._backward = self._clock.mark()

    def finish_batch(self) -> None:
        """End the step, and begin to load the next batch."""
        if self._start is not None and self._backward is not None:
            self._add("forward_backward", self._ready, self._backward)
        self._start = self._backward = None
        self._idle = self._clock.mark()
        self._collect()

    def take(self) -> dict[Section, float]:
        """Return all seconds so far, and begin anew."""
        self.settle()
        taken = self.seconds
        self.seconds = {}
        return taken

    def settle(self) -> None:
        """Wait until all that was marked is in :attr:`seconds`."""
        self._clock.wait()
        self._collect()

    def _add(self, section: Section, start: Any, end: Any) -> None:
        if start is not None:
            self._pending.append((section, start, end))

    def _collect(self) -> None:
        while self._pending:
            section, start, end = self._pending[0]
            passed = self._clock.seconds(start, end)  # None: the device has not come so far, and is not waited for
            if passed is None:
                return
            self._pending.popleft()
            self.seconds[section] = self.seconds.get(section, 0.0) + passed
