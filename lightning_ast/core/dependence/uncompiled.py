"""Compiled functions run uncompiled while a sample is followed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["uncompiled"]

_lock = threading.Lock()
_inside: list[None] = []  # one element for each that is inside
_restored_at_last = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run functions of ``torch.compile`` uncompiled.

    Torch does not compile under a dispatch mode, and with ``fullgraph=True`` it raises an error instead. Torch has one
    stance for all threads: the first to come sets it and the last to go restores it, so that fits in several threads
    may be inside at once.
    """
    with _lock:
        # Importing torch._dynamo takes seconds, and without it nothing is compiled.
        if not _inside and "torch._dynamo" in sys.modules:
            _restored_at_last.enter_context(torch.compiler.set_stance("force_eager"))
        _inside.append(None)
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                _restored_at_last.close()
