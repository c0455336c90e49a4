"""A stream without an index is pruned by a filter in front of what loads its samples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_ast import SparseLossMixin, SparseSelectionCallback
from lightning_ast.errors import ConfigurationError
from lightning_ast.streams import SampleFilter
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.prune_by_hand import (
    SIZE,
    Cycle,
    Indexed,
    Witness,
    epochs_by_hand,
    fit,
    fresh,
    history_by_hand,
    pruned,
)


class Files(IterableDataset[Any]):
    """Reads its part of the samples in a fixed order, and counts what it decodes."""

    def __init__(self, sample_filter: SampleFilter, size: int = SIZE) -> None:
        self.images = Indexed()
        self.filter = sample_filter
        self.size = size
        self.decoded: list[int] = []

    def __iter__(self) -> Any:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.size, step):
            if self.filter(number):
                self.decoded.append(number)
                yield self.images[number]


class Told(SparseLossMixin, Witness):
    """Tells the numbers of a batch's samples."""

    def sample_indices(self, batch: Any) -> Tensor:
        return batch[2]


class Cycled(Told, Cycle):
    """With a schedule by steps."""


def stream(size: int = SIZE, told: int = SIZE, **options: Any) -> tuple[SampleFilter, Files, DataLoader[Any]]:
    sample_filter = SampleFilter(size=told)
    files = Files(sample_filter, size)
    return sample_filter, files, DataLoader(files, batch_size=32, **options)


WORKERS = [{}, {"num_workers": 1}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


@pytest.mark.parametrize("options", WORKERS, ids=str)
def test_what_reaches_the_model_is_the_plan(options: Any) -> None:
    sample_filter, files, data = stream(**options)
    module = fresh(Told)
    fit(module, data, pruned(sample_filter=sample_filter))
    seen, planned = module.epochs(), epochs_by_hand(module)
    assert {epoch: sorted(numbers) for epoch, numbers in seen.items()} == planned
    if options.get("num_workers", 0) < 2:
        assert seen == planned, "the order is the stream's"
    if not options:
        assert files.decoded == [number for epoch in range(4) for number in planned[epoch]], "no other was decoded"
    assert all(sample_filter(number) for number in range(SIZE)), "every sample passes when the fit is over"


@pytest.mark.parametrize("options", WORKERS, ids=str)
@pytest.mark.parametrize("point", [("epoch end", 1, None), ("batch end", 2, 0), ("batch end", 3, 4)], ids=str)
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, point: Any, options: Any) -> None:
    path = tmp_path / "run.ckpt"
    runs = []
    for save, start, seed in ((SaveAt(path, *point), None, 0), (None, path, 7)):
        sample_filter, _, data = stream(**options)
        runs.append(fresh(Cycled, seed=seed))
        callback = pruned(sample_filter=sample_filter, prune_steps="follow")
        fit(runs[-1], data, callback, *([save] if save else []), ckpt_path=start)
    straight, again = runs
    assert again.batches == straight.batches[-len(again.batches) :]
    assert_same_weights(weights(straight), weights(again))


class Unsteady(Files):
    """Reads in another order each time; which part a worker reads, it is told from outside."""

    part = (0, 1)

    def __iter__(self) -> Any:
        numbers = list(range(self.part[0], self.size, self.part[1]))
        random.Random().shuffle(numbers)
        return (self.images[number] for number in numbers if self.filter(number))


def divide(worker: int) -> None:
    info = get_worker_info()
    info.dataset.part = (worker, info.num_workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_trains_on_each_planned_sample_once_whatever_the_order(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "run.ckpt"
    runs = []
    for save, start in ((SaveAt(path, "batch end", 2, 0), None), (None, path)):
        sample_filter = SampleFilter(size=SIZE)
        data = DataLoader(Unsteady(sample_filter), batch_size=32, num_workers=workers, worker_init_fn=divide)
        runs.append(fresh(Told))
        fit(runs[-1], data, pruned(sample_filter=sample_filter), *([save] if save else []), ckpt_path=start)
    straight, again = runs
    before = next(numbers for epoch, batch, numbers, _ in straight.batches if (epoch, batch) == (2, 0))
    assert sorted(before + again.epochs()[2]) == sorted(straight.epochs()[2])
    assert sorted(again.epochs()[3]) == list(range(SIZE))


@pytest.mark.parametrize("streams", [(True, False), (False, True)], ids=["to an index", "to a filter"])
def test_the_midst_of_an_epoch_is_not_continued_in_another_kind_of_loader(tmp_path: Path, streams: Any) -> None:
    path = tmp_path / "run.ckpt"

    def run(is_stream: bool, *callbacks: Any, **options: Any) -> None:
        sample_filter, _, data = stream()
        callback = pruned(sample_filter=sample_filter if is_stream else None)
        fit(fresh(Told), data if is_stream else DataLoader(Indexed(), batch_size=32), callback, *callbacks, **options)

    run(streams[0], SaveAt(path, "batch end", 2, 0))
    with pytest.raises(ConfigurationError, match=r"sample_filter was \d and is \d"):
        run(streams[1], ckpt_path=path)


def test_steps_and_books_are_those_of_the_plan() -> None:
    sample_filter, _, data = stream()
    module, callback = fresh(Cycled), pruned(sample_filter=sample_filter)
    trainer = fit(module, data, callback)
    assert trainer.global_step == module.steps == 10 + 4 + 4 + 10
    sparse = callback.ledger.stages["sparse"]
    assert (sparse.selected, sparse.offered) == (240, 600)
    state = callback.state_dict()["epochs"]["history"]
    latest = torch.where(state["recent"] >= 0, state["recent"], state["scores"])
    assert torch.allclose(latest, history_by_hand(module, 4).significance(), atol=1e-5)


@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_coverage_and_weights(gate: Any) -> None:
    sample_filter, _, data = stream(num_workers=2)
    module = fresh(Told)
    weighting = "sqrt" if gate == "soft" else None
    callback = SparseSelectionCallback(
        mode="prune",
        target_coverage=0.8,
        gate=gate,
        weighting=weighting,
        prune_steps="follow",
        sample_filter=sample_filter,
    )
    fit(module, data, callback)
    lengths = [len(numbers) for numbers in module.epochs().values()]
    assert lengths[0] == lengths[3] == SIZE
    assert 0 < lengths[1] < SIZE
    assert callback.ledger.stages["sparse"].offered == 2 * SIZE


def test_dense_is_the_plain_run() -> None:
    runs = []
    for dense in (False, True):
        sample_filter, _, data = stream(num_workers=2)
        runs.append(fresh(Told))
        callbacks = [pruned(target_activation_rate=1.0, sample_filter=sample_filter)] if dense else []
        quiet_trainer(max_epochs=2, callbacks=callbacks).fit(runs[-1], data)
    assert runs[0].batches == runs[1].batches
    assert_same_weights(*map(weights, runs))


def test_validation_comes_at_the_end_of_each_epoch() -> None:
    ends = []

    class Ends(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            ends.append((trainer.current_epoch, trainer.global_step))

    sample_filter, _, data = stream()
    val = DataLoader(Indexed(), batch_size=150)
    fit(fresh(Told), data, pruned(sample_filter=sample_filter), Ends(), val=val, num_sanity_val_steps=0)
    assert ends == [(0, 10), (1, 14), (2, 18), (3, 28)]


def test_a_stream_that_holds_less_than_it_was_said_to_is_warned_of() -> None:
    sample_filter, _, data = stream(size=290)
    with pytest.warns(UserWarning, match="ended without 10 of 300 planned samples"):
        fit(fresh(Told), data, pruned(sample_filter=sample_filter))


class Twice(Files):
    """Two workers that both read everything."""

    def __iter__(self) -> Any:
        return (self.images[number] for number in range(self.size) if self.filter(number))


class Unfiltered(Files):
    def __iter__(self) -> Any:
        return iter(self.images)


class Mute(Witness):
    """Does not tell which samples a batch holds."""


def loaded(kind: type[Files], **options: Any) -> Any:
    return lambda f: DataLoader(kind(f), **{"batch_size": 32, **options})


REFUSED = [
    (loaded(Twice, num_workers=2), {}, {}, Told, "or a second time, such as number 0"),
    (loaded(Unfiltered), {}, {}, Told, "batch 0 of epoch 1 holds samples that the epoch does not train on"),
    (loaded(Files), {}, {}, Mute, "override SparseLossMixin.sample_indices"),
    (loaded(Files, batch_size=None), {}, {}, Told, "needs batch_size"),
    (lambda f: {"a": loaded(Files)(f), "b": loaded(Files)(f)}, {}, {}, Told, "needs one training dataloader"),
    (
        lambda f: DataLoader(Indexed(), batch_size=32),
        {},
        {},
        Told,
        "an IterableDataset: leave it out for a map-style dataset",
    ),
    (loaded(Files), {"prune_steps": "keep"}, {}, Told, "use prune_steps='follow' with a sample_filter"),
    (loaded(Files), {"sample_filter": 3}, {}, Told, "sample_filter: expected a SampleFilter"),
    (loaded(Files), {}, {"limit_train_batches": 3}, Told, "needs whole epochs"),
    (loaded(Files), {}, {"val_check_interval": 0.5}, Told, "needs val_check_interval=1.0, .* 0.5 is a share"),
]


@pytest.mark.parametrize(("make", "options", "limits", "kind", "message"), REFUSED, ids=[case[-1] for case in REFUSED])
def test_what_cannot_be_filtered_is_refused(make: Any, options: Any, limits: Any, kind: Any, message: str) -> None:
    sample_filter = SampleFilter(size=SIZE)
    with pytest.raises(ConfigurationError, match=message):
        fit(fresh(kind), make(sample_filter), pruned(**{"sample_filter": sample_filter, **options}), **limits)
    assert all(sample_filter(number) for number in range(SIZE))


def test_a_filter_in_another_mode_passes_all_and_is_warned_of() -> None:
    sample_filter, _, data = stream()
    module = fresh(Told)
    trainer = quiet_trainer(callbacks=[SparseSelectionCallback(sample_filter=sample_filter)])
    with pytest.warns(UserWarning, match="sample_filter has no effect in mode='partial'"):
        trainer.fit(module, data)
    assert module.epochs() == {0: list(range(SIZE))}


def test_keys_are_numbers_in_the_range() -> None:
    by_name = SampleFilter(size=2, key=lambda sample: sample["n"])
    assert by_name({"n": torch.tensor(1)})
    for wrong in (2, -1, "1", 0.5):
        with pytest.raises(ValueError, match=r"each sample's number in \[0, 2\), got"):
            by_name({"n": wrong})
    with pytest.raises(ValueError, match="size: expected"):
        SampleFilter(size=0)
