"""Write CIFAR-10 (or scikit-learn's digits) as folders of images, to try the ImageNet set-ups without ImageNet.

python examples/original/folders.py --data cifar10 --root FOLDER_OR_NPZ --out data/folders

The images are enlarged to 64 pixels a side.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch.nn.functional as F
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
    data: DataName, root: str | Path, out: str | Path, *, pixels: int = 64, train: int = 2_000, val: int = 1_000
) -> None:
    """Write the first training and test images of a data set to ``out/train`` and ``out/val``."""
    images = load_images(data, root)
    write_folder(images.train_images[:train], images.train_labels[:train], Path(out) / "train", pixels=pixels)
    write_folder(images.test_images[:val], images.test_labels[:val], Path(out) / "val", pixels=pixels)


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=get_args(DataName), default="cifar10")
    parser.add_argument("--root", default="data", help="the folder, or cifar10.npz")
    parser.add_argument("--out", default="data/folders")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--train", type=int, default=2_000, help="training images, the first ones")
    parser.add_argument("--val", type=int, default=1_000, help="test images, the first ones")
    options = vars(parser.parse_args())
    write(options.pop("data"), options.pop("root"), options.pop("out"), **options)


if __name__ == "__main__":
    main()
