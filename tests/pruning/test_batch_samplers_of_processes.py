"""Batch samplers of the user's own in two real processes (gloo): one plan, as many batches in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.helpers.training import SaveAt, assert_same_weights, gloo, weights
from tests.pruning.own_batch_samplers import Batches, Lengths, Recorded, batches_by_hand, chosen_places, grouped
from tests.pruning.prune_by_hand import SIZE, Cycle, Indexed, Witness, fit, fresh, loader, pruned
from tests.pruning.test_ready_batches import Reader, Ready, Whole

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Record(pl.Callback):
    """What each rank drew, saw and ended with."""

    def __init__(self, folder: Path, callback: Any) -> None:
        self.folder, self.callback, self.told = folder, callback, []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.told.append(int(trainer.num_training_batches))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = self.callback.state_dict()["epochs"]
        found = {
            "batches": pl_module.batches,
            "drawn": getattr(trainer.train_dataloader.batch_sampler, "drawn", None),
            "weights": weights(pl_module),
            "scores": state["history"]["scores"],
            "told": self.told,
            "ends": (trainer.lr_scheduler_configs[0].scheduler.last_epoch, pl_module.steps),
        }
        torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")


def two(make: Any, folder: Path, *others: pl.Callback, steps: Any, **options: Any) -> list[dict[str, Any]]:
    workers = options.pop("num_workers", 0)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            dataset = Indexed(noise=0.0 if workers else 0.1)
            made = make()
            sampler = {} if isinstance(made, DataLoader) else {"batch_sampler": made, "batch_size": 1}
            return loader(**sampler, num_workers=workers, dataset=dataset) if sampler else made

    folder.mkdir(exist_ok=True)
    torch.manual_seed(options.pop("seed", 1))
    callback = pruned(prune_steps=steps)
    module = fresh(options.pop("kind", Cycle), batchnorm=False)
    record = Record(folder, callback)
    fit(module, Data(), callback, record, *others, devices=2, strategy=gloo(), **options)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


class Sharded(Recorded):
    """The batches of a sampler, every other one of which is this process's."""

    def __iter__(self) -> Any:
        self.drawn.append([])
        every = list(self.sampler)[: 2 * len(self)]
        for batch in every[torch.distributed.get_rank() :: 2]:
            self.drawn[-1].append(list(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.sampler) // 2


def batches_of(rank: dict[str, Any], epoch: int) -> Batches:
    return [indices for e, _, indices, _ in rank["batches"] if e == epoch]


@pytest.mark.parametrize("steps", ["replan", "follow"])
@pytest.mark.parametrize("kind", ["lengths", "grouped"])
def test_the_ranks_share_one_plan(tmp_path: Path, kind: str, steps: Any) -> None:
    """The user's own sampler shares its batches out, or Lightning puts a DistributedSampler under it."""
    make, given = (
        (grouped, {}) if kind == "grouped" else (lambda: Sharded(Lengths()), {"use_distributed_sampler": False})
    )
    ranks = two(make, tmp_path, steps=steps, num_workers=2 if steps == "follow" else 0, **given)
    assert ranks[0]["told"] == ranks[1]["told"], "the same batches on every rank"
    assert torch.equal(ranks[0]["scores"], ranks[1]["scores"])
    assert_same_weights(*(rank["weights"] for rank in ranks))
    witness = Witness()
    witness.batches = sorted((batch for rank in ranks for batch in rank["batches"]), key=lambda batch: batch[0])
    for epoch in range(4):
        seen = [batches_of(rank, epoch) for rank in ranks]
        assert [len(batches) for batches in seen] == [ranks[0]["told"][epoch]] * 2
        drawn = [rank["drawn"][-4:][epoch] for rank in ranks] if kind == "lengths" else []
        if kind == "grouped":
            groups = grouped().group_ids
            for rank in (0, 1):
                sampler = DistributedSampler(Indexed(), 2, rank, shuffle=True)
                sampler.set_epoch(epoch)
                drawn.append(list(grouped(sampler=sampler)))
                assert all(len({groups[index] for index in batch}) == 1 for batch in seen[rank])
        if epoch in (0, 3):
            assert seen == drawn
        elif steps == "replan":
            count = round(0.4 * sum(len(batch) for batches in drawn for batch in batches))
            options = {"groups": groups, "ranks": 2} if kind == "grouped" else {}
            together = batches_by_hand(witness, [*drawn[0], *drawn[1]], epoch=epoch, count=count, **options)
            assert [*seen[0], *seen[1]] == together
        else:
            flat = [index for batch in drawn[0] + drawn[1] for index in batch]
            planned = {flat[p] for p in chosen_places(witness, flat, epoch=epoch, count=round(0.4 * len(flat)))}
            assert planned <= {index for batch in seen[0] + seen[1] for index in batch}
            assert len(seen[0]) < (0.7 if kind == "grouped" else 1.1) * len(drawn[0])
            assert all(len(batch) > 1 or batch in drawn[0] + drawn[1] for batch in seen[0] + seen[1])
    assert ranks[0]["ends"][0] == ranks[0]["ends"][1], "the schedule ends with the run"


AT_ONCE = BatchSampler(SequentialSampler(range(SIZE)), 32, drop_last=False)
LOADERS: dict[str, Any] = {
    "grouped": (grouped, Cycle, ("batch end", 2, 2)),
    "stateful": (lambda: StatefulDataLoader(Indexed(), batch_size=32, shuffle=True), Cycle, ("batch end", 2, 0)),
    "ready": (lambda: loader(dataset=Ready(), batch_size=None, shuffle=True), Reader, ("epoch end", 1, None)),
    "at once": (lambda: loader(dataset=Whole(), batch_size=None, sampler=AT_ONCE), Cycle, ("batch end", 2, 1)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_resume_on_two_ranks(tmp_path: Path, name: str) -> None:
    make, kind, point = LOADERS[name]
    path = tmp_path / "run.ckpt"
    straight = two(make, tmp_path / "straight", SaveAt(path, *point), steps="follow", kind=kind)
    again = two(make, tmp_path / "again", steps="follow", seed=9, ckpt_path=path, kind=kind)
    assert [len(rank["batches"]) for rank in straight] == [len(straight[0]["batches"])] * 2
    for before, after in zip(straight, again):
        assert 0 < len(after["batches"]) < len(before["batches"])
        assert [b[:3] for b in after["batches"]] == [b[:3] for b in before["batches"]][-len(after["batches"]) :]
        assert torch.equal(before["scores"], after["scores"])
        assert_same_weights(before["weights"], after["weights"])


class Alike(Lengths):
    """Every process draws all batches."""


class Uneven(Sharded):
    def __len__(self) -> int:
        return len(self.sampler) // 2 - torch.distributed.get_rank()


@pytest.mark.parametrize(
    ("make", "message"),
    [(Alike, "drew the same samples"), (lambda: Uneven(Lengths()), r"drew \[15, 14\] batches, by rank")],
)
def test_samplers_that_do_not_share_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(Exception, match=message):
        two(make, tmp_path, steps="keep", use_distributed_sampler=False)


def test_both_ranks_take_as_many_batches_where_one_has_less_to_do(tmp_path: Path) -> None:
    """All samples of the second process are known to be easy."""

    class Halves(Recorded):
        group_ids = [0] * SIZE

        def __iter__(self) -> Any:
            begin = SIZE // 2 * torch.distributed.get_rank()
            return iter([[*range(start, start + 10)] for start in range(begin, begin + SIZE // 2, 10)])

        def __len__(self) -> int:
            return SIZE // 20

    ranks = two(lambda: Halves([]), tmp_path, steps="follow", use_distributed_sampler=False)
    assert ranks[0]["told"] == ranks[1]["told"]
    assert [len(batches_of(rank, 1)) for rank in ranks] == [ranks[0]["told"][1]] * 2
