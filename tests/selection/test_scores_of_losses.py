"""Where a score that is made of losses cannot be had, and the default score can; an optimizer that compares losses."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import ConfigurationError, LossCaptureError, SparseSelectionCallback

B = 8
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class TimeMajor(pl.LightningModule):
    """A network that puts time first, over as many steps as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(batch[0].transpose(0, 1))
        return F.cross_entropy(scores.reshape(-1, 4), batch[1].transpose(0, 1).reshape(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Searching(TimeMajor):
    """Trained by LBFGS with a line search."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe")


def fit(module: pl.LightningModule, **settings: Any) -> SparseSelectionCallback:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(4 * B, B, 3), torch.randint(0, 4, (4 * B, B)))
    callback = SparseSelectionCallback(**settings)
    pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(module, DataLoader(data, batch_size=B))
    return callback


@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_time_steps_that_are_as_many_as_samples(mode: Any) -> None:
    assert fit(TimeMajor(), mode=mode).activation_rate == pytest.approx(0.4, abs=0.15)
    with pytest.raises(LossCaptureError, match=r"8 time steps .* significance='gradient'"):
        fit(TimeMajor(), mode=mode, significance="loss")


@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_a_line_search_compares_losses_that_are_not_the_selection_s(mode: Any) -> None:
    with pytest.raises(ConfigurationError, match="searches along a line"):
        fit(Searching(), mode=mode)


def test_a_line_search_in_subset() -> None:
    assert fit(Searching(), mode="subset").activation_rate is not None
