"""Where a score that is made of losses cannot be had, and the default score can; an optimizer that compares losses."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import (
    ConfigurationError,
    LossCaptureError,
    SparseSelectionCallback,
    TwoStageScheduler,
)
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, Trained, fresh
from tests.helpers.training import assert_same_weights, fit, half, weights

B = 8


class AsManySteps(Trained):
    """A network that puts time first, over as many steps as there are samples."""

    lr = 0.01

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(batch[0].transpose(0, 1))
        return F.cross_entropy(scores.reshape(-1, 4), batch[1].transpose(0, 1).reshape(-1))


class Searching(AsManySteps):
    """Trained by LBFGS with a line search."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe")


def selected(module: pl.LightningModule, **settings: Any) -> SparseSelectionCallback:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(4 * B, B, 3), torch.randint(0, 4, (4 * B, B)))
    callback = SparseSelectionCallback(**settings)
    fit(module, DataLoader(data, batch_size=B), callback)
    return callback


@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_time_steps_that_are_as_many_as_samples(mode: Any) -> None:
    assert selected(AsManySteps(), mode=mode).activation_rate == pytest.approx(0.4, abs=0.15)
    with pytest.raises(LossCaptureError, match=r"8 time steps .* significance='gradient'"):
        selected(AsManySteps(), mode=mode, significance="loss")


@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_a_line_search_compares_losses_that_are_not_the_selection_s(mode: Any) -> None:
    with pytest.raises(ConfigurationError, match="searches along a line"):
        selected(Searching(), mode=mode)


def test_a_line_search_in_subset() -> None:
    assert selected(Searching(), mode="subset").activation_rate is not None


def test_regression_substitutes_the_loss_and_says_so(digits: Digits, caplog: pytest.LogCaptureFixture) -> None:
    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    with caplog.at_level("INFO"):
        fit(fresh(Net), loader(digits), SparseSelectionCallback(significance="el2n"), max_steps=2)
    assert "EL2N is not defined for mse_loss" in caplog.text


class Other(PlainNet):
    """Losses that no torch loss function returned as they are."""

    problem = ""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self(batch[0])
        one_hot = F.one_hot(batch[1], 10).float()
        if self.problem == "by hand":
            return ((scores - one_hot) ** 2).mean()
        if self.problem == "several":
            return F.cross_entropy(scores, batch[1]) + F.mse_loss(scores, one_hot)
        if self.problem == "unreduced":
            return F.cross_entropy(scores, batch[1], reduction="none").mean()
        F.cross_entropy(scores, batch[1])
        return ((scores - one_hot) ** 2).mean()


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("problem", ["by hand", "several", "unreduced", "unused"])
def test_a_score_of_losses_needs_one_of_torch(digits: Digits, problem: str, warm: bool) -> None:
    """Told at the first batch, in the warmup too."""
    extra = [TwoStageScheduler(warmup_epochs=1)] if warm else []
    module = fresh(Other)
    module.problem = problem
    callback = SparseSelectionCallback(significance="loss")
    if problem in ("several", "unreduced"):
        fit(module, loader(digits), callback, *extra, max_epochs=2, limit_train_batches=2)
        return
    with pytest.raises(LossCaptureError, match="no torch loss function has a part in the loss"):
        fit(module, loader(digits), callback, *extra, max_epochs=2)
    assert callback.ledger.offered == 0, "at the first batch"


def test_losses_without_gradient_are_for_logging(digits: Digits) -> None:
    class Net(PlainNet):
        first = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self(batch[0])
            if self.first:
                with torch.no_grad():
                    F.mse_loss(scores, torch.zeros_like(scores))
            loss = F.cross_entropy(scores, batch[1])
            with torch.no_grad():
                self.log("mse", F.mse_loss(scores, torch.zeros_like(scores)))
                F.cross_entropy(scores, batch[1], reduction="none")
            return loss

    plain, logging = fresh(dropout=0.0), fresh(Net, dropout=0.0)
    for module in (plain, logging):
        fit(module, loader(digits), half(), max_steps=2)
    assert_same_weights(weights(plain), weights(logging))
    before = fresh(Net, dropout=0.0)
    before.first = True
    fit(before, loader(digits), half(), max_steps=2)
    assert_same_weights(weights(plain), weights(before))


def test_a_score_that_cannot_be_had_fails_in_the_warmup(digits: Digits) -> None:
    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch_idx)
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    module = fresh(Net)
    with pytest.raises(ValueError, match="'confidence' is defined for classification"):
        fit(
            module,
            loader(digits),
            SparseSelectionCallback(significance="confidence"),
            TwoStageScheduler(warmup_epochs=2),
            max_epochs=4,
        )
    assert module.seen == [0]
