"""A mode that saves next to nothing with a module (frozen layers, adapters, a teacher) is warned of, with figures."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import RowOps
from lightning_ast.core.ledger import saves_too_little
from lightning_ast.mode_facts import cost_share
from tests.helpers.logs import warned
from tests.helpers.modules import Trained
from tests.helpers.training import quiet_trainer

WIDTH, SAMPLES = 32, 64


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


class Ordinary(Trained):
    """All parameters are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(), nn.Linear(WIDTH, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


class Frozen(Ordinary):
    """The head alone is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)


class OnlyBias(Frozen):
    """A backward without any matrix product: zero FLOPs, which is a figure too."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight.requires_grad_(False)


class LowRank(nn.Module):
    """A frozen layer with a trained detour of rank two."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Adapted(Frozen):
    """Adapters at every layer: the gradient still runs through the frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(LowRank(m) if isinstance(m, nn.Linear) else m for m in self.body))


class Distilled(Ordinary):
    """A frozen teacher as large as the student gives the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(network(), network(), nn.Linear(WIDTH, 4)).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(1)
        return F.cross_entropy(self.head(self.body(batch[0])), target)


def train(cls: type[Ordinary], mode: str | None, *, rate: float = 0.4, warmup: int = 0) -> Any:
    """Train two epochs, and give the callback and the warnings about the savings."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(SAMPLES, WIDTH), torch.arange(SAMPLES) % 4), batch_size=16)
    callback = SparseSelectionCallback(mode=mode or "mask", target_activation_rate=rate if mode else 1.0, gate="topk")
    chain = [callback, TwoStageScheduler(warmup_epochs=warmup)]
    with warned() as said:
        quiet_trainer(max_epochs=2, callbacks=chain).fit(cls(), data)
    return callback, [text for text in said if "of the FLOPs of dense" in text]


@pytest.mark.parametrize("mode", ["subset", "partial", "prune", "mask"])
@pytest.mark.parametrize("cls", [Ordinary, Frozen, Adapted, Distilled, OnlyBias])
def test_warned_of_once_with_the_measured_share(cls: type[Ordinary], mode: str) -> None:
    callback, said = train(cls, mode, warmup=1)
    sparse = callback.ledger.stages["sparse"]
    flops = callback.ledger.flops
    spent = (sparse.forwarded * flops.forward + sparse.backwarded * flops.backward) / (sparse.offered * flops.dense)
    expected = {
        Frozen: ("subset", "partial"), OnlyBias: ("subset", "partial"), Adapted: ("subset",), Distilled: ("subset",),
    }.get(cls, ())  # fmt: skip
    assert len(said) == (mode in expected)
    for text in said:
        told = float(re.search(r"costs (\d+\.\d)% of the FLOPs", text)[1]) / 100
        assert told == pytest.approx(spent, abs=0.03), "6 of 16 samples are 37.5 %"
        assert f"mode='{mode}' at an activation rate of 40%" in text
        assert f"({cost_share(mode, 0.4):.0%} where all parameters are trained): the forward is" in text
        assert "mode='prune' would cost 40%" in text
        assert ("mode='partial' would cost" in text) == (mode == "subset" and cls in (Adapted, Distilled))


class Transformed(Ordinary):
    """A Fourier transform ahead of the head has no row rule: the backward of all that lies before it is a full one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(torch.fft.fft(self.body(batch[0]), dim=1).real), batch[1])


def test_what_runs_over_every_sample_is_in_the_measured_share() -> None:
    callback, (text,) = train(Transformed, "partial")
    assert callback.savings["flops"] == pytest.approx(0.0, abs=0.05), "of the head alone"
    assert re.search(r"costs (9\d|100)\.\d% of the FLOPs", text)
    assert re.search(r"(9\d|100)% of the backward runs over every sample", text)
    assert "mode='prune' would cost 40%" in text
    assert "mode='subset' would cost 80%" in text, "its first layer needs no gradient of the input"
    assert "these backward operations ran over the whole batch" in text, "one warning for both"


def test_without_a_warmup_too() -> None:
    assert len(train(Frozen, "partial")[1]) == 1


def test_a_rate_at_which_even_the_formula_costs_more() -> None:
    _, (text,) = train(Ordinary, "subset", rate=0.75)
    assert re.search(r"costs 1\d\d\.\d%", text)
    assert "(108% where all parameters are trained)" in text, "it is the rate, and not the module"
    assert "frozen" not in text


@pytest.mark.parametrize("mode", ["subset", "partial", "prune", "mask"])
@pytest.mark.parametrize("cls", [Frozen, Adapted, Distilled])
def test_the_ledger_against_whole_steps(cls: type[Ordinary], mode: str) -> None:
    """Torch's counter over every step, scoring included."""

    def counted(mode: str | None) -> tuple[int, Any]:
        with FlopCounterMode(display=False) as counter, RowOps():
            callback, _ = train(cls, mode, warmup=int(mode == "prune"))
        return counter.get_total_flops(), callback

    spent, callback = counted(mode)
    dense, _ = counted(None)
    assert callback.ledger.spent_flops() == pytest.approx(spent, rel=1e-6)
    assert callback.savings["flops"] == pytest.approx(1 - spent / dense, rel=1e-6)


@pytest.mark.parametrize("mode", ["subset", "partial", "prune", "mask"])
@pytest.mark.parametrize("thaws", [True, False])
@pytest.mark.filterwarnings("ignore:lightning-ast. mode=")
def test_layers_that_are_unfrozen_or_frozen_in_mid_run(mode: str, thaws: bool) -> None:
    """The one count does not hold for both parts of the run: no figure is better than a wrong one."""

    class Switch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            module.body.requires_grad_(thaws == (trainer.current_epoch > 0))

    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(SAMPLES, WIDTH), torch.arange(SAMPLES) % 4), batch_size=16)
    callback = SparseSelectionCallback(mode=mode, gate="topk")
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback, TwoStageScheduler(warmup_epochs=1), Switch()])
    with pytest.warns(UserWarning, match="since then other parameters are trained"):
        trainer.fit(Ordinary(), data)
    assert callback.savings["flops"] is None
    assert callback.savings["samples"] > 0


def test_the_decision() -> None:
    third = 1 / 3
    for mode in ("mask", "subset", "partial", "prune"):
        assert not any(
            saves_too_little(mode, rate, forward=third) for rate in (0.01, 0.4, 0.6, 1.0 if mode != "subset" else 0.66)
        )
        assert saves_too_little(mode, 0.4, forward=0.99) == (mode in ("subset", "partial"))
    assert saves_too_little("subset", 0.4, forward=0.61)
    assert saves_too_little("subset", 0.4, forward=0.58)
    assert not saves_too_little("subset", 0.4, forward=0.57), "a tenth of 26.7 %"
    assert not saves_too_little("partial", 0.4, forward=0.93)
    assert saves_too_little("partial", 0.4, forward=0.94)
