"""Loaders stay the user's own in mode ``prune``: looked into, shared, reloaded, and dense epochs as in the plain run."""

from __future__ import annotations

import itertools
import multiprocessing
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    TensorDataset,
)

from tests.helpers.training import assert_same_weights, quiet_trainer, weights
from tests.pruning.prune_by_hand import (
    SIZE,
    Cycle,
    Indexed,
    epochs_by_hand,
    fit,
    fresh,
    history_by_hand,
    loader,
    plan_by_hand,
    pruned,
)


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": 2, "val_check_interval": 0.5}])
@pytest.mark.parametrize("workers", [0, 2])
def test_dense_is_bitwise_the_plain_run(limits: dict[str, Any], workers: int) -> None:
    """Warmup and a rate of 1: the same samples in the same order, the same draws, the same weights."""
    results = []
    for callback in (None, pruned(target_activation_rate=1.0)):
        module = fresh(Cycle)
        data = loader(shuffle=True, num_workers=workers, dataset=Indexed(noise=0.1))
        torch.manual_seed(5)
        trainer = quiet_trainer(callbacks=[callback] if callback else [], **limits)
        trainer.fit(module, data, DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=100))
        results.append((module, trainer.global_step, torch.rand(3)))
    (plain, steps, after), (ours, our_steps, our_after) = results
    assert ours.batches == plain.batches
    assert (our_steps, ours.steps) == (steps, plain.steps)
    assert torch.equal(after, our_after), "the global generator"
    assert_same_weights(weights(plain), weights(ours))


def test_one_loader_may_train_and_validate() -> None:
    data = loader()
    sampler, sizes = data.batch_sampler.sampler, []

    class Sizes(pl.Callback):
        def on_validation_batch_start(self, *args: Any) -> None:
            sizes.append(len(args[2][0]))

    fit(fresh(), data, pruned(), Sizes(), val=data, num_sanity_val_steps=0)
    assert sum(sizes) == 4 * SIZE
    assert data.batch_sampler.sampler is sampler, "the user's loader is as it was"


def test_reloaded_loaders_are_pruned_like_the_first() -> None:
    module = fresh()

    class Data(pl.LightningDataModule):
        made = 0

        def train_dataloader(self) -> Any:
            self.made += 1
            return loader(shuffle=True, num_workers=1)

    data = Data()
    fit(module, data, pruned(), reload_dataloaders_every_n_epochs=1)
    assert data.made == 4
    seen = module.epochs()
    assert [len(seen[e]) for e in range(4)] == [SIZE, 120, 120, SIZE]
    for epoch in (1, 2):
        planned = plan_by_hand(module, list(range(SIZE)), epoch=epoch, count=120)
        assert sorted(seen[epoch]) == planned, "what was remembered outlives the loader"


@pytest.mark.parametrize(
    ("hook", "workers"),
    [
        ("on_train_start", 0),
        ("on_train_epoch_start", 0),
        ("on_train_batch_end", 0),
        ("on_train_batch_end", 1),
        ("on_validation_start", 0),
    ],
)
def test_the_loader_may_be_looked_into_at_any_time(hook: str, workers: int) -> None:
    """As for a picture of a batch, or BatchNorm's statistics: it is the user's own, and the run goes on as planned."""
    seen = []

    class Looks(pl.Callback):
        pass

    def look(self: Any, trainer: pl.Trainer, *_: Any) -> None:
        assert len(trainer.train_dataloader) == 10
        seen.append(sum(len(batch[0]) for batch in itertools.islice(trainer.train_dataloader, 10 * (not seen) + 1)))

    setattr(Looks, hook, look)
    module, callback = fresh(), pruned()
    val = DataLoader(TensorDataset(Indexed().x, Indexed().y), 150)
    limits = {"val": val, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    trainer = fit(module, loader(num_workers=workers), callback, Looks(), **limits)
    assert seen[0] == SIZE
    assert module.epochs() == epochs_by_hand(module)
    callback.session.epochs.history.fold()
    remembered, by_hand = (h.significance() for h in (callback.session.epochs.history, history_by_hand(module, 4)))
    assert torch.allclose(remembered, by_hand, atol=1e-6), "a softmax of one row may be rounded otherwise"
    assert sum(len(batch[0]) for batch in trainer.train_dataloader) == SIZE


@pytest.mark.parametrize("reload", [0, 1])
def test_a_combined_loader_is_the_users_too(reload: int) -> None:
    combined = CombinedLoader(loader(), "min_size")
    for _ in range(2):
        module = fresh()
        fit(module, combined, pruned(), reload_dataloaders_every_n_epochs=reload)
        assert [len(indices) for indices in module.epochs().values()] == [SIZE, 120, 120, SIZE]
    plain = fresh()
    quiet_trainer(max_epochs=1).fit(plain, combined)
    assert plain.epochs() == {0: list(range(SIZE))}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 5}])
@pytest.mark.parametrize("make", [RandomSampler, None])
def test_dense_leaves_the_users_generator_where_the_plain_run_does(workers: int, limits: Any, make: Any) -> None:
    """torch's RandomSampler draws once more when it is asked for one index more than it has, which not all loaders do."""
    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        generator, module = torch.Generator().manual_seed(1), fresh()
        how = {"sampler": make(range(SIZE), generator=generator)} if make else {"shuffle": True, "generator": generator}
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=3, **limits)
        trainer.fit(module, loader(batch_size=30, num_workers=workers, **how))
        runs.append((module, generator.get_state()))
    assert runs[0][0].epochs() == runs[1][0].epochs()
    assert torch.equal(runs[0][1], runs[1][1])
    assert_same_weights(*(weights(module) for module, _ in runs))


def test_one_loader_that_is_reloaded_keeps_its_workers() -> None:
    class Data(pl.LightningDataModule):
        kept = loader(shuffle=True, num_workers=1, persistent_workers=True)

        def train_dataloader(self) -> Any:
            return self.kept

    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        module = fresh()
        torch.manual_seed(3)
        quiet_trainer(callbacks=callbacks, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module, Data())
        runs.append(module)
        assert not multiprocessing.active_children()
    assert runs[0].epochs() == runs[1].epochs()
