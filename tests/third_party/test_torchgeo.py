"""torchgeo's tasks: unmodified LightningModules with torchmetrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, loader, rows

trainers = pytest.importorskip("torchgeo.trainers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]


def samples(**fields: Tensor) -> Any:
    count = len(next(iter(fields.values())))
    rows = [{name: values[i] for name, values in fields.items()} for i in range(count)]
    return loader(rows, 16), loader(rows[:16], 16, shuffle=False)  # ReduceLROnPlateau waits for a val_loss


def images() -> Tensor:
    return torch.rand(64, 3, 32, 32)


def classification(**options: Any) -> Any:
    return trainers.ClassificationTask(**{"model": "resnet10t", "in_channels": 3, "num_classes": 5, **options})


def segmentation(**options: Any) -> Any:
    settings = {"model": "fcn", "in_channels": 3, "num_classes": 3, "num_filters": 8, **options}
    return trainers.SemanticSegmentationTask(**settings)


def masks() -> Tensor:
    x = torch.randint(0, 3, (64, 32, 32))
    x[:, :4] = 0
    return x


CASES = {
    "ClassificationTask, ce": Case(
        classification, lambda: samples(image=images(), label=torch.randint(0, 5, (64,)))
    ),
    "ClassificationTask, bce": Case(
        lambda: classification(task="multilabel", num_labels=4, num_classes=None, loss="bce"),
        lambda: samples(image=images(), label=torch.randint(0, 2, (64, 4))),
    ),
    "ClassificationTask, focal": Case(
        lambda: classification(loss="focal"),
        lambda: samples(image=images(), label=torch.randint(0, 5, (64,))),
    ),
    "SemanticSegmentationTask, ce": Case(
        lambda: segmentation(ignore_index=0), lambda: samples(image=images(), mask=masks())
    ),
    "SemanticSegmentationTask, jaccard": Case(
        lambda: segmentation(loss="jaccard"), lambda: samples(image=images(), mask=masks())
    ),
    "RegressionTask": Case(
        lambda: trainers.RegressionTask(model="resnet10t", in_channels=3),
        lambda: samples(image=images(), label=torch.rand(64)),
    ),
    "PixelwiseRegressionTask": Case(
        lambda: trainers.PixelwiseRegressionTask(model="fcn", in_channels=3, num_filters=8),
        lambda: samples(image=images(), mask=torch.rand(64, 32, 32)),
    ),
}  # fmt: skip


@rows("torchgeo")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
