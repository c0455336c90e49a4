"""With ``batch_size=None`` the dataset makes the batches: the plan chooses among them, as it does among samples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, SequentialSampler

from lightning_ast.core import planned_count
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.prune_by_hand import (
    Cycle,
    Indexed,
    Witness,
    epochs_by_hand,
    fit,
    fresh,
    loader,
    plan_by_hand,
    pruned,
)

BATCHES = 30


class Ready(Dataset[Any]):
    """Batches of 4 to 12 digits, each with its number."""

    def __init__(self) -> None:
        self.images = Indexed()

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(number * 10, number * 10 + 4 + number % 9)
        return self.images.x[rows], self.images.y[rows], torch.tensor([number])


class Reader(Cycle):
    """Notes the mean EL2N of each batch as that of its number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        epoch, number, indices, errors = self.batches.pop()
        self.batches.append((epoch, number, indices, [sum(errors) / len(errors)]))
        return loss


@pytest.mark.parametrize(("steps", "workers"), [("follow", 2), ("replan", 0)], ids=str)
def test_the_plan_chooses_among_ready_batches(steps: Any, workers: int) -> None:
    module, callback = fresh(Reader), pruned(prune_steps=steps)
    data = loader(dataset=Ready(), batch_size=None, shuffle=True, num_workers=workers)
    trainer = fit(module, data, callback)
    count = planned_count(BATCHES, 0.4, batch_size=1, min_selected=2)
    assert count == 12
    seen = module.epochs()
    for epoch in (1, 2):
        planned = plan_by_hand(module, list(range(BATCHES)), epoch=epoch, count=count, size=BATCHES)
        assert sorted(seen[epoch]) == sorted(planned)
    assert sorted(seen[0]) == sorted(seen[3]) == list(range(BATCHES))
    assert trainer.global_step == 2 * (BATCHES + count)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == module.steps
    rows = sum(4 + number % 9 for epoch in (1, 2) for number in seen[epoch])
    sparse = callback.ledger.stages["sparse"]
    assert sparse.selected == rows
    assert sparse.offered == pytest.approx(rows * BATCHES / count, rel=0.1)


def test_dense_epochs_are_bitwise_the_plain_run() -> None:
    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        module = fresh(Reader)
        torch.manual_seed(5)
        quiet_trainer(callbacks=callbacks, max_epochs=2).fit(
            module, loader(dataset=Ready(), batch_size=None, shuffle=True)
        )
        runs.append((module, torch.rand(2)))
    assert runs[0][0].batches == runs[1][0].batches
    assert torch.equal(runs[0][1], runs[1][1])
    assert_same_weights(*(weights(module) for module, _ in runs))


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Any) -> None:
    def run(*saves: pl.Callback, seed: int, ckpt_path: Any = None) -> Any:
        module = fresh(Reader, seed=seed)
        torch.manual_seed(seed)
        data = loader(dataset=Ready(), batch_size=None, shuffle=True)
        fit(module, data, pruned(prune_steps="follow", weighting="sqrt"), *saves, ckpt_path=ckpt_path)
        return module

    points = [("epoch end", 1, None), ("batch end", 0, 3), ("batch end", 2, 4)]
    straight = run(*(SaveAt(tmp_path / f"{p[:2]}", *p) for p in points), seed=0)
    for point in points:
        again = run(seed=7, ckpt_path=tmp_path / f"{point[:2]}")
        assert 0 < len(again.batches) < len(straight.batches)
        assert [b[:3] for b in again.batches] == [b[:3] for b in straight.batches[-len(again.batches) :]]
        assert_same_weights(weights(straight), weights(again))


def test_a_coverage_needs_steps_that_may_become_fewer() -> None:
    settings = {"target_activation_rate": None, "target_coverage": 0.8}
    data = loader(dataset=Ready(), batch_size=None)
    with pytest.raises(ConfigurationError, match="whole batches that are left out: use prune_steps='follow'"):
        fit(fresh(), data, pruned(**settings))
    module = fresh(Reader)
    fit(module, data, pruned(prune_steps="follow", gate="topk", **settings))
    assert len(module.epochs()[2]) < BATCHES


def test_a_sample_that_is_not_finite_does_not_condemn_its_batch() -> None:
    class Broken(Ready):
        def __getitem__(self, number: int) -> Any:
            x, y, index = super().__getitem__(number)
            return (x.index_fill(0, torch.tensor([0]), torch.nan) if number == 3 else x), y, index

    module, callback = fresh(batchnorm=False), pruned(quarantine_limit=0.1)
    with pytest.warns(match="dataset index 3"):
        fit(module, loader(dataset=Broken(), batch_size=None), callback)
    history = callback.session.epochs.history
    history.fold()
    assert not history.quarantined.any()


class Whole(Indexed):
    """Loads several samples at once, as datasets over columns do."""

    def __getitem__(self, index: Any) -> Any:
        indices = torch.as_tensor(index)
        return self.x[indices], self.y[indices], indices


def test_a_dataset_that_loads_the_samples_of_a_batch_at_once_is_pruned_by_samples() -> None:
    data = loader(dataset=Whole(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(300)), 32, False))
    module = fresh(Witness)
    fit(module, data, pruned())
    assert module.epochs() == epochs_by_hand(module)
