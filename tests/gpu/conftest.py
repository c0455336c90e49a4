"""The device of these tests: CUDA where there is one, else the CPU, where what they are made of is tried out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each test process starts one for each core
# cuBLAS looks at it once, at its first call: a later test that trains deterministically would come too late.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Drivers, cuDNN and Triton warn of what is no fault of these tests: it is shown. The rest is known from other tests.
WARNINGS = (
    "default",
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:You defined a .validation_step",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:lightning-ast",
    "ignore:Synchronization debug mode",
)


@pytest.hookimpl(tryfirst=True)  # ahead of pytest's own selection by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them; without CUDA they are slow tests."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings(*WARNINGS))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def cuda(device: str) -> str:
    """Skip what has no meaning on a CPU."""
    if device == "cpu":
        pytest.skip("needs CUDA")
    return device


@pytest.fixture(autouse=True)
def _leave_the_device_as_it_was() -> Iterator[None]:
    """No TF32 unless a test asks for it, and nothing deterministic after one that did; then torch's defaults."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
