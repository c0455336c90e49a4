"""Two real processes (gloo), each with a part of the data of its own: it remembers and plans its part alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_ast.core import planned_count
from lightning_ast.core.plan_rules import common_rate
from lightning_ast.streams import SampleFilter
from tests.helpers.training import SaveAt, assert_same_weights, gloo, weights
from tests.pruning.prune_by_hand import Cycle, Indexed, Recorded, Witness, fit, fresh, loader, plan_by_hand, pruned
from tests.pruning.test_streamed import Cycled, Files

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
SIZES = (200, 240)  # of the parts


class Part(Indexed):
    """The images of one process, numbered from 0."""

    def __init__(self, rank: int, **options: Any) -> None:
        super().__init__(sum(SIZES), **options)
        rows = slice(rank * SIZES[0], rank * SIZES[0] + SIZES[rank])
        self.x, self.y = self.x[rows], self.y[rows]


class Parts(pl.LightningDataModule):
    """Each process makes a loader of its part."""

    def __init__(self, make: Callable[[int], DataLoader[Any]]) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> DataLoader[Any]:
        return self.make(self.trainer.global_rank)


def shuffled(rank: int, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(rank)
    dataset = Part(rank, **options)
    sampler = Recorded(torch.utils.data.RandomSampler(dataset, generator=generator))
    sampler.generator = generator  # where a checkpoint finds it
    return loader(dataset=dataset, sampler=sampler)


class Tell(pl.Callback):
    """What each process saw and ended with."""

    def __init__(self, folder: Path, callback: Any) -> None:
        self.folder, self.callback = folder, callback
        folder.mkdir(exist_ok=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        session = self.callback.session
        torch.save(
            {
                "batches": pl_module.batches,
                "weights": weights(pl_module),
                "remembered": len(session.epochs.history),
                "drawn": getattr(sampler, "drawn", None),
                "steps": (trainer.global_step, getattr(pl_module, "steps", None)),
                "offered": self.callback.ledger.stages["sparse"].offered,
            },
            self.folder / f"rank{trainer.global_rank}.pt",
        )


def two(folder: Path, make: Any, *others: Any, kind: Any = Cycle, settings: Any = None, **options: Any) -> list[Any]:
    callback = pruned(own_parts=True, **(settings or {}))
    torch.manual_seed(options.pop("seed", 1))
    given = {"devices": 2, "strategy": gloo(), "use_distributed_sampler": False}
    fit(fresh(kind), Parts(make), callback, Tell(folder, callback), *others, **{**given, **options})
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def by_epoch(rank: dict[str, Any]) -> tuple[Witness, dict[int, list[int]]]:
    witness = Witness()
    witness.batches = rank["batches"]
    return witness, witness.epochs()


def lengths(rank: dict[str, Any]) -> list[tuple[int, int, int]]:
    return [(epoch, batch, len(numbers)) for epoch, batch, numbers, _ in rank["batches"]]


def parameters(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "running" not in name}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    folder = tmp_path_factory.mktemp("straight")
    path = folder / "run.ckpt"
    return two(folder, lambda rank: shuffled(rank, noise=0.1), SaveAt(path, "batch end", 2, 0)), path


def test_each_process_trains_on_the_plan_of_its_part(tmp_path: Path) -> None:
    ranks = two(tmp_path, shuffled)
    assert lengths(ranks[0]) == lengths(ranks[1]), "as many steps, each of as many samples"
    assert [rank["remembered"] for rank in ranks] == [*SIZES]
    assert ranks[0]["steps"] == ranks[1]["steps"]
    assert ranks[0]["steps"][0] == ranks[0]["steps"][1], "the schedule ends with the run"
    count = planned_count(SIZES[0], 0.4, batch_size=32)
    for rank, size in zip(ranks, SIZES):
        witness, seen = by_epoch(rank)
        for epoch, draws in enumerate(rank["drawn"][-4:]):
            if epoch in (0, 3):
                assert seen[epoch] == draws[: SIZES[0]], "as many as the smallest part has"
            else:
                number = ranks.index(rank)
                assert seen[epoch] == plan_by_hand(witness, draws, epoch=epoch, count=count, size=size, rank=number)
        assert rank["offered"] == 2 * size
    assert_same_weights(*(parameters(rank["weights"]) for rank in ranks))


def test_a_resumed_run_goes_on_exactly(straight: Any, tmp_path: Path) -> None:
    before, path = straight
    state = torch.load(path, weights_only=True)
    (own,) = [part for key, part in state["callbacks"].items() if "SparseSelection" in key]
    assert [len(part["history"]["scores"]) for part in own["parts"]] == [*SIZES]
    after = two(tmp_path, lambda rank: shuffled(rank, noise=0.1), seed=9, ckpt_path=path)
    for one, other in zip(before, after):
        assert 0 < len(other["batches"]) < len(one["batches"])
        assert [b[:3] for b in other["batches"]] == [b[:3] for b in one["batches"]][-len(other["batches"]) :]
        assert_same_weights(parameters(one["weights"]), parameters(other["weights"]))


def test_parts_that_are_divided_in_another_way(straight: Any, tmp_path: Path) -> None:
    _, path = straight
    with pytest.raises(Exception, match="own_parts was 2 and is 0"):
        fit(fresh(Cycle), shuffled(0), pruned(own_parts=True), ckpt_path=path)
    end = tmp_path / "end.ckpt"
    two(tmp_path, shuffled, SaveAt(end, "epoch end", 1), kind=Witness)
    module = fresh()
    with pytest.warns(match="holds the samples of 2 process"):
        fit(module, shuffled(0), pruned(own_parts=True), ckpt_path=end)
    assert sorted(module.epochs()) == [2, 3]


def test_the_scores_of_each_part_are_a_file(straight: Any, tmp_path: Path) -> None:
    from lightning_ast.__main__ import main

    main(["export", str(straight[1]), str(tmp_path / "scores.csv")])
    rows = [len((tmp_path / f"scores-part{rank}.csv").read_text().splitlines()) - 1 for rank in (0, 1)]
    assert rows == [*SIZES]


@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_a_coverage_is_that_of_all_parts_together(gate: Any, tmp_path: Path) -> None:
    settings = {"target_activation_rate": None, "target_coverage": 0.7, "gate": gate}
    ranks = two(tmp_path, shuffled, settings=settings)
    assert lengths(ranks[0]) == lengths(ranks[1])
    rate = len(by_epoch(ranks[0])[1][1]) / SIZES[0]
    carried = total = 0.0
    for rank, size in zip(ranks, SIZES):
        first = {i: e for epoch, _, ids, errors in rank["batches"] if epoch == 0 for i, e in zip(ids, errors)}
        unseen = max(first.values())
        scores = torch.tensor([first.get(index, unseen) for index in range(size)])
        carried += float(scores[by_epoch(rank)[1][1]].sum())
        total += float(scores.sum())
    assert 0.3 < rate < 0.75
    assert carried / total == pytest.approx(0.7, abs=0.06)


def test_the_rate_of_parts_that_differ() -> None:
    """The samples of one part are all easy: at one rate for both the coverage of both together is met."""
    parts = [torch.rand(3000) * 0.01, torch.rand(2000) + torch.randn(2000).exp()]
    whole = sum(float(part.sum()) for part in parts)
    for gate in ("topk", "soft"):
        carried = _in_step(parts, 0.8, gate)
        if gate == "topk":
            (rate,) = set(carried)
            kept = sum(float(part.sort(descending=True).values[: round(rate * len(part))].sum()) for part in parts)
            assert kept / whole == pytest.approx(0.8, abs=0.005)


def _in_step(parts: list[Any], coverage: float, gate: Any) -> list[float]:
    """Run the same function for each part in a thread; a sum waits for all of them."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier = Barrier(len(parts))
    given: dict[int, Any] = {}

    def rate(number: int) -> float:
        def total(values: Any) -> Any:
            given[number] = values
            barrier.wait()
            summed = given[0] + given[1]
            barrier.wait()
            return summed

        return common_rate(parts[number], coverage, gate, total=total)

    with ThreadPoolExecutor() as pool:
        rates = list(pool.map(rate, range(len(parts))))
    assert rates[0] == rates[1]
    return rates


def test_a_sampler_that_deals_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"set Trainer\(use_distributed_sampler=False\)"):
        two(tmp_path, lambda rank: loader(dataset=Part(rank)), use_distributed_sampler=True)


def test_loaders_of_two_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"got batch_size \[16, 32\]"):
        two(tmp_path, lambda rank: loader(dataset=Subset(Indexed(), range(64)), batch_size=16 * (rank + 1)))


class Stream(Files):
    """The samples of one process, as many as the other one has."""

    def __init__(self, rank: int, sample_filter: SampleFilter, size: int) -> None:
        super().__init__(sample_filter, size)
        self.images = Part(rank)


def streamed(folder: Path, *others: Any, workers: int = 0, size: Any = (200, 200), **options: Any) -> list[Any]:
    sample_filter = SampleFilter(size=200)  # before the processes are there: none may see the plan of another
    settings = {"sample_filter": sample_filter, "prune_steps": "follow"}

    def make(rank: int) -> DataLoader[Any]:
        return DataLoader(Stream(rank, sample_filter, size[rank]), batch_size=32, num_workers=workers)

    return two(folder, make, *others, kind=Cycled, settings=settings, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_of_two_processes(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "run.ckpt"
    straight = streamed(tmp_path / "straight", SaveAt(path, "batch end", 2, 0), workers=workers)
    assert lengths(straight[0])[:1] == lengths(straight[1])[:1]
    assert [b[:2] for b in straight[0]["batches"]] == [b[:2] for b in straight[1]["batches"]], "equal steps"
    count = planned_count(200, 0.4, batch_size=32)
    for number, rank in enumerate(straight):
        witness, seen = by_epoch(rank)
        planned = plan_by_hand(witness, [*range(200)], epoch=1, count=count, size=200, rank=number)
        if workers:  # a last short batch of a worker may be left out
            assert set(seen[1]) <= set(planned)
            assert len(seen[1]) > count - 32
        else:
            assert seen[1] == planned
    assert straight[0]["steps"][0] <= straight[0]["steps"][1]
    again = streamed(tmp_path / "again", workers=workers, seed=9, ckpt_path=path)
    for before, after in zip(straight, again):
        assert [b[:3] for b in after["batches"]] == [b[:3] for b in before["batches"]][-len(after["batches"]) :]
        assert_same_weights(parameters(before["weights"]), parameters(after["weights"]))


def test_a_stream_that_ends_before_the_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"stream of process 1 ended after 5 batches of epoch 0 where its plan has 7"):
        streamed(tmp_path, size=(200, 150))
