"""What the first batch is checked for, and what needs no check: terms beside the loss, several rows a sample."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ast import (
    ConfigurationError,
    LossCaptureError,
    SparseLossMixin,
    SparseSelectionCallback,
    TwoStageScheduler,
)
from lightning_ast.core import BatchError
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, Trained, fresh
from tests.helpers.training import BATCH_MODES, fit, weights

WARM = pytest.mark.parametrize("warm", [False, True], ids=["sparse", "warmup"])


def run(module: PlainNet, digits: Digits, mode: str, warm: bool = False) -> SparseSelectionCallback:
    callback = SparseSelectionCallback(mode=mode)
    fit(module, loader(digits), callback, TwoStageScheduler(warmup_epochs=1 if warm else 0), max_epochs=2)
    return callback


class WithTerm(PlainNet):
    """A captured loss and a term by hand."""

    kind = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.other = nn.Linear(64, 4, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self(batch[0])
        loss = F.cross_entropy(scores, batch[1])
        return (
            loss
            + {
                "activations": lambda: 0.1 * scores.abs().mean(),
                "a layer without bias": lambda: 0.1 * self.other(batch[0].flatten(1)).square().mean(),
                "another forward": lambda: 0.1 * (self(batch[0].flip(3)) ** 2).mean(),
                "weights": lambda: 0.01 * sum((p**2).sum() for p in self.parameters()),
                "weights of a layer of the batch's size": lambda: 0.01 * (self.net[5].weight.t() ** 2).sum(),
                "scaled": lambda: 0.5 * loss,
            }[self.kind]()
        )


TERMS = ["activations", "another forward", "a layer without bias", "weights", "weights of a layer of the batch's size"]


@WARM
@pytest.mark.parametrize("kind", [*TERMS, "scaled"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_terms_beside_the_loss_train(digits: Digits, mode: str, kind: str, warm: bool) -> None:
    module = fresh(WithTerm)
    module.kind = kind
    sparse = run(module, digits, mode, warm).ledger.stages["sparse"]
    assert 0 < sparse.selected < sparse.offered


class Rows(PlainNet):
    """More rows than samples: what each kind makes of them."""

    kind = ""

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample, by hand."""
        first, second = (F.cross_entropy(scores, y, reduction="none") for scores in (self(x), self(x.flip(3))))
        return (first + second) / 2 if self.kind != "mask" else (first + second) / 2 * (torch.arange(len(x)) % 2) * 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        scores = self(x)
        several = torch.stack([scores, self(x.flip(3))])  # (2, B, C)
        if self.kind == "samples outermost":
            return F.cross_entropy(several.transpose(0, 1).reshape(-1, 10), y.repeat_interleave(2))
        if self.kind == "views joined":
            return F.cross_entropy(torch.cat([scores, self(x.flip(3))]), y.repeat(2))
        if self.kind == "views first":
            return F.cross_entropy(several.reshape(-1, 10), y.repeat(2))
        valid = torch.ones(len(x), 2, dtype=torch.bool)
        valid[::2] = False
        return F.cross_entropy(
            several.transpose(0, 1)[valid].repeat(2, 1), y.repeat_interleave(2)[valid.flatten()].repeat(2)
        )


@WARM
@pytest.mark.parametrize("kind", ["samples outermost", "views joined", "views first", "mask"])
@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_several_rows_a_sample(digits: Digits, mode: str, kind: str, warm: bool) -> None:
    """The first sparse step is that of the selected samples' losses, written out by hand."""
    module, reference = (fresh(Rows, dropout=0.0, batchnorm=False) for _ in range(2))
    module.kind = reference.kind = kind
    seen: dict[str, Any] = {}

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.update(before=weights(pl_module), batch=batch)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen["gradients"] = [p.grad.clone() for p in pl_module.parameters()]

    callback = SparseSelectionCallback(mode=mode, gate="topk")
    schedule = [TwoStageScheduler(warmup_epochs=1)] if warm else []
    fit(
        module,
        loader((digits[0][:128], digits[1][:128])),
        callback,
        *schedule,
        Spy(),
        max_epochs=2,
        max_steps=3 if warm else 1,
    )
    reference.load_state_dict(seen["before"])
    loss = reference.losses(*seen["batch"])[callback.last_selection.indices].mean()
    for got, want in zip(seen["gradients"], torch.autograd.grad(loss, list(reference.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Averages(PlainNet):
    """A momentum encoder, moved ahead of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.shadow = nn.Linear(512, 10).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.shadow.weight.lerp_(self.net[5].weight, 0.5)
        return super().training_step(batch, batch_idx)


@WARM
def test_scoring_that_would_move_parameters_is_refused(digits: Digits, warm: bool) -> None:
    with pytest.raises(LossCaptureError, match=r"changes parameters \(shadow.weight\).*mode='partial'"):
        run(fresh(Averages), digits, "subset", warm)
    assert run(fresh(Averages), digits, "partial", warm).ledger.offered == 1024


class LossMetric(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.zeros(()))

    def update(self, scores: Tensor, classes: Tensor) -> None:
        self.value = F.cross_entropy(scores, classes)

    def compute(self) -> Tensor:
        return self.value


class MetricAsLoss(PlainNet):
    def __init__(self) -> None:
        super().__init__()
        self.loss = LossMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


@WARM
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_a_metric_that_computes_the_loss(digits: Digits, mode: str, warm: bool) -> None:
    sparse = run(fresh(MetricAsLoss), digits, mode, warm).ledger.stages["sparse"]
    assert 0 < sparse.selected < sparse.offered


class KeepsState(PlainNet):
    """A hidden state goes on from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head, self.hidden = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 10), None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out, hidden = self.rnn(batch[0][:, 0], None if self.hidden is None else self.hidden.detach())
        self.hidden = hidden
        return F.cross_entropy(self.head(out[:, -1]), batch[1])


@WARM
def test_a_state_of_the_full_batchs_size(digits: Digits, warm: bool) -> None:
    with pytest.raises(BatchError, match=r"failed on the \d+ selected samples alone .*hidden state"):
        run(fresh(KeepsState), digits, "subset", warm)


class Density(pl.LightningModule):
    """A likelihood: its loss goes below 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.gaussian_nll_loss(self.layer(batch), batch, torch.full_like(batch, 1e-3))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_the_rate_holds_where_the_loss_is_negative(mode: str) -> None:
    rates = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(callback.activation_rate)

    x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
    callback, module = SparseSelectionCallback(mode=mode), Density()
    fit(module, DataLoader(x, batch_size=64), callback, Spy(), max_epochs=25)
    assert max(module.losses[-100:]) < 0, "the test is about negative losses"
    for start in range(100, 400, 100):  # its scale falls all the time, and the threshold follows
        assert sum(rates[start : start + 100]) / 100 == pytest.approx(0.4, rel=0.15)


@pytest.mark.filterwarnings("ignore:lightning-ast. the significance of all")
def test_scores_of_zero_are_all_alike(digits: Digits) -> None:
    """Nothing matters: a random share, not the fewest."""
    callback = SparseSelectionCallback(significance=lambda losses, *_: torch.zeros_like(losses))
    module = fresh()
    before = weights(module)
    fit(module, loader(digits), callback, max_epochs=4)
    assert callback.ledger.selected / callback.ledger.offered == pytest.approx(0.4, rel=0.1)
    assert any(not torch.equal(before[name], value) for name, value in weights(module).items())


class Tokens(Trained):
    """Rows of tokens, flattened from the first layer on; a learned scale, some of the classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.scale = nn.Embedding(7, 8), nn.Linear(8, 12), nn.Parameter(torch.ones(12))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.embed(batch.reshape(-1))) * self.scale.view(1, -1)
        return F.cross_entropy(scores[..., torch.arange(7)], batch.reshape(-1))


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_rows_that_are_flattened_from_the_start_are_fine(mode: str) -> None:
    tokens = torch.randint(0, 7, (64, 5), generator=torch.Generator().manual_seed(0))
    callback = SparseSelectionCallback(mode=mode)
    fit(Tokens(), DataLoader(tokens, batch_size=16), callback)
    assert 0 < callback.ledger.selected < 64


@pytest.mark.parametrize(
    "indices", [[0] * 64, torch.zeros(2, dtype=torch.long), torch.zeros(64)], ids=["list", "short", "float"]
)
def test_wrong_sample_indices(digits: Digits, indices: Any) -> None:
    class Net(SparseLossMixin, PlainNet):
        def sample_indices(self, batch: Any) -> Any:
            return indices

    with pytest.raises(ConfigurationError, match=r"an integer tensor of shape \(64,\)"):
        run(fresh(Net), digits, "partial")
