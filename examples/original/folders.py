"""Write CIFAR-10 (or scikit-learn's digits) as folders of images, to try the ImageNet set-ups without ImageNet.

python examples/original/folders.py --data cifar10 --root FOLDER_OR_NPZ --out data/folders

The images are enlarged to 64 pixels a side.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from lightning_ast.demo.data import DataName, load_images


def write_folder(images: Tensor, labels: Tensor, folder: Path, *, pixels: int) -> None:
    """Write uint8 images ``(N, C, H, W)`` as ``folder/<class>/<number>.png``, enlarged to ``pixels`` a side."""
    enlarged = F.interpolate(images.float(), size=(pixels, pixels), mode="bilinear").round().byte()
    for number, (image, label) in enumerate(zip(enlarged, labels.tolist(), strict=True)):
        path = folder / f"class_{label}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image.expand(3, -1, -1)).save(path)


def write(
    data: DataName = "cifar10",
    root: str | Path = "data",
    out: str | Path = "data/folders",
    *,
    pixels: int = 64,
    train: int = 2_000,
    val: int = 1_000,
) -> None:
    """Write the first training and test images of a data set to ``out/train`` and ``out/val``.

    Args:
        data: The data set.
        root: The folder of its files, or ``cifar10.npz``.
        out: The folder to write to.
        pixels: The height and width of the written images.
        train: The number of training images.
        val: The number of test images.
    """
    images = load_images(data, root)
    write_folder(images.train_images[:train], images.train_labels[:train], Path(out) / "train", pixels=pixels)
    write_folder(images.test_images[:val], images.test_labels[:val], Path(out) / "val", pixels=pixels)


if __name__ == "__main__":
    auto_cli(write)
