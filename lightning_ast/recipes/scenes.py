"""Images with several objects, pasted from images of single ones: with the masks and boxes that are true of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CLOTHING_KINDS", "Scene", "make_scenes"]

CLOTHING_KINDS = torch.tensor([0, 1, 0, 0, 0, 2, 0, 2, 3, 2])
"""The kind of each class of Fashion-MNIST: tops and dresses, trousers, shoes, bags."""


class Scene(NamedTuple):
    """One image and what is on it.

    Attributes:
        image: The image ``(1, size, size)`` in [0, 1].
        mask: The class of each pixel ``(size, size)``, int64; 0 is the background, ``1 + label`` an object.
        boxes: The boxes ``(k, 4)`` of the objects in pixels: left, top, right, bottom.
        labels: Their classes ``(k,)``, int64, without the background.
    """

    image: Tensor
    mask: Tensor
    boxes: Tensor
    labels: Tensor


def make_scenes(
    images: Tensor, labels: Tensor, *, count: int, seed: int, size: int = 64, most_objects: int = 3
) -> list[Scene]:
    """Paste one to ``most_objects`` objects on each of ``count`` noisy canvases; later ones may cover earlier ones.

    Args:
        images: The objects ``(N, 1, h, w)``, uint8, on black; ``h`` and ``w`` are at most ``size``.
        labels: Their classes ``(N,)``.
        count: The number of scenes.
        seed: The seed of the choice, the places and the noise.
        size: The height and width of a scene in pixels.
        most_objects: The largest number of objects of a scene.
    """
    draw = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    scenes = []
    for _ in range(count):
        image = 0.3 * torch.rand(1, size, size, generator=draw)
        mask = torch.zeros(size, size, dtype=torch.long)
        objects = int(torch.randint(1, most_objects + 1, (), generator=draw))
        chosen = torch.randint(len(images), (objects,), generator=draw)
        boxes = []
        for each in chosen.tolist():
            top = int(torch.randint(size - height + 1, (), generator=draw))
            left = int(torch.randint(size - width + 1, (), generator=draw))
            pixels = images[each, 0].float() / 255
            inside = pixels > 0.1
            image[0, top : top + height, left : left + width][inside] = pixels[inside]
            mask[top : top + height, left : left + width][inside] = 1 + labels[each]
            rows, columns = inside.nonzero(as_tuple=True)
            sides = (left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1)
            boxes.append(torch.stack(sides))
        scenes.append(Scene(image, mask, torch.stack(boxes).float(), labels[chosen]))
    return scenes
