"""The states of random generators: read, restored, and checked where they come from a checkpoint."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_ast.core import state as check
from lightning_ast.core.state import Check, Faults

__all__ = [
    "GENERATOR_STATE",
    "RANDOM_STATES",
    "OtherGenerator",
    "kept_host_state",
    "kept_random_state",
    "one_for_each",
    "random_state",
    "restore_random_state",
]


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
    """A generator of Python or numpy, with the methods of a ``torch.Generator``.

    Args:
        generator: A ``random.Random``, ``numpy.random.Generator`` or ``numpy.random.RandomState``.
    """

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


def _accepted(restore: Callable[..., object], *states: object) -> bool:
    """Tell whether a generator can be set to the state; the generator must be one that nobody else uses."""
    try:
        restore(*states)
    except (RuntimeError, TypeError, ValueError, OverflowError, KeyError):
        return False
    return True


def _bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1 and value.device.type == "cpu"


def _is_cuda_state(value: Any) -> bool:
    return _bytes(value) and (not torch.cuda.is_available() or _accepted(torch.Generator("cuda").set_state, value))


def _is_generator_state(value: Any) -> bool:
    if not _bytes(value) or _accepted(torch.Generator().set_state, value):
        return _bytes(value)
    kinds = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
    others = [random.Random(), np.random.RandomState(), *(np.random.Generator(getattr(np.random, k)()) for k in kinds)]
    return any(_accepted(OtherGenerator(generator).set_state, value) for generator in others)


GENERATOR_STATE = Check("the state of a random generator", _is_generator_state)
_cuda_state = Check("the state of a CUDA generator", _is_cuda_state)
_words = functools.partial(
    check.tensor, torch.int64, values="values in [0, 2**32)", allowed=lambda v: (v >= 0) & (v < 2**32)
)
_NUMPY = check.positional(
    check.choice("MT19937"), _words(shape=(624,)), check.whole(0, 624), check.whole(0, 1), check.number()
)
_PYTHON = check.positional(
    check.choice(random.Random().getstate()[0]), _words(shape=(625,)), check.maybe(check.number())
)


def _takes_numpy(state: dict[str, Any]) -> Faults:
    """Try numpy's and Python's states on generators of our own."""
    # Parts of the right types and sizes may still be refused, as an index behind the end of the state.
    name, keys, *rest = state["numpy"]
    if not _accepted(np.random.RandomState(0).set_state, (name, keys.numpy().astype(np.uint32), *rest)):
        yield "numpy", "the state of numpy's generator", state["numpy"]
    version, internal, gauss = state["python"]
    if not _accepted(random.Random(0).setstate, (version, tuple(internal.tolist()), gauss)):
        yield "python", "the state of Python's generator", state["python"]


RANDOM_STATES = check.listing(
    check.record(
        {"torch": GENERATOR_STATE, "cuda": check.maybe(_cuda_state), "numpy": _NUMPY, "python": _PYTHON},
        None,
        _takes_numpy,
    ),
    least=1,
)


def one_for_each(states: list[Any], processes: int) -> Faults:
    """Check that each process has a state; one that failed wrote its own alone."""
    if len(states) not in (1, processes):
        yield "random", f"1 state or {processes}, one for each process", states
