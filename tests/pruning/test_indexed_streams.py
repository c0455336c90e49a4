"""A stream that has an index is pruned by it: what reaches the model is the plan, and a resumed run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_ast.errors import ConfigurationError
from lightning_ast.streams import BlockShuffle, IndexedStream
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.prune_by_hand import SIZE, Cycle, Indexed, Witness, fit, fresh, plan_by_hand, pruned
from tests.pruning.test_processes import epochs, merged, two


class Stream(IterableDataset[Any]):
    """Reads the images one after the other, or one by its index."""

    def __init__(self) -> None:
        self.images = Indexed()

    def __iter__(self) -> Any:
        return iter(self.images)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return self.images[index]


class Plain(IterableDataset[Any]):
    """A stream without an index, which inherits a method of that name."""

    def __iter__(self) -> Any:
        return iter(Indexed())


def blocks(**options: Any) -> DataLoader[Any]:
    dataset = IndexedStream(Stream())
    return DataLoader(dataset, batch_size=32, sampler=BlockShuffle(dataset, block_size=25), **options)


def orders(count: int = 4) -> list[list[int]]:
    """What the sampler draws in each epoch."""
    sampler = BlockShuffle(range(SIZE), block_size=25)
    drawn = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    return drawn


@pytest.mark.parametrize("workers", [0, 2])
def test_what_reaches_the_model_is_the_plan(workers: int) -> None:
    module = fresh()
    fit(module, blocks(num_workers=workers), pruned())
    seen, drawn = module.epochs(), orders()
    assert seen[0] == drawn[0]
    assert seen[3] == drawn[3]
    for epoch in (1, 2):
        assert seen[epoch] == plan_by_hand(module, drawn[epoch], epoch=epoch, count=120)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("point", [("epoch end", 1, None), ("batch end", 2, 1)], ids=str)
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, point: Any, workers: int) -> None:
    path = tmp_path / "run.ckpt"
    straight, again = fresh(Cycle), fresh(Cycle, seed=7)
    fit(straight, blocks(num_workers=workers), pruned(), SaveAt(path, *point))
    fit(again, blocks(num_workers=workers), pruned(), ckpt_path=path)
    assert again.batches == straight.batches[-len(again.batches) :]
    assert_same_weights(weights(straight), weights(again))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_processes_share_one_plan(tmp_path: Path) -> None:
    ranks = two(fresh(Cycle), blocks(), tmp_path)
    both = merged(ranks)
    for epoch in (1, 2):
        planned = plan_by_hand(both, orders()[epoch], epoch=epoch, count=120)
        assert [epochs(rank)[epoch] for rank in ranks] == [planned[0::2], planned[1::2]]


def test_dense_is_the_plain_run() -> None:
    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        runs.append(fresh())
        quiet_trainer(max_epochs=2, callbacks=callbacks).fit(runs[-1], blocks())
    plain, dense = runs
    assert dense.batches == plain.batches


def test_neighbours_stay_together_and_blocks_do_not() -> None:
    order = orders(2)
    assert order[0] != order[1]
    assert order[0] != sorted(order[0])
    for drawn in order:
        assert sorted(drawn) == list(range(SIZE))
        assert len({index // 25 for index in drawn[:100]}) == 4, "four blocks at a time"


def test_each_process_draws_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = BlockShuffle(range(10), block_size=2)
    alone = list(sampler)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert len(sampler) == 3
        shares.append(list(sampler))
    assert [index for turn in zip(*shares, strict=True) for index in turn] == alone + alone[:2]
    assert isinstance(sampler, DistributedSampler), "Lightning puts no other one around it"


def test_sizes_that_cannot_be_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the length of a Stream may be that of one process's part"):
        IndexedStream(Stream())
    assert len(IndexedStream(Stream(), size=SIZE)) == SIZE
    stream = Stream()
    stream.size = SIZE + 1  # type: ignore[attr-defined]
    assert len(IndexedStream(stream)) == SIZE + 1
    with pytest.raises(ValueError, match="at least 1 sample, got size=0"):
        IndexedStream(stream, size=0)
    with pytest.raises(TypeError, match="a stream with an index"):
        IndexedStream(Plain())
    with pytest.raises(ValueError, match="expected at least 1, got block_size=0"):
        BlockShuffle(range(10), block_size=0)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
def test_a_stream_that_was_not_wrapped_is_refused_with_what_to_do() -> None:
    module = fresh(Witness)
    with pytest.raises(ConfigurationError, match=r"Stream has an index: wrap it, IndexedStream\(dataset\)"):
        fit(module, DataLoader(Stream(), batch_size=32), pruned())
    assert module.batches == []
