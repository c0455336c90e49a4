"""Images in folders, one for each class, as ImageNet and most data sets of one's own lie on a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_ast.errors import DataNotFoundError
from lightning_ast.extras import needs

with needs("vision", "torchvision"):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

__all__ = ["ImageFolderDataModule"]

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_CROPPED = 256 / 224
"""Of ImageNet's usual validation: the shorter side is resized to 256 pixels, and 224 are cut out of its middle."""


class ImageFolderDataModule(pl.LightningDataModule):
    """Loads ``root/train/<class>/<image>`` and ``root/val/<class>/<image>``, with ImageNet's usual transforms.

    Training images are random crops of random size, resized and flipped; validation images are resized and cut out of
    the middle. Both are normalised with the mean and the deviation of ImageNet, which pretrained weights expect.

    Args:
        root: The folder that holds ``train`` and ``val``.
        image_size: The pixels of a side, as the network gets them.
        batch_size: The batch size, of training and of validation.
        num_workers: The processes that load images; 0 loads them in the training process.
        prefetch_factor: The batches that each worker prepares ahead; unused where there are no workers.
        smallest_crop: The least share of an image that a training crop holds, in (0, 1]. ImageNet's is 0.08.

    Attributes:
        classes: The names of the classes, those of the folders, in the order of their labels; known after ``setup``.

    Raises:
        DataNotFoundError: A folder is missing, the two hold different classes, or there are fewer training images than
            one batch has; the message shows what is expected.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 8,
        prefetch_factor: int = 2,
        smallest_crop: float = 0.08,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.root = root
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.smallest_crop = smallest_crop
        self.classes: list[str] = []

    def setup(self, stage: str) -> None:
        """Find the images, once."""
        if self.classes:
            return
        last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
        crop = v2.RandomResizedCrop(self.image_size, scale=(self.smallest_crop, 1.0))
        whole = [v2.Resize(round(self.image_size * _CROPPED)), v2.CenterCrop(self.image_size)]
        self._train = self._folder("train", v2.Compose([crop, v2.RandomHorizontalFlip(), *last]))
        self._val = self._folder("val", v2.Compose([*whole, *last]))
        if self._train.classes != self._val.classes:
            only = sorted(set(self._train.classes) ^ set(self._val.classes))
            raise DataNotFoundError(f"expected the same classes in {self.root}/train and /val; only in one: {only[:5]}")
        if len(self._train) < self.batch_size:
            raise DataNotFoundError(
                f"expected at least one batch of {self.batch_size} training images in {self.root}/train, got "
                f"{len(self._train)}: pass a smaller --data.init_args.batch_size."
            )
        self.classes = self._train.classes

    def _folder(self, part: str, transform: Any) -> Any:
        folder = Path(self.root).expanduser() / part
        try:
            return ImageFolder(str(folder), transform)
        except FileNotFoundError as error:  # the folder, its classes or their images
            raise DataNotFoundError(
                f"expected images in {folder}/<class>/, one folder for each class: {error}. Give the folder that holds "
                "train/ and val/ as --data.init_args.root FOLDER."
            ) from error

    def _loader(self, images: Any, *, training: bool) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=training,
            drop_last=training,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Load training images, shuffled; the last short batch is dropped."""
        return self._loader(self._train, training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Load validation images."""
        return self._loader(self._val, training=False)

    test_dataloader = val_dataloader
