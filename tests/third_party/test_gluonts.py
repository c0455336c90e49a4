"""gluonts: its torch models are LightningModules with a loss of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, loader, rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # it would like another json module
    deepar_module = pytest.importorskip("gluonts.torch.model.deepar.lightning_module")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing"),
]

SETTINGS = {
    "freq": "h", "context_length": 8, "prediction_length": 4, "num_feat_dynamic_real": 1, "num_feat_static_real": 1,
    "num_feat_static_cat": 1, "cardinality": [1], "hidden_size": 8, "dropout_rate": 0.0, "lags_seq": [1, 2, 4],
}  # fmt: skip


def deepar() -> Any:
    return deepar_module.DeepARLightningModule(dict(SETTINGS))


def windows() -> Any:
    count = 256
    zeros = deepar().model.describe_inputs(count).zeros()
    fields = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in zeros.items()}
    fields["past_observed_values"] = torch.ones_like(fields["past_target"])
    fields["future_target"] = torch.rand(count, 4)
    fields["future_observed_values"] = torch.ones(count, 4)
    return loader([{name: values[i] for name, values in fields.items()} for i in range(count)])


CASES = {"DeepARLightningModule": Case(deepar, windows)}


@rows("gluonts")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
