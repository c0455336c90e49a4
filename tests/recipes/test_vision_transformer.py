"""The recipe of the vision transformer: it runs, tiny, and the kernels of attention that are here give one gradient."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lightning_ast.demo.data import Images
from tests.helpers.recipes import recipe


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (96, 3, 32, 32), generator=draw, dtype=torch.uint8)
    labels = torch.arange(96) % 10
    monkeypatch.setattr("lightning_ast.demo.data.load_images", lambda *_: Images(images, labels, images, labels))
    module = recipe("vision_transformer/vit", monkeypatch, runs={"epochs": 4})
    small = module.ViT(size=32, patch=8, width=16, layers=1, heads=2)
    monkeypatch.setattr(module, "ViT", lambda **_: small)
    data = module.ImageData
    monkeypatch.setattr(module, "ImageData", lambda *names, **options: data(*names, **{**options, "batch_size": 32}))
    return module


@pytest.mark.parametrize("method", ["dense", "shortened", "random", "partial", "ours"])
def test_every_method_runs(vit: ModuleType, method: str) -> None:
    figures = vit.train(method)
    assert figures["work"] == 1 if method == "dense" else 0 < figures["work"] < 1
    assert 0 <= figures["test_accuracy"] <= 1


def test_partial_has_the_gradients_of_mask_with_each_kernel_of_this_machine(vit: ModuleType) -> None:
    errors = vit.check_backends()
    assert set(errors) == {"flash", "efficient", "math"}
    here = {name: error for name, error in errors.items() if error is not None}
    assert "math" in here
    assert len(here) >= 2  # a CPU has the flash and the math kernel
    assert max(here.values()) < 1e-5
