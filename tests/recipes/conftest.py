"""Real images in folders, as the set-ups for ImageNet read them, and the scripts of the recipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lightning_ast.demo.data import load_images

ROOT = Path(__file__).parent.parent.parent
CIFAR10 = Path(os.environ.get("CIFAR10", "data/cifar10.npz"))


@pytest.fixture(scope="session")
def recipe() -> Callable[[str], ModuleType]:
    """Import the script of a recipe by its path below ``examples``, as the benchmark of recipes does."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from recipes import load_recipe
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    loaded: Callable[[str], ModuleType] = load_recipe
    return loaded


@pytest.fixture(scope="session")
def folders(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 40 validation images of 64 pixels in ten classes: CIFAR-10 where it is there, else digits."""
    out = tmp_path_factory.mktemp("folders")
    data: Any = ("cifar10", CIFAR10) if CIFAR10.is_file() else ("digits", "data")
    recipe("original/folders").write(*data, out, train=64, val=40)
    return out


@pytest.fixture(scope="session")
def tiny_cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the form of ``cifar10.npz`` with real digits in it, 128 for training and 64 for test."""
    images = load_images("digits")
    path = tmp_path_factory.mktemp("cifar10") / "cifar10.npz"

    def coloured(part: Any) -> Any:
        return np.repeat(part.permute(0, 2, 3, 1).numpy(), 4, 1).repeat(4, 2).repeat(3, 3)

    np.savez(
        path,
        x=coloured(images.train_images[:128]),
        y=images.train_labels[:128].numpy(),
        xt=coloured(images.test_images[:64]),
        yt=images.test_labels[:64].numpy(),
    )
    return path
