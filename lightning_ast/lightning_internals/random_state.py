"""The states of random generators: read, and restored."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

__all__ = ["OtherGenerator", "kept_host_state", "kept_random_state", "random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """Return the state of this process's global generators (torch, numpy, Python) in primitives and tensors."""
    # A checkpoint may be read with weights_only=True, which refuses numpy's arrays.
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.tensor(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(internal), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))


class OtherGenerator:
    """A generator of Python or numpy, with the methods of a ``torch.Generator``."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    @staticmethod
    def wraps(value: object) -> bool:
        """Tell whether something is such a generator."""
        return isinstance(value, (random.Random, np.random.Generator, np.random.RandomState))

    def get_state(self) -> Tensor:
        """Return the state as the bytes of a text."""
        # A checkpoint may be read with weights_only=True, which refuses numpy's arrays and large numbers.
        own = self.generator
        if isinstance(own, random.Random):
            state: Any = own.getstate()
        elif isinstance(own, np.random.RandomState):
            state = own.get_state(legacy=False)
        else:
            state = own.bit_generator.state
        return torch.frombuffer(
            bytearray(json.dumps(state, default=lambda array: array.tolist()), "utf8"), dtype=torch.uint8
        )

    def set_state(self, state: Tensor) -> None:
        """Put the generator where :meth:`get_state` found it."""
        found = json.loads(state.numpy().tobytes())
        if isinstance(self.generator, random.Random):
            version, internal, gauss = found
            self.generator.setstate((version, tuple(internal), gauss))
        elif isinstance(self.generator, np.random.RandomState):
            self.generator.set_state(found)
        else:
            self.generator.bit_generator.state = found


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the global generators back at the end, also where the block fails, which ``isolate_rng`` alone does not."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:  # left by hand: it has no `finally` of its own, so that an error would keep it from restoring
        isolation.__exit__(None, None, None)


@contextmanager
def kept_host_state() -> Iterator[None]:
    """Put Python's and NumPy's global generators back at the end; torch's are left alone."""
    python = random.getstate()
    arrays = np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
