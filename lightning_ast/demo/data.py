"""Real images in memory: scikit-learn's digits, Fashion-MNIST, CIFAR-10."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.errors import DataNotFoundError, MissingPackageError
from lightning_ast.extras import needs

__all__ = ["DataName", "ImageData", "Images", "load_images"]

DataName = Literal["digits", "fashion_mnist", "cifar10"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Images(NamedTuple):
    """A data set in memory: uint8 images ``(N, C, H, W)`` and int64 labels ``(N,)``, for training and for test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_images(data: DataName, root: str | Path = "data") -> Images:
    """Load the images of a whole data set from where they lie, or download them.

    ``digits`` is part of scikit-learn's package: 1,437 training and 360 test images of 8 x 8 pixels.
    ``fashion_mnist`` is read from IDX files (plain or ``.gz``) under ``root`` or Debian's ``dataset-fashion-mnist``,
    ``cifar10`` from ``root`` or ``root/cifar10.npz`` (arrays ``x, y, xt, yt``: uint8 images NHWC and labels) or from
    torchvision's files under ``root``; else torchvision downloads them.

    Args:
        data: The name of the data set.
        root: The folder (or ``.npz`` file) to look in and to download to.

    Raises:
        DataNotFoundError: Nothing was found and the download failed.
        MissingPackageError: ``digits`` needs scikit-learn.
    """
    load = {"digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10}[data]
    return load(Path(root).expanduser())


def _digits(root: Path) -> Images:
    with needs("vision", "sklearn"):
        from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.from_numpy((bunch.images * 15.9375).astype(np.uint8)).unsqueeze(1)  # 0..16 to 0..255
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = order[:360]
    train = order[360:]
    return Images(images[train], labels[train], images[test], labels[test])


def _fashion_mnist(root: Path) -> Images:
    for folder in (root, root / "fashion-mnist", root / "FashionMNIST" / "raw", DEBIAN_FASHION_MNIST):
        if _idx_path(folder, "train-images-idx3-ubyte") is not None:
            return _idx_images(folder)

    choices = (
        f"put its IDX files (train-images-idx3-ubyte[.gz] and the other three) into {root}",
        "on Debian or Ubuntu: apt-get install dataset-fashion-mnist",
        "pass --root FOLDER with such files in it",
    )
    with _downloading("Fashion-MNIST", choices):
        with needs("vision", "torchvision"):
            from torchvision.datasets import FashionMNIST

        FashionMNIST(str(root), download=True)
        return _idx_images(root / "FashionMNIST" / "raw")


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _idx_images(folder: Path) -> Images:
    def read(name: str, header_bytes: int) -> Tensor:
        path = _idx_path(folder, name)
        if path is None:
            raise DataNotFoundError(f"{folder} holds some of Fashion-MNIST's IDX files, but no {name}[.gz].")
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header_bytes).copy())

    def pair(prefix: str) -> tuple[Tensor, Tensor]:
        images = read(f"{prefix}-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
        return images, read(f"{prefix}-labels-idx1-ubyte", 8).long()

    return Images(*pair("train"), *pair("t10k"))


def _cifar10(root: Path) -> Images:
    for path in (root, root / "cifar10.npz"):
        if path.suffix == ".npz" and path.is_file():
            return _npz_images(path)

    choices = (
        f"put a prepared cifar10.npz (arrays x, y, xt, yt: uint8 images NHWC and labels) into {root}",
        f"put torchvision's cifar-10-batches-py into {root}",
        "pass --root FILE.npz, or --root FOLDER with either of them in it",
    )
    with _downloading("CIFAR-10", choices):
        with needs("vision", "torchvision"):
            from torchvision.datasets import CIFAR10

        def pair(train: bool) -> tuple[Tensor, Tensor]:
            dataset = CIFAR10(str(root), train=train, download=True)
            return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)

        return Images(*pair(True), *pair(False))


def _npz_images(path: Path) -> Images:
    with np.load(path) as arrays:
        missing = {"x", "y", "xt", "yt"} - set(arrays.files)
        if missing:
            raise DataNotFoundError(f"{path}: expected arrays x, y, xt, yt, without {', '.join(sorted(missing))}.")
        x, xt = (torch.from_numpy(arrays[k]).permute(0, 3, 1, 2).contiguous() for k in ("x", "xt"))
        y, yt = (torch.from_numpy(arrays[k].astype(np.int64)) for k in ("y", "yt"))
    return Images(x, y, xt, yt)


@contextmanager
def _downloading(name: str, choices: Sequence[str]) -> Iterator[None]:
    """Tell what a person can do where a download fails."""
    try:
        yield
    except Exception as error:  # torchvision and urllib raise many kinds
        missing = isinstance(error, MissingPackageError)
        reason = str(error) if missing else f"the download failed ({type(error).__name__}: {error})"
        steps = "\n".join(f"  - {choice}" for choice in choices)
        raise DataNotFoundError(
            f"{name} was not found, and {reason}. Do one of these:\n{steps}\n"
            "  - or use `--data digits`, which comes with scikit-learn and needs no network"
        ) from error


class _InMemory(TensorDataset):
    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        # torch's loader asks this for a whole batch: no Python for each sample
        batch: tuple[Tensor, ...] = self[torch.tensor(indices)]
        return batch


class ImageData(pl.LightningDataModule):
    """A small image data set, normalised and augmented on the device, a batch at a time.

    The validation set is the test set: these runs compare methods at fixed settings and select nothing by it.

    Args:
        data: The data set, ``"digits"``, ``"fashion_mnist"`` or ``"cifar10"``.
        root: The folder where the images are looked for and downloaded to; see :func:`load_images`.
        batch_size: The training batch size; validation uses 1,000.
        augment: A random shift by up to 4 pixels (1 for digits) with reflection, and for photographs a random flip.
        train_limit: The number of training images to use, the first ones; None uses all.
        num_workers: The workers of the dataloaders; the images lie in memory, so 0 is fast.

    Raises:
        DataNotFoundError: The images are not there when they are set up; every way to provide them is named.
    """

    def __init__(
        self,
        data: DataName = "digits",
        root: str = "data",
        batch_size: int = 256,
        augment: bool = True,
        train_limit: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.data: DataName = data
        self.root = root
        self.batch_size = batch_size
        self.augment = augment
        self.train_limit = train_limit
        self.num_workers = num_workers
        self._images: Images | None = None

    def setup(self, stage: str) -> None:
        """Load the images, once."""
        if self._images is None:
            images = load_images(self.data, self.root)
            self._images = images._replace(
                train_images=images.train_images[: self.train_limit],
                train_labels=images.train_labels[: self.train_limit],
            )
            pixels = self._images.train_images.float() / 255
            self._mean = pixels.mean((0, 2, 3)).view(1, -1, 1, 1)
            self._std = pixels.std((0, 2, 3)).view(1, -1, 1, 1)

    @property
    def images(self) -> Images:
        """Return the loaded images."""
        if self._images is None:
            self.setup("fit")
        assert self._images is not None
        return self._images

    def _loader(self, images: Tensor, labels: Tensor, *, batch_size: int, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            _InMemory(images, labels),
            batch_size=batch_size,
            shuffle=shuffle,
            collate_fn=tuple,  # the data set gives whole batches
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Load training images, shuffled; the last short batch is dropped."""
        return self._loader(
            self.images.train_images, self.images.train_labels, batch_size=self.batch_size, shuffle=True
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Load the test set."""
        return self._loader(self.images.test_images, self.images.test_labels, batch_size=1000, shuffle=False)

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Normalise; augment while training."""
        images, labels = batch
        pixels = (images.float() / 255 - self._mean.to(images.device)) / self._std.to(images.device)
        if self.augment and self.trainer is not None and self.trainer.training:
            pixels = _shifted(pixels, 1 if self.data == "digits" else 4)
            if self.data == "cifar10":
                flip = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
                pixels = torch.where(flip, pixels.flip(3), pixels)
        return pixels, labels


def _shifted(images: Tensor, most: int) -> Tensor:
    """Shift each image by up to ``most`` pixels in both directions, the border reflected."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (most,) * 4, mode="reflect")
    dy, dx = torch.randint(0, 2 * most + 1, (2, count, 1), device=images.device)
    rows = (dy + torch.arange(height, device=images.device)).view(count, 1, height, 1)
    columns = (dx + torch.arange(width, device=images.device)).view(count, 1, 1, width)
    samples = torch.arange(count, device=images.device).view(count, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return padded[samples, channel, rows, columns]
