"""Two real processes (gloo): one plan for both, the same number of batches, the same memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_ast import SparseSelectionCallback
from lightning_ast.core import planned_count
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import SaveAt, assert_same_weights, gloo, weights
from tests.pruning.prune_by_hand import SIZE, Cycle, Indexed, Witness, fit, fresh, loader, plan_by_hand, pruned

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Record(pl.Callback):
    """What each rank saw and ended with."""

    def __init__(self, folder: Path, callback: Any) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = self.callback.state_dict()["epochs"]
        torch.save(
            {
                "batches": pl_module.batches,
                "weights": weights(pl_module),
                "scores": state["history"]["scores"],
                "recent": state["history"]["recent"],
                "steps": (trainer.global_step, getattr(pl_module, "steps", None)),
                "ledger": self.callback.ledger.stages["sparse"].selected,
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def two(module: Any, data: Any, folder: Path, *others: pl.Callback, **options: Any) -> list[dict[str, Any]]:
    callback = pruned()
    torch.manual_seed(options.pop("seed", 1))
    strategy = gloo()
    fit(module, data, callback, Record(folder, callback), *others, devices=2, strategy=strategy, **options)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def merged(ranks: list[dict[str, Any]]) -> Witness:
    """A module that saw what all the ranks saw."""
    witness = Witness()
    witness.batches = sorted((batch for rank in ranks for batch in rank["batches"]), key=lambda batch: batch[0])
    return witness


def epochs(rank: dict[str, Any]) -> dict[int, list[int]]:
    witness = Witness()
    witness.batches = rank["batches"]
    return witness.epochs()


@pytest.mark.parametrize(
    ("size", "options", "limits"),
    [
        (SIZE, {"shuffle": True}, {}),
        (SIZE + 1, {}, {}),
        (SIZE, {"shuffle": True, "drop_last": True, "num_workers": 2}, {}),
        (SIZE, {"shuffle": True, "num_workers": 1, "persistent_workers": True}, {"limit_train_batches": 3}),
    ],
    ids=["shuffled", "a size that does not divide", "workers and drop_last", "limited"],
)
def test_the_ranks_share_one_plan(tmp_path: Path, size: int, options: Any, limits: Any) -> None:
    dataset = Indexed(size)
    ranks = two(fresh(Cycle), loader(dataset=dataset, **options), tmp_path, **limits)
    lengths = [[(e, b, len(i)) for e, b, i, _ in rank["batches"]] for rank in ranks]
    assert lengths[0] == lengths[1], "the same batches on every rank"
    batches = min(limits.get("limit_train_batches", 99), len(lengths[0]))
    each = -(-size // 2)
    offered = min(each // 32 * 32 if options.get("drop_last") else each, batches * 32)
    count = planned_count(2 * offered, 0.4, batch_size=32, processes=2, drop_last=options.get("drop_last", False))
    together = merged(ranks)
    for epoch in range(4):
        draws = []
        for rank in (0, 1):
            sampler = DistributedSampler(dataset, 2, rank, shuffle=True)  # as Lightning does
            sampler.set_epoch(epoch)
            draws.append(list(sampler)[:offered])
        seen = [epochs(rank)[epoch] for rank in ranks]
        if epoch in (0, 3):
            assert seen == draws
        else:
            taken_in_turns = [i for pair in zip(*draws) for i in pair]
            planned = plan_by_hand(together, taken_in_turns, epoch=epoch, count=count, size=size)
            assert [i for pair in zip(*seen) for i in pair] == planned, f"epoch {epoch}"
            assert len(seen[0]) == len(seen[1]) == count // 2
    assert torch.equal(ranks[0]["scores"], ranks[1]["scores"])
    assert torch.equal(ranks[0]["recent"], ranks[1]["recent"])
    assert_same_weights(*(only_parameters(rank["weights"]) for rank in ranks))
    assert ranks[0]["steps"] == ranks[1]["steps"]
    assert ranks[0]["steps"][0] == ranks[0]["steps"][1], "the schedule ends with the run"
    assert ranks[0]["ledger"] == count


def only_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """BatchNorm's buffers are each rank's own under DDP, but for rank 0's being sent round before each forward."""
    return {name: value for name, value in values.items() if "running" not in name}


@pytest.mark.parametrize(
    "make", [lambda: SubsetRandomSampler(range(40, 241)), lambda: WeightedRandomSampler([1.0] * SIZE, 200)]
)
def test_other_samplers_are_dealt_out(tmp_path: Path, make: Any) -> None:
    ranks = two(fresh(), loader(sampler=make()), tmp_path)
    for epoch in (1, 2):
        seen = [epochs(rank)[epoch] for rank in ranks]
        assert len(seen[0]) == len(seen[1]) == 40
        if isinstance(make(), SubsetRandomSampler):
            assert set(seen[0] + seen[1]) <= set(range(40, 241))
            assert len(set(seen[0]) & set(seen[1])) <= 1, "but for the sample that evens out 201"


@pytest.mark.parametrize("point", [("batch end", 0, 2), ("batch end", 2, 0), ("epoch end", 1, None)], ids=str)
def test_resume_on_two_ranks(tmp_path: Path, point: Any) -> None:
    path = tmp_path / "run.ckpt"
    for name in ("straight", "again"):
        (tmp_path / name).mkdir()

    def data() -> Any:
        return loader(shuffle=True, dataset=Indexed(noise=0.1))

    straight = two(fresh(Cycle), data(), tmp_path / "straight", SaveAt(path, *point))
    assert torch.load(path, weights_only=True)["global_step"] > 0
    again = two(fresh(Cycle, seed=3), data(), tmp_path / "again", seed=9, ckpt_path=path)
    for before, after in zip(straight, again):
        assert 0 < len(after["batches"]) < len(before["batches"])
        assert [b[:3] for b in after["batches"]] == [b[:3] for b in before["batches"]][-len(after["batches"]) :]
        assert torch.equal(before["scores"], after["scores"])
    for rank in (0, 1):
        assert_same_weights(only_parameters(straight[rank]["weights"]), only_parameters(again[rank]["weights"]))


def test_one_rank_alone_may_look_into_the_loader(tmp_path: Path) -> None:
    class Looks(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.is_global_zero:
                assert len(next(iter(trainer.train_dataloader))[0]) == 32

    ranks = two(fresh(), loader(shuffle=True), tmp_path, Looks())
    assert [len(batches) for batches in (rank["batches"] for rank in ranks)] == [5 + 2 + 2 + 5] * 2


def test_a_checkpoint_of_two_ranks_in_one_process(tmp_path: Path) -> None:
    middle, end = tmp_path / "middle.ckpt", tmp_path / "end.ckpt"
    two(fresh(), loader(shuffle=True), tmp_path, SaveAt(middle, "batch end", 2, 0), SaveAt(end, "epoch end", 1))
    with pytest.raises(ConfigurationError, match="processes was 2 and is 1"):
        fit(fresh(), loader(shuffle=True), pruned(), ckpt_path=middle)
    module = fresh()
    with pytest.warns(match=r"random state of 2 processes, for 1"):
        fit(module, loader(shuffle=True), pruned(), ckpt_path=end)
    assert [len(v) for v in module.epochs().values()] == [120, SIZE], "what was remembered is of use"


def test_a_rank_that_fails_saves_without_waiting_for_the_others(tmp_path: Path) -> None:
    states: list[Any] = []

    class Fails(pl.Callback):
        """What Lightning does before it calls ``on_exception``; then the run goes on, so that its end can be seen."""

        def on_train_batch_end(
            self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (trainer.global_rank, trainer.current_epoch, batch_idx) == (0, 2, 0):
                status, trainer.state.status = trainer.state.status, TrainerStatus.INTERRUPTED
                (callback,) = [c for c in trainer.callbacks if isinstance(c, SparseSelectionCallback)]
                states.append(callback.state_dict())
                trainer.state.status = status

        def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
            torch.save(states, tmp_path / f"states{trainer.global_rank}.pt")

    two(fresh(), loader(shuffle=True), tmp_path, Fails())
    (state,) = torch.load(tmp_path / "states0.pt")
    assert len(state["epochs"]["random"]) == 1
    assert torch.load(tmp_path / "states1.pt") == []


def test_ranks_with_samplers_of_their_own_are_refused(tmp_path: Path) -> None:
    data = loader(batch_sampler=BatchSampler(RandomSampler(range(SIZE)), 32, False), batch_size=1)
    with pytest.raises(Exception, match="several processes needs a DistributedSampler"):
        two(fresh(), data, tmp_path, use_distributed_sampler=False)
