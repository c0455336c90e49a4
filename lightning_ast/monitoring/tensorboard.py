"""The pictures, histograms and tables of loggers: each is asked for what it can do, and for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_ast.monitoring.figures import Image, class_heatmap, sample_grid, threshold_heatmap
from lightning_ast.monitoring.guard import Guard
from lightning_ast.monitoring.samples import EpochSamples, SampleHistory
from lightning_ast.selection.quarantine import QuarantinedSample

__all__ = ["LAYOUT", "Writers"]

_CHARTS = {
    "activation against target": "ast/(activation_rate|activation_rate_ema|target_activation_rate)$",
    "coverage, and its target where it has one": "ast/(target_)?coverage$",
    "threshold": "ast/threshold$",
    "savings": "ast/savings_(samples|flops|seconds|joules)$",
    "stage (0 warmup, 1 sparse, 2 cooldown)": "ast/stage$",
    "significance (10th, 50th, 90th percentile)": "ast/significance_p(10|50|90)$",
    "seconds of an epoch": "energy/(epoch|loading|scoring|forward_backward|validation|other)_seconds$",
    "joules of an epoch": "energy/(epoch|gpu|cpu)_joules$",
}
LAYOUT = {"AST": {title: ["Multiline", [tags]] for title, tags in _CHARTS.items()}}
"""TensorBoard's custom scalars page: the charts, each with a pattern of the tags that it shows."""

_LISTED = 100


class Writers:
    """The loggers of a run that take more than scalars, on the process that logs."""

    def __init__(self, trainer: pl.Trainer, *, images: int) -> None:
        self._trainer = trainer
        self._images = images
        loggers = trainer.loggers if trainer.is_global_zero else []  # the others' experiments are dummies
        experiments = [_experiment(logger) for logger in loggers]
        self._all = [experiment for experiment in experiments if hasattr(experiment, "add_histogram")]
        self._draws = any(hasattr(each, "add_image") for each in self._all) and _has_matplotlib()
        self._told = False
        self._guard = Guard("writing pages and pictures to a logger")

    def __bool__(self) -> bool:
        """Tell whether there is such a logger."""
        return bool(self._all)

    def _ask(self, method: str, *arguments: Any, **options: Any) -> None:
        """Ask the loggers that have a method; what one does that means something else by the name is guarded."""
        for experiment in self._all:
            if hasattr(experiment, method):
                with self._guard():
                    getattr(experiment, method)(*arguments, **options)

    def lay_out(self) -> None:
        """Arrange the scalars on a page."""
        self._ask("add_custom_scalars", LAYOUT)

    def histograms(self, samples: EpochSamples, history: SampleHistory, step: int) -> None:
        """Write histograms of the significance of all and of the selected, and of how often each was selected."""
        shown = {"ast/significance": samples.significance}
        if samples.selected.any():
            shown["ast/significance_selected"] = samples.significance[samples.selected]
        offered = history.offered > 0
        if offered.any():
            shown["ast/times_selected"] = history.selected[offered]
            shown["ast/selected_share"] = history.selected[offered] / history.offered[offered]
        for tag, values in shown.items():
            self._ask("add_histogram", tag, values.float(), step)

    def pictures(self, history: SampleHistory, step: int) -> None:
        """Write heatmaps, and the samples that were selected most and least."""
        if not self._draws:
            return
        shown = {}
        if history.classes:
            shown["ast/class_activation"] = class_heatmap(history.classes)
        if history.thresholds:
            shown["ast/threshold_by_epoch"] = threshold_heatmap(history.thresholds)
        grid = self._sample_grid(history) if self._images and len(history.offered) else None
        if grid is not None:
            shown["ast/most_and_least_selected"] = grid
        for tag, picture in shown.items():
            self._ask("add_image", tag, picture, step, dataformats="HWC")

    def quarantined(self, samples: Sequence[QuarantinedSample], step: int) -> None:
        """Name the samples that were left out."""
        rows = [f"| {s.epoch} | {s.batch} | {_known(s.position)} | {_known(s.index)} |" for s in samples[:_LISTED]]
        if len(samples) > _LISTED:
            rows.append(f"\nand {len(samples) - _LISTED} more")
        table = "\n".join(["| epoch | batch | position | dataset index |", "|---|---|---|---|", *rows])
        self._ask("add_text", "ast/quarantined_samples", table, step)

    def _sample_grid(self, history: SampleHistory) -> Image | None:
        most, least = history.extremes(self._images)
        images = self._load([*most.tolist(), *least.tolist()])
        if images is None:
            return None
        captions = [f"#{i}: {history.selected[i]}/{history.offered[i]}" for i in (*most.tolist(), *least.tolist())]
        rows = list(zip(images, captions, strict=True))
        return sample_grid(rows[: len(most)], rows[len(most) :])

    def _load(self, indices: list[int]) -> list[Tensor] | None:
        """Load the images of samples as the data set gives them; None where it gives none."""
        loader = self._trainer.train_dataloader
        try:
            with isolate_rng(include_cuda=False):  # augmentation draws: training must go on as without pictures
                dataset = loader.dataset  # type: ignore[union-attr]
                whole = getattr(dataset, "__getitems__", None)  # as the DataLoader asks for a batch
                samples = whole(indices) if callable(whole) else [dataset[index] for index in indices]
                return _images_of(loader.collate_fn(samples), len(indices))  # type: ignore[union-attr]
        except Exception as error:  # the user's data set, asked in a way that training does not need
            if not self._told:
                rank_zero_info(f"lightning-ast: no pictures of samples: {type(error).__name__}: {error}")
            self._told = True
            return None


def _experiment(logger: Any) -> Any:
    try:
        return logger.experiment
    except Exception:  # it has none, or cannot open one: Lightning will warn where it logs
        return None


def _images_of(batch: Any, size: int) -> list[Tensor] | None:
    """Find an image ``(1 or 3, H, W)`` for each sample: the first tensor of a batch that can be one."""
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim == 4 and len(leaf) == size:
            if leaf.shape[1] in (1, 3):
                return list(leaf)
            if leaf.shape[-1] in (1, 3):
                return list(leaf.movedim(-1, 1))
    return None


def _known(number: int) -> str:
    return str(number) if number >= 0 else "not known"


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        rank_zero_info("lightning-ast: heatmaps and samples need matplotlib: pip install 'lightning-ast[report]'.")
        return False
    return True
