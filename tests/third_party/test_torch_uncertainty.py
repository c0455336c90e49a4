"""torch-uncertainty's routines: unmodified LightningModules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import (
    Case,
    check_outcome,
    loader,
    rows,
)

pytest.importorskip("torch_uncertainty")
from torch_uncertainty.losses import ELBOLoss
from torch_uncertainty.models.mlp import bayesian_mlp, mlp, packed_mlp
from torch_uncertainty.routines import (
    ClassificationRoutine,
    RegressionRoutine,
    SegmentationRoutine,
)
from torch_uncertainty.transforms import RepeatTarget

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
    pytest.mark.filterwarnings("ignore:You called `self.log"),
    pytest.mark.filterwarnings("ignore:lightning-ast. the network mixes"),  # mixup does
]


def sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def classification(model: nn.Module, loss: nn.Module | None = None, **options: Any) -> Any:
    return ClassificationRoutine(model, 10, loss or nn.CrossEntropyLoss(), optim_recipe=sgd(model), **options)


def regression(model: nn.Module, loss: nn.Module, **options: Any) -> Any:
    return RegressionRoutine(model, 1, loss, optim_recipe=sgd(model), **options)


def bayesian(samples: int) -> Any:
    model = bayesian_mlp(16, 10, hidden_dims=[16])
    return classification(model, ELBOLoss(model, nn.CrossEntropyLoss(), kl_weight=1e-4, num_samples=samples))


def segmentation() -> Any:
    model = nn.Conv2d(3, 4, 3, padding=1)
    return SegmentationRoutine(model, 4, nn.CrossEntropyLoss(), optim_recipe=sgd(model))


def classes() -> Any:
    return loader(TensorDataset(torch.rand(512, 16), torch.randint(0, 10, (512,))))


def values() -> Any:
    x = torch.rand(512, 16)
    return loader(TensorDataset(x, x[:, 0]))


def masks(invalid: int) -> Any:
    masks = torch.randint(0, 4, (256, 8, 8))
    masks.view(256, -1)[::2, :invalid] = 255
    return loader(TensorDataset(torch.rand(256, 3, 8, 8), masks))


CASES = {
    "ClassificationRoutine": Case(lambda: classification(mlp(16, 10, [32])), classes),
    "ClassificationRoutine, packed ensemble": Case(
        lambda: classification(
            packed_mlp(16, 10, [32], num_estimators=4), is_ensemble=True, format_batch_fn=RepeatTarget(4)
        ),
        classes,
    ),
    "ClassificationRoutine, mixup": Case(
        lambda: classification(mlp(16, 10, [32]), mixup_params={"mixtype": "mixup", "mixup_alpha": 0.4}),
        classes,
    ),
    "ClassificationRoutine, ELBOLoss of 1": Case(lambda: bayesian(1), classes),
    "ClassificationRoutine, ELBOLoss of 3": Case(lambda: bayesian(3), classes),
    "RegressionRoutine": Case(lambda: regression(mlp(16, 1, [32]), nn.MSELoss()), values),
    "SegmentationRoutine": Case(segmentation, lambda: masks(0)),
    "SegmentationRoutine, invalid pixels": Case(segmentation, lambda: masks(3)),
    "SegmentationRoutine, whole images invalid": Case(segmentation, lambda: masks(64)),
}


@rows("torch-uncertainty")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
