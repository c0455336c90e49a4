"""Where the seconds of an epoch go: loading, scoring, forward and backward. Nothing is waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch

__all__ = ["Clock", "CudaClock", "HostClock", "Section", "StepSections", "clock_of"]

Section = Literal["loading", "scoring", "forward_backward"]


class Clock(Protocol):
    """Marks moments, and tells later how far apart they were."""

    def mark(self) -> Any:
        """This moment."""

    def seconds(self, start: Any, end: Any) -> float | None:
        """From one mark to a later one; None where that is not known yet."""

    def wait(self) -> None:
        """Until every mark is known."""


class HostClock:
    """Wall time of this process."""

    def mark(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Their difference."""
        return end - start

    def wait(self) -> None:
        """Nothing is under way."""


class CudaClock:
    """Time of the device: a mark is an event in its stream, reached when what was enqueued before it is done.

    Loading is then what the device waited for, not what went on beside it.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """An event, recorded."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        """Between two events, once the device has reached them."""
        return start.elapsed_time(end) / 1e3 if end.query() else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until the device has done what it was given."""
        torch.cuda.synchronize(self._device)


def clock_of(device: torch.device) -> Clock:
    """The clock for what runs on a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class StepSections:
    """Adds up the sections of training steps; what is in none of them is the caller's to name.

    Args:
        clock: see :class:`Clock`.

    Attributes:
        seconds: by section, since the last :meth:`take`; what the clock does not know yet is not in it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: dict[Section, float] = {}
        self._pending: deque[tuple[Section, Any, Any]] = deque()
        self._idle: Any = None
        self._start: Any = None
        self._ready: Any = None
        self._backward: Any = None

    def restart(self) -> None:
        """Training goes on now, after something else."""
        self._start = self._ready = self._backward = None
        self._idle = self._clock.mark()

    def start_batch(self) -> None:
        """A batch is on the device; scoring may have begun before this is called."""
        if self._start is None:
            self._start = self._ready = self._clock.mark()
            self._add("loading", self._idle, self._start)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Around a scoring forward."""
        self.start_batch()
        begin = self._clock.mark()
        yield
        self._ready = self._clock.mark()
        self._add("scoring", begin, self._ready)

    def finish_backward(self) -> None:
        """A backward is over; the last one of a batch counts."""
        self._backward = self._clock.mark()

    def finish_batch(self) -> None:
        """The step is over."""
        if self._start is not None and self._backward is not None:
            self._add("forward_backward", self._ready, self._backward)
        self._start = self._backward = None
        self._idle = self._clock.mark()
        self._collect()

    def take(self) -> dict[Section, float]:
        """The seconds so far, all of them; begins anew."""
        self.settle()
        taken, self.seconds = self.seconds, {}
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
            passed = self._clock.seconds(start, end)
            if passed is None:
                return
            self._pending.popleft()
            self.seconds[section] = self.seconds.get(section, 0.0) + passed
