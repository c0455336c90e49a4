"""What cannot be pruned is refused before the first batch."""

from __future__ import annotations

import itertools
import random
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Sampler,
    TensorDataset,
)

from lightning_ast import PIController
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import quiet_trainer
from tests.pruning.prune_by_hand import (
    SIZE,
    Indexed,
    Witness,
    fit,
    fresh,
    loader,
    pruned,
)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Indexed())


class Unsized(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(SIZE))


class Names(Sampler[Any]):
    def __iter__(self) -> Any:
        return (str(i) for i in range(SIZE))

    def __len__(self) -> int:
        return SIZE


class Shorter(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(SIZE - 1))

    def __len__(self) -> int:
        return SIZE


class Beyond(Shorter):
    def __iter__(self) -> Any:
        return iter(range(1, SIZE + 1))


class Endless(Shorter):
    def __iter__(self) -> Any:
        return (i % SIZE for i in itertools.count())


class Shuffles(DataLoader[Any]):
    """Batches in an order of its own."""

    def __iter__(self) -> Any:
        return iter(random.sample(list(super().__iter__()), len(self)))


class Plain:
    """An iterable that is no DataLoader."""

    def __iter__(self) -> Any:
        return iter([(Indexed().x[:8], Indexed().y[:8], torch.arange(8))] * 4)


def two_loaders() -> Any:
    return {"a": loader(), "b": loader()}


REFUSED = [
    (lambda: loader(dataset=Stream()), "where each sample of Stream has a number of its own, put a SampleFilter"),
    (two_loaders, "several dataloaders needs full batches"),
    (lambda: loader(num_workers=1, in_order=False), "needs in_order=True"),
    (Plain, "needs a torch DataLoader, got"),
    (lambda: loader(sampler=Unsized()), "the sampler has no __len__"),
    (lambda: loader(sampler=Names()), "a sampler of integer dataset indices: Names yields others"),
    (lambda: loader(sampler=Shorter()), "Shorter drew 299 samples where its length was 300"),
    (lambda: loader(sampler=Endless()), "Endless drew more than 300 samples where its length was 300"),
    (lambda: Shuffles(Indexed(), batch_size=32), "Shuffles iterates in a way of its own"),
    (lambda: loader(sampler=Beyond()), r"Beyond drew indices outside \[0, 300\)"),
    (
        lambda: loader(collate_fn=lambda rows: torch.utils.data.default_collate(rows[1:])),
        "batch 0 holds 31 samples where 32 were drawn",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_pruned_is_refused_before_the_first_batch(make: Any, message: str) -> None:
    module = fresh()
    with pytest.raises(ConfigurationError, match=message):
        fit(module, make(), pruned(), limit_train_batches=5)
    assert module.batches == []


def test_faults_of_the_loader_come_together() -> None:
    data = Shuffles(Indexed(), batch_size=32, sampler=Unsized(), num_workers=1, in_order=False)
    with pytest.raises(ConfigurationError) as raised:
        fit(fresh(), data, pruned())
    assert len(raised.value.faults) == 3


@pytest.mark.parametrize(
    ("options", "limits", "message"),
    [
        ({"controller": PIController()}, {}, "a controller would have nothing to correct"),
        ({}, {"warmup": 0.4, "cooldown": 0.4, "max_epochs": 2}, "no epoch would be pruned"),
        ({}, {"val_check_interval": 5}, "val_check_interval=5 is more than the 4 batches of a pruned epoch"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: Any, limits: Any, message: str) -> None:
    module = fresh()
    val = DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=150)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, loader(), pruned(**options), val=val, **limits)
    assert module.batches == []


def test_a_data_set_that_changes_its_length_is_refused() -> None:
    class Data(pl.LightningDataModule):
        size = SIZE

        def train_dataloader(self) -> Any:
            self.size -= 1
            return loader(dataset=Indexed(self.size))

    with pytest.raises(ConfigurationError, match="had 299 samples and has 298 now"):
        fit(fresh(), Data(), pruned(), reload_dataloaders_every_n_epochs=1)


def test_a_data_set_that_shrinks_in_place_is_refused() -> None:
    dataset = Indexed()

    class Shrink(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            dataset.x = dataset.x[:-10]

    with pytest.raises(ConfigurationError, match="had 300 samples and has 290 now"):
        fit(fresh(), loader(dataset=dataset), pruned(), Shrink())


def test_the_module_and_the_trainer_are_free_after_a_failure() -> None:
    class Fails(Witness):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    module, callback = fresh(Fails), pruned()
    trainer = quiet_trainer(callbacks=[callback], max_epochs=2)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(module, loader(dataset=Indexed(290)))
    assert type(trainer) is pl.Trainer
    assert "training_step" not in vars(module)
    trainer.fit(fresh(), loader())  # a second fit starts anew, on another data set
