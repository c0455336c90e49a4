"""pytorch-forecasting: unmodified LightningModules, whose losses are torchmetrics written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, rows

forecasting = pytest.importorskip("pytorch_forecasting")
pandas = pytest.importorskip("pandas")
from pytorch_forecasting import metrics  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned"),
    pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`"),
]


def series(**options: Any) -> Any:
    rng = np.random.default_rng(0)
    frames = [
        pandas.DataFrame({"time": np.arange(40), "value": np.sin(np.arange(40) / (3 + i)) + rng.normal(0, 0.1, 40) + 2,
                          "group": str(i)})
        for i in range(8)
    ]  # fmt: skip
    settings = {
        "time_idx": "time", "target": "value", "group_ids": ["group"], "max_encoder_length": 12,
        "max_prediction_length": 4, "time_varying_unknown_reals": ["value"],
    }  # fmt: skip
    return forecasting.TimeSeriesDataSet(pandas.concat(frames, ignore_index=True), **{**settings, **options})


def known() -> Any:
    return series(time_varying_known_reals=["time"], static_categoricals=["group"], min_encoder_length=12)


def tft(dataset: Any, loss: Any, kind: Any = forecasting.TemporalFusionTransformer) -> Any:
    return kind.from_dataset(
        dataset, learning_rate=0.01, hidden_size=8, attention_head_size=1, dropout=0.0, hidden_continuous_size=4,
        loss=loss,
    )  # fmt: skip


def batches(dataset: Any) -> Any:
    return dataset.to_dataloader(train=True, batch_size=32, num_workers=0)


CASES = {
    "TemporalFusionTransformer, QuantileLoss": Case(
        lambda: tft(known(), metrics.QuantileLoss()), lambda: batches(known())
    ),
    "NBeats, MASE": Case(
        lambda: forecasting.NBeats.from_dataset(series(), widths=[16, 16], backcast_loss_ratio=0.1, dropout=0.0),
        lambda: batches(series()),
    ),
    "DeepAR, NormalDistributionLoss": Case(
        lambda: forecasting.DeepAR.from_dataset(known(), hidden_size=8, dropout=0.0), lambda: batches(known())
    ),
    "DecoderMLP, MAE": Case(
        lambda: forecasting.DecoderMLP.from_dataset(known(), hidden_size=16, dropout=0.0, loss=metrics.MAE()),
        lambda: batches(known()),
    ),
    "DecoderMLP, MSELoss": Case(
        lambda: forecasting.DecoderMLP.from_dataset(known(), hidden_size=16, dropout=0.0, loss=nn.MSELoss()),
        lambda: batches(known()),
    ),
}


@rows("pytorch-forecasting")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
