"""What every test has: real images, no compiled code and no environment of another test."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_ast.demo.data import load_images

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one test process on each core: threads of torch's own would get in each other's way
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


_LEVEL = logging.getLogger("lightning.pytorch").level


def pytest_collection_finish() -> None:
    """Take what the imports and the collection made out of the garbage collector's rounds: each is many times faster."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """512 real handwritten digits, ``(512, 1, 8, 8)`` in [0, 1], and their labels."""
    images = load_images("digits")
    return images.train_images[:512].float() / 255, images.train_labels[:512]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark as its command line does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """Else the tests share torch.compile's limit of recompilations, behind which it runs uncompiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _leave_no_mode() -> Iterator[None]:
    """Fail where a test leaves a dispatch mode or a stance of torch.compile behind: nothing compiles under them."""
    yield
    modes = [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()]
    assert modes == [], f"the test left these dispatch modes active: {modes}"
    if "torch._dynamo" in sys.modules:
        stance = sys.modules["torch._dynamo"].eval_frame._stance.stance
        assert stance == "default", f"the test left torch.compile in the stance {stance!r}"


@pytest.fixture(autouse=True)
def _restore_logging() -> None:
    """Else a benchmark, which silences Lightning, hides what a later test listens for."""
    logging.getLogger("lightning.pytorch").setLevel(_LEVEL)  # ahead of the test: fixtures of modules silence it too


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    """Else ``seed_everything`` of one test sets the order of the samples of a later one (Lightning's PL_GLOBAL_SEED)."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
