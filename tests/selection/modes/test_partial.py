"""``mode="partial"`` through the Trainer: the same training as exact masking, and books that say what it cost."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ast import PIController, SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.logs import warned
from tests.helpers.modules import PlainNet, Trained
from tests.helpers.training import quiet_trainer, weights


def trained(
    cls: type[pl.LightningModule], data: Any, mode: str, *extra: pl.Callback, rate: float = 0.4, **options: Any
) -> tuple[pl.LightningModule, SparseSelectionCallback]:
    torch.manual_seed(0)
    module = cls()
    batchnorm: Any = "exact" if mode == "partial" else "selected"
    callback = SparseSelectionCallback(mode=mode, target_activation_rate=rate, batchnorm=batchnorm)
    torch.manual_seed(1)  # dropout
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*ran over the whole batch.*")
        quiet_trainer(callbacks=[callback, *extra], **{"max_steps": 6, **options}).fit(module, data)
    return module, callback


def assert_same_training(cls: type[pl.LightningModule], data: Any, tolerance: float = 1e-4, **options: Any) -> Any:
    (masked, by_mask), (partial, by_rows) = (trained(cls, data, mode, **options) for mode in ("mask", "partial"))
    assert by_mask.ledger.selected == by_rows.ledger.selected < by_rows.ledger.offered
    moved = weights(trained(cls, data, "mask", **{**options, "max_steps": 0})[0])
    for name, want in weights(masked).items():
        if want.is_floating_point() and "running" not in name:
            change = (want - moved[name]).norm()
            assert (weights(partial)[name] - want).norm() <= tolerance * change + 2e-6, name
    return by_rows


class Dropped(PlainNet):
    def __init__(self) -> None:
        super().__init__(dropout=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"detect_anomaly": True},
        {"max_epochs": 2, "max_steps": -1, "val_check_interval": 4},
    ],
    ids=["plain", "accumulation", "clipping", "anomaly", "validation"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_the_same_training_as_exact_masking(digits: Digits, options: dict[str, Any]) -> None:
    assert_same_training(Dropped, loader(digits), **options)


def test_bf16_mixed(digits: Digits) -> None:
    assert_same_training(PlainNet, loader(digits), tolerance=0.05, precision="bf16-mixed")


def test_the_step_runs_once_on_the_full_batch(digits: Digits) -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(10)
            self.logged: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self(batch[0])
            loss = F.cross_entropy(scores, batch[1])
            with torch.no_grad():
                self.logged.append((loss.detach(), F.cross_entropy(scores, batch[1])))
            self.accuracy.update(scores, batch[1])
            self.seen.append(len(scores))
            return loss

    module, callback = trained(Net, loader(digits), "partial")
    assert module.seen == [64] * 6, "one forward a step, on every sample"
    assert int(module.accuracy.tp.sum() + module.accuracy.fn.sum()) == 6 * 64
    for reported, own in module.logged:
        torch.testing.assert_close(reported, own, rtol=1e-6, atol=1e-6)
    assert module.net[1].num_batches_tracked == 6
    assert 0.2 < callback.activation_rate < 0.5


class Recurrent(Trained):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = nn.Linear(8, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = self.stem(batch[0].squeeze(1))
        return F.cross_entropy(self.head(self.rnn(rows)[0][:, -1]), batch[1])


@pytest.mark.parametrize("warmup", [False, True])
def test_what_goes_dense_is_said_once_with_its_cost(digits: Digits, warmup: bool) -> None:
    torch.manual_seed(0)
    callback = SparseSelectionCallback(target_activation_rate=0.25)
    chain = [callback, TwoStageScheduler(warmup_epochs=1)] if warmup else [callback]
    with warned() as said:
        quiet_trainer(callbacks=chain, max_epochs=2).fit(Recurrent(), loader(digits))
    told = [text for text in said if "ran over the whole batch" in text]
    assert len(told) == 1
    assert "aten.mkldnn_rnn_layer_backward.default (x1)" in told[0]
    assert "their cost was not counted" in told[0], "torch has no formula for it"
    assert callback.savings["flops"] is None, "unknown, not 0"
    assert callback.savings["samples"] is not None
    sparse_steps = callback.ledger.stages["sparse"].steps
    assert callback.dense_ops == {"aten.mkldnn_rnn_layer_backward.default": sparse_steps}


def dense_share(callback: SparseSelectionCallback) -> float:
    """Of the backward of all sparse steps together, from the books."""
    totals = callback.ledger.stages["sparse"]
    return (totals.backwarded - totals.selected) / (totals.offered - totals.selected)


class Few(Trained):
    """The second BatchNorm has one value for each sample: as many as are selected."""

    lr = 0.01

    def __init__(self) -> None:
        super().__init__()
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), pool, nn.BatchNorm1d(8), nn.Linear(8, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("sizes", "booked", "said"),
    [([20, 10, 10, 20], [0, 1, "share", 0], [0, 0, 1, 1]), ([10, 20, 10], ["share", 0, "share"], [1, 1, 1])],
    ids=["later", "first"],
)
def test_what_goes_dense_may_change_from_batch_to_batch(
    digits: Digits, sizes: list[int], booked: list[Any], said: list[int]
) -> None:
    """It is measured when it happens (again), said once, and every batch is booked with its own share."""

    def first_ones(losses: Tensor, *_: Any) -> Tensor:
        return (torch.arange(len(losses)) < sizes[trainer.global_step]).float()

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            totals.append(callback.ledger.stages["sparse"].backwarded)
            messages.append(sum("native_batch_norm_backward" in str(w.message) for w in caught))

    totals, messages = [0.0], []
    half = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=0.5)
    callback = SparseSelectionCallback(significance=first_ones, gate="threshold", controller=half)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(callbacks=[callback, Watch()], max_steps=len(sizes))
        trainer.fit(Few(), loader(digits, batch_size=32))
    shares = [(b - a - k) / (32 - k) for a, b, k in zip(totals, totals[1:], sizes)]
    share = shares[booked.index("share")]
    assert 0.5 < share < 1, "all but the last layer"
    assert shares == pytest.approx([share if b == "share" else b for b in booked], abs=0.01)
    assert messages == said


def test_books_of_exact_and_selected_batchnorm(digits: Digits) -> None:
    callbacks = {}
    for batchnorm in ("selected", "exact"):
        callbacks[batchnorm] = callback = SparseSelectionCallback(batchnorm=batchnorm)
        with warned() as said:
            quiet_trainer(callbacks=[callback], max_steps=3).fit(PlainNet(), loader(digits))
        told = [text for text in said if "native_batch_norm_backward" in text]
        assert len(told) == (batchnorm == "exact")
        assert all(f"{dense_share(callback):.0%} of the backward's FLOPs are spent on every sample" in t for t in told)
    selected, exact = callbacks["selected"], callbacks["exact"]
    assert dense_share(selected) == 0
    flops = exact.ledger.flops
    convolution = (
        2 * 64 * 8 * 9
    )  # its weight's gradient: positions x channels x taps; the layer that lies before BatchNorm
    assert dense_share(exact) == pytest.approx(convolution / flops.backward, rel=1e-3)
    assert exact.savings["flops"] < selected.savings["flops"]


def test_batchnorm_setting_is_checked(digits: Digits) -> None:
    with pytest.raises(ValueError, match=r"batchnorm: expected one of 'selected', 'exact', got 'subset'"):
        quiet_trainer(callbacks=[SparseSelectionCallback(batchnorm="subset")]).fit(PlainNet(), loader(digits))
