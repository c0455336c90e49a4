"""The data of the regime map: images in memory with redundancy, imbalance and wrong labels, and an ordinary loader.

A batch is `(images, labels, indices)` in training and `(images, labels)` in validation: the indices tell mode `prune`
and the rules of others which samples a batch holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl
import torch
from regime_run import Regime
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ast.demo.data import Images, _shifted, load_images

__all__ = ["Choice", "Chooser", "RegimeData", "TrainingSet", "imbalanced", "training_set", "wrong_labels"]


class Choice(NamedTuple):
    """The samples of one epoch, as a rule chooses them.

    Attributes:
        indices: ``(k,)`` dataset indices in the order of loading.
        weights: ``(N,)`` factors of the losses of all samples of the data set, or None where all are 1.
        batch_size: The samples of a batch, or None for those of a dense one.
    """

    indices: Tensor
    weights: Tensor | None = None
    batch_size: int | None = None


class Chooser(Protocol):
    """A rule that chooses the samples of an epoch before it begins."""

    def choose(self, epoch: int) -> Choice:
        """Return the samples of an epoch, counted from 0."""

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Remember the losses ``(B,)`` of the samples that were trained on."""


@dataclass(frozen=True)
class TrainingSet:
    """The training data of a regime.

    Attributes:
        images: ``(n, C, H, W)`` uint8, each different image once.
        labels: ``(n,)`` int64, the wrong ones included.
        wrong: ``(n,)`` bool: True where the label is wrong.
        redundancy: How often each image is in the data set: sample ``i`` shows image ``i % n``.
    """

    images: Tensor
    labels: Tensor
    wrong: Tensor
    redundancy: int = 1

    def __len__(self) -> int:
        return self.redundancy * len(self.labels)


def imbalanced(labels: Tensor, images: int, imbalance: float) -> Tensor:
    """Choose the first images of each class so that the frequencies of the classes fall geometrically.

    Args:
        labels: ``(N,)`` labels of all images.
        images: The number of images to choose; fewer are chosen where a class has not enough.
        imbalance: The images of the first class to those of the last, at least 1.

    Returns:
        ``(n,)`` positions in ascending order.
    """
    if imbalance == 1:
        return torch.arange(min(images, len(labels)))
    classes = int(labels.max()) + 1
    shares = imbalance ** (-torch.arange(classes) / (classes - 1))
    counts = (images * shares / shares.sum()).round().long().clamp(min=1)
    rows = [(labels == label).nonzero().squeeze(1)[: int(count)] for label, count in enumerate(counts)]
    return torch.cat(rows).sort().values


def wrong_labels(labels: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Replace a share of the labels by one of the other classes, chosen at random.

    Args:
        labels: ``(n,)`` true labels.
        noise: The share to replace, in [0, 1).
        seed: The seed of the choice.

    Returns:
        ``(n,)`` labels, and ``(n,)`` bool: which are wrong.
    """
    generator = torch.Generator().manual_seed(1_000 + seed)
    classes = int(labels.max()) + 1
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]] = True
    others = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    return torch.where(wrong, others, labels), wrong


def training_set(loaded: Images, regime: Regime, seed: int) -> TrainingSet:
    """Make the training data of a regime from all images of its data set."""
    rows = imbalanced(loaded.train_labels, regime.images, regime.imbalance)
    if len(rows) < regime.images and regime.imbalance == 1:
        raise ValueError(f"expected at most {len(rows)} images of {regime.data}, got images={regime.images}.")
    labels, wrong = wrong_labels(loaded.train_labels[rows], regime.noise, seed)
    return TrainingSet(loaded.train_images[rows], labels, wrong, regime.redundancy)


class _Training(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Whole batches by index, so that no Python runs for each sample."""

    def __init__(self, data: TrainingSet, device: torch.device) -> None:
        self._data = data
        self._images = data.images.to(device)
        self._labels = data.labels.to(device)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, indices = self.__getitems__([index])
        return images[0], labels[0], indices[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        samples = torch.tensor(indices)
        rows = samples % len(self._data.labels)
        return self._images[rows], self._labels[rows], samples


class _Test(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index], self._labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self._images[rows], self._labels[rows]


class RegimeData(pl.LightningDataModule):
    """The loaders of one run; pixels are normalised and augmented on the device, a batch at a time.

    The validation set is the test set: these runs compare methods at fixed settings and select nothing by it.

    Args:
        regime: The place on the map.
        seed: The seed of the run, for wrong labels.
        root: Where the images are looked for; see :func:`lightning_ast.demo.load_images`.
        test_images: The test images to take, the first ones; None takes all.

    Attributes:
        chooser: The rule that chooses the samples of each epoch (the Trainer must then reload the loaders every epoch);
            None draws all.
        weights: ``(N,)`` the factors of the losses that the rule gave in the running epoch, or None.
    """

    def __init__(self, regime: Regime, seed: int, root: str, *, test_images: int | None = None) -> None:
        super().__init__()
        self.regime = regime
        self.chooser: Chooser | None = None
        self.weights: Tensor | None = None
        loaded = load_images(regime.data, root)
        self.training = training_set(loaded, regime, seed)
        self._dataset: _Training | None = None
        self.test = _Test(loaded.test_images[:test_images], loaded.test_labels[:test_images])
        pixels = self.training.images.float() / 255
        self._mean = pixels.mean((0, 2, 3)).view(1, -1, 1, 1)
        self._std = pixels.std((0, 2, 3)).view(1, -1, 1, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Return channels and pixels a side of an image."""
        return self.training.images.shape[1], self.training.images.shape[2]

    @property
    def dense_batches(self) -> int:
        """Count the batches of a dense epoch; a last short one is dropped."""
        return len(self.training) // self.regime.batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        if self._dataset is None:
            self._dataset = _Training(self.training, self._device)
        dataset = self._dataset
        common: dict[str, Any] = {"collate_fn": tuple, "drop_last": True}
        if self.chooser is None:
            return DataLoader(dataset, batch_size=self.regime.batch_size, shuffle=True, **common)
        assert self.trainer is not None
        choice = self.chooser.choose(self.trainer.current_epoch)
        self.weights = choice.weights
        size = min(choice.batch_size or self.regime.batch_size, len(choice.indices))
        return DataLoader(dataset, batch_size=size, sampler=choice.indices.tolist(), **common)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, batch_size=1000, collate_fn=tuple)

    @property
    def _device(self) -> torch.device:
        """Return the device of the Trainer: the images lie there, so that no run waits for copies."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        images, labels, *indices = batch  # whoever asks for the indices is on the host, and must not wait
        return images.to(device), labels.to(device), *indices

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, *rest = batch
        augment = self.trainer is not None and self.trainer.training
        return self.pixels(images, augment=augment), *rest

    def pixels(self, images: Tensor, *, augment: bool) -> Tensor:
        """Normalise a batch of uint8 images; where asked, shift each at random and flip half of the photographs."""
        self._mean = self._mean.to(images.device)
        self._std = self._std.to(images.device)
        pixels = (images.float() / 255 - self._mean) / self._std
        if augment:
            pixels = _shifted(pixels, 1 if self.regime.data == "digits" else 4 if self.regime.data == "cifar10" else 2)
            if self.regime.data == "cifar10":
                flip = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
                pixels = torch.where(flip, pixels.flip(3), pixels)
        return pixels.contiguous(memory_format=torch.channels_last)
