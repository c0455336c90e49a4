"""What the scoring pass of `subset` must run, and leave as it was: losses that are metrics, steps of two optimizers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_ast import SparseSelectionCallback
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, Trained, fresh
from tests.helpers.training import assert_close_weights, fit, half, weights

SIZE = 8

pytestmark = pytest.mark.filterwarnings("ignore:lightning-ast. mode=.* at an activation rate")


class Deviation(Metric):
    """A loss as a metric, as pytorch-forecasting's are."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, out: Tensor, target: Tensor) -> None:
        self.total = self.total + (out - target).abs().sum()
        self.count = self.count + target.numel()

    def compute(self) -> Tensor:
        return self.total / self.count


class Measured(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.criterion = Deviation()
        self.beside = MeanMetric()
        self.counts: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self.net(x), y)
        self.beside.update(loss.detach())
        self.counts.append((int(self.criterion.count), self.beside._update_count))
        return loss


def data() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(4 * SIZE, 3), torch.randn(4 * SIZE, 1)), SIZE)


def fitted(module: pl.LightningModule) -> SparseSelectionCallback:
    callback = SparseSelectionCallback(mode="subset", target_activation_rate=0.5, gate="topk")
    fit(module, data(), callback)
    return callback


def test_a_loss_that_is_a_metric_is_scored_and_counts_the_selected_samples_alone() -> None:
    module = Measured()
    callback = fitted(module)
    real = module.counts[1::2]  # each step is run twice
    assert real == [(SIZE // 2 * (k + 1), k + 1) for k in range(4)]
    assert callback.activation_rate == 0.5


def test_subset_leaves_no_trace_of_scoring(digits: Digits) -> None:
    """With BatchNorm and dropout: weights, buffers and random state are those of a run on the selected samples alone."""
    module = fresh()
    picked = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            picked.append(module.net[1].num_batches_tracked.item())
            indices.append(callback.last_selection.indices)

    callback = half()
    indices: list[Tensor] = []
    torch.manual_seed(3)
    fit(module, loader(digits), callback, Spy(), max_steps=4)
    after = torch.get_rng_state()

    class SelectedOnly(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0][indices[batch_idx]], batch[1][indices[batch_idx]]), batch_idx)

    alone = fresh(SelectedOnly)
    torch.manual_seed(3)
    fit(alone, loader(digits), max_steps=4)
    assert torch.equal(after, torch.get_rng_state())
    assert picked == [1, 2, 3, 4], "BatchNorm saw one forward a step"
    assert_close_weights(weights(module), weights(alone))
    for name in ("net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"):
        torch.testing.assert_close(weights(module)[name], weights(alone)[name], rtol=1e-5, atol=1e-6)


def test_metrics_before_and_after_the_loss_count_once(digits: Digits) -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = MulticlassAccuracy(10), MulticlassAccuracy(10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            scores = self(x)
            self.log("before", self.before(scores, y))
            loss = F.cross_entropy(scores, y)
            self.after.update(scores, y)
            return loss

    module = fresh(Net)
    fit(module, loader(digits), half(), max_steps=3)
    assert module.before._update_count == 3
    assert module.after._update_count == 3
    counted = sum(int(getattr(module.before, s).sum()) for s in ("tp", "fn"))
    assert counted == 3 * 32, "the selected samples, once each"


def test_scoring_logs_nothing_and_draws_nothing(digits: Digits) -> None:
    """What stands before the loss: self.log, Python's and NumPy's generators, autocast."""
    import random

    import numpy as np

    logged, drawn, dtypes = [], [], []

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            draw = (random.random(), float(np.random.rand()))
            scores = self(batch[0])
            if torch.is_grad_enabled():
                drawn.append(draw)
            dtypes.append(scores.dtype)
            self.log("mean_score", scores.float().mean())
            self.log_dict({"again": scores.float().mean()})
            return F.cross_entropy(scores, batch[1])

    module = fresh(Net)

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            logged.append("mean_score" in str(list(trainer._results)))

    random.seed(0)
    np.random.seed(0)
    fit(module, loader(digits), half(), Spy(), max_steps=1, precision="bf16-mixed")
    assert logged == [False], "scoring came first and logged nothing"
    assert dtypes == [torch.bfloat16] * 2, "scoring runs under the trainer's precision"
    random.seed(0)
    np.random.seed(0)
    assert drawn == [(random.random(), float(np.random.rand()))] * 2, "the step draws what scoring drew"


def test_layers_made_in_setup_are_held_still(digits: Digits) -> None:
    """Lightning calls callbacks' setup before the module's own."""

    class Net(PlainNet):
        def setup(self, stage: str) -> None:
            self.accuracy = MulticlassAccuracy(10)
            self.norm = nn.BatchNorm1d(10)
            self.rnn = nn.GRU(10, 10, num_layers=2, dropout=0.9, batch_first=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.norm(self(batch[0]))
            self.accuracy.update(scores, batch[1])
            again = [self.rnn(scores.unsqueeze(1))[0] for _ in range(2)]
            if not torch.is_grad_enabled():
                assert torch.equal(*again), "dropout is off while scoring"
            return F.cross_entropy(scores, batch[1])

    module = fresh(Net)
    fit(module, loader(digits), half(), max_steps=3)
    assert module.accuracy._update_count == 3
    assert module.norm.num_batches_tracked == 3


def test_layers_that_are_added_between_epochs_are_held_still(digits: Digits) -> None:
    class Growing(PlainNet):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.norm = nn.BatchNorm1d(10, affine=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self(batch[0])
            return F.cross_entropy(self.norm(scores) if self.current_epoch else scores, batch[1])

    module = fresh(Growing)
    fit(module, loader(digits), half(), max_epochs=2, limit_train_batches=3)
    assert module.norm.num_batches_tracked == 3
