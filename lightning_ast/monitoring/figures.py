"""Pictures for a logger that takes images: heatmaps, and the samples themselves. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Image", "class_heatmap", "sample_grid", "threshold_heatmap"]

Image: TypeAlias = NDArray[np.uint8]  # (H, W, 3)

_MOST_CLASSES = 60


def class_heatmap(by_epoch: Mapping[int, Tensor]) -> Image:
    """Draw the shares ``(C,)`` of each class (rows) that were selected over the epochs, NaN where none was offered."""
    classes = min(max(len(shares) for shares in by_epoch.values()), _MOST_CLASSES)
    shown = {epoch: shares[:classes] for epoch, shares in by_epoch.items()}
    title = "activation rate by class" + (f" (the first {classes})" if classes == _MOST_CLASSES else "")
    return _heatmap(shown, classes, title=title, bar="share selected", ylabel="class")


def threshold_heatmap(by_epoch: Mapping[int, Tensor]) -> Image:
    """Draw the mean thresholds ``(parts,)`` of an epoch (rows) over the epochs, NaN where it was dense."""
    parts = len(next(iter(by_epoch.values())))
    return _heatmap(by_epoch, parts, title="threshold", bar="significance", ylabel=f"part of the epoch, of {parts}")


def sample_grid(most: Sequence[tuple[Tensor, str]], least: Sequence[tuple[Tensor, str]]) -> Image:
    """Draw the most selected samples above, the least selected below: ``(1 or 3, H, W)`` of any range."""
    columns = max(len(most), len(least))
    figure = _figure(1.3 * columns, 3.6)
    for row, (name, samples) in enumerate((("most selected", most), ("least selected", least))):
        for column in range(columns):
            axes = figure.add_subplot(2, columns, row * columns + column + 1)
            axes.axis("off")
            if column < len(samples):
                image, caption = samples[column]
                axes.imshow(_pixels(image), cmap="gray", interpolation="nearest")
                axes.set_title(f"{name}\n{caption}" if column == 0 else f"\n{caption}", fontsize=8, loc="left")
    return _drawn(figure)


def _heatmap(by_epoch: Mapping[int, Tensor], rows: int, *, title: str, bar: str, ylabel: str) -> Image:
    """Draw values (rows) over the epochs (columns), with nothing where they are NaN or lack."""
    epochs = sorted(by_epoch)
    grid = np.full((rows, len(epochs)), np.nan)
    for column, epoch in enumerate(epochs):
        values = by_epoch[epoch].double().numpy()
        grid[: len(values), column] = values
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    shown = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="cividis", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label=bar)
    ticks = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), 12)).round().astype(int))
    axes.set_xticks(ticks, [str(epochs[tick]) for tick in ticks])
    axes.yaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    return _drawn(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _drawn(figure: Figure) -> Image:
    canvas: Any = figure.canvas  # Agg's, which has no types
    canvas.draw()
    picture: Image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return picture


def _pixels(image: Tensor) -> NDArray[np.float32]:
    """Scale an image to [0, 1], ``(H, W)`` or ``(H, W, 3)``."""
    image = torch.nan_to_num(image.detach().float().cpu())
    image = (image - image.amin()) / (image.amax() - image.amin()).clamp_min(1e-12)
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
