"""``advise`` leaves no trace: a fit behind it is bitwise what it is without."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.advice import advise
from lightning_ast.errors import AdviceError
from tests.helpers.data import loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import assert_same_weights, quiet_trainer, weights

QUICK = 0.2
"""Seconds: two rounds of a small network."""


class Data(pl.LightningDataModule):
    """Counts what is done to it; its batches are normalised after the transfer."""

    def __init__(self, digits: tuple[Tensor, Tensor], workers: int = 0) -> None:
        super().__init__()
        self.digits, self.workers = digits, workers
        self.calls: list[str] = []
        self.draws = torch.Generator().manual_seed(3)

    def setup(self, stage: str) -> None:
        self.calls = [*self.calls, f"setup {stage}"]
        self.train = TensorDataset(*self.digits)

    def train_dataloader(self) -> Any:
        options = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        self.kept = DataLoader(self.train, 64, shuffle=True, generator=self.draws, **options)
        return self.kept

    def val_dataloader(self) -> Any:
        return DataLoader(self.train, 128)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x - 0.3).mul_(1 + 0.1 * torch.rand(())), y


def random_states() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]


def trained(digits: tuple[Tensor, Tensor], *, advised: bool, bare: bool = False) -> tuple[Any, int, Any, list[int]]:
    pl.seed_everything(1, verbose=False)
    module = PlainNet(dropout=0.3)
    selection = SparseSelectionCallback(target_activation_rate=0.4)
    trainer = quiet_trainer(max_epochs=3, callbacks=[selection, TwoStageScheduler(warmup_epochs=1)])
    draws = torch.Generator().manual_seed(9)
    data: Any = loader(digits, shuffle=True, generator=draws) if bare else Data(digits)
    val = DataLoader(TensorDataset(*digits), 128, shuffle=True, generator=draws) if bare else None
    if advised:
        before, weighed, own, kept = random_states(), weights(module), dict(vars(trainer)), list(trainer.callbacks)
        advice = advise(trainer, module, data, val_data=val, budget_seconds=QUICK)
        assert {p.mode for p in advice.table} == {"mask", "subset", "partial", "prune"}
        assert advice.facts.validation is not None
        after = random_states()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        assert_same_weights(weighed, weights(module))
        assert module.seen == [], "not one step of it ran"
        assert vars(trainer).keys() == own.keys()
        assert all(vars(trainer)[name] is value for name, value in own.items())
        assert trainer.callbacks == kept
        assert module._trainer is None
        assert selection.session is None
    trainer.fit(module, data, **({"val_dataloaders": val} if bare else {}))
    return weights(module), trainer.global_step, random_states(), module.seen


@pytest.mark.parametrize("bare", [False, True], ids=["datamodule", "loaders"])
def test_a_fit_behind_it_is_bitwise_the_same(digits: tuple[Tensor, Tensor], bare: bool) -> None:
    plain, advised = (trained(digits, advised=a, bare=bare) for a in (False, True))
    assert_same_weights(plain[0], advised[0])
    assert plain[1] == advised[1] == 24
    assert torch.equal(plain[2][0], advised[2][0])
    assert plain[3] == advised[3]


def test_a_datamodule_and_its_workers_stay_as_they_are(digits: tuple[Tensor, Tensor]) -> None:
    data, trainer = Data(digits, workers=1), quiet_trainer(max_epochs=2)
    before = data.draws.get_state()
    advice = advise(trainer, PlainNet(), data, budget_seconds=QUICK)
    assert advice.facts.loading.workers == 1
    assert data.calls == []
    assert not hasattr(data, "kept")
    assert data.trainer is None
    assert torch.equal(data.draws.get_state(), before)


def test_behind_a_fit_and_between_two(digits: tuple[Tensor, Tensor]) -> None:
    module, data = PlainNet(), Data(digits)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, data)
    before, step = weights(module), trainer.global_step
    advice = advise(trainer, module, data, budget_seconds=QUICK)
    assert advice.facts.run.epochs == 2
    assert "The Trainer has trained 2 epochs: what follows is a run from the start." in advice.facts.notes
    assert_same_weights(before, weights(module))
    assert trainer.global_step == step
    assert trainer.datamodule is data  # type: ignore[attr-defined]
    assert module.trainer is trainer
    trainer.validate(module, data, verbose=False)


def test_a_step_that_fails_is_the_users_to_mend_and_leaves_no_trace(digits: tuple[Tensor, Tensor]) -> None:
    class Broken(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.rand(1)
            raise ValueError("five is not six")

    trainer, module = quiet_trainer(), Broken()
    before = random_states()
    with pytest.raises(AdviceError, match=r"plain training step fails.*five is not six"):
        advise(trainer, module, loader(digits), budget_seconds=QUICK)
    assert torch.equal(before[0], torch.get_rng_state())
    assert module._trainer is None
    with pytest.raises(AdviceError, match="read only once"):
        advise(trainer, PlainNet(), iter([(digits[0][:8], digits[1][:8])]), budget_seconds=QUICK)
