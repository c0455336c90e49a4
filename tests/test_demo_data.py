from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_ast.demo.data import DEBIAN_FASHION_MNIST, ImageData, _shifted, load_images
from lightning_ast.errors import DataNotFoundError


def test_digits_are_real_and_split_once() -> None:
    images = load_images("digits")
    assert images.train_images.shape == (1437, 1, 8, 8)
    assert images.test_images.shape == (360, 1, 8, 8)
    assert images.train_images.dtype == torch.uint8
    assert images.train_images.max() == 255
    assert torch.equal(images.train_labels, load_images("digits").train_labels)


def write_idx(folder: Path, packed: bool) -> None:
    for prefix, count in (("train", 5), ("t10k", 3)):
        pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
        for name, raw in (
            (f"{prefix}-images-idx3-ubyte", b"\0" * 16 + pixels.tobytes()),
            (f"{prefix}-labels-idx1-ubyte", b"\0" * 8 + bytes(range(count))),
        ):
            (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_from_idx_files(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, packed)
    images = load_images("fashion_mnist", tmp_path)
    assert images.train_images.shape == (5, 1, 28, 28)
    assert images.train_images[0, 0, 0, :3].tolist() == [0, 1, 2]
    assert images.test_labels.tolist() == [0, 1, 2]


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debian(tmp_path: Path) -> None:
    images = load_images("fashion_mnist", tmp_path)
    assert len(images.train_labels) == 60_000
    assert images.train_labels.bincount().tolist() == [6000] * 10


def test_cifar10_from_npz(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x=x, y=np.arange(4, dtype=np.uint8), xt=x[:2], yt=np.arange(2, dtype=np.uint8))
    for root in (tmp_path, tmp_path / "cifar10.npz"):
        images = load_images("cifar10", root)
        assert torch.equal(images.train_images, torch.from_numpy(x).permute(0, 3, 1, 2))
        assert images.train_labels.tolist() == [0, 1, 2, 3]
    np.savez(tmp_path / "half.npz", x=x)
    with pytest.raises(DataNotFoundError, match="without xt, y, yt"):
        load_images("cifar10", tmp_path / "half.npz")


@pytest.mark.parametrize(("data", "class_name"), [("cifar10", "CIFAR10"), ("fashion_mnist", "FashionMNIST")])
def test_a_failed_download_names_the_choices(
    tmp_path: Path, data: str, class_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(f"torchvision.datasets.{class_name}", fail)
    monkeypatch.setattr("lightning_ast.demo.data.DEBIAN_FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(DataNotFoundError, match=r"no route to host(.|\n)*--root FOLDER(.|\n)*--data digits"):
        load_images(data, tmp_path)


def test_download_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert download
            self.data = np.full((3 if train else 2, 32, 32, 3), 7, np.uint8)
            self.targets = [0] * len(self.data)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    images = load_images("cifar10", tmp_path)
    assert images.train_images.shape == (3, 3, 32, 32)
    assert images.test_labels.tolist() == [0, 0]


def test_augmentation_shifts_each_image_by_itself() -> None:
    torch.manual_seed(0)
    image = torch.arange(64.0).view(1, 1, 8, 8).repeat(50, 1, 1, 1)
    shifted = _shifted(image, 1)
    padded = torch.nn.functional.pad(image[:1], (1,) * 4, mode="reflect")[0, 0]
    windows = [padded[dy : dy + 8, dx : dx + 8] for dy in range(3) for dx in range(3)]
    hits = [next(i for i, w in enumerate(windows) if torch.equal(w, s[0])) for s in shifted]
    assert len(set(hits)) == 9, "all nine shifts occur, and nothing else"


def test_train_limit_and_normalisation() -> None:
    data = ImageData("digits", batch_size=10, train_limit=100)
    data.setup("fit")
    assert len(data.train_dataloader()) == 10
    x, _ = data.on_after_batch_transfer((data.images.train_images, data.images.train_labels), 0)
    assert abs(float(x.mean())) < 1e-4
    assert float(x.std()) == pytest.approx(1.0, abs=1e-3)
