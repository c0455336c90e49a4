"""A plan as a sampler, in plain loops: what is loaded is the plan, resume is exact, processes agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import (
    PlanRules,
    SampleSelector,
    SignificanceHistory,
    SignificanceSampler,
    plan_epoch,
    planned_count,
    rate_at_coverage,
)

SIZE, BATCH = 100, 8


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(SIZE, 6, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator)
    return TensorDataset(torch.arange(SIZE), x, y)


def network() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(6, 3)


class Loop:
    """Trains in a loop of its own, and keeps what it saw: epoch, indices, losses."""

    def __init__(self, sampler: SignificanceSampler, **options: Any) -> None:
        self.sampler, self.net = sampler, network()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.5, momentum=0.9)
        self.loader = DataLoader(dataset(), sampler=sampler, batch_size=BATCH, **options)
        self.seen: list[tuple[int, list[int], Tensor]] = []

    def run(self, epochs: int, *, stop: int | None = None, announces: bool = True) -> Loop:
        for epoch in range(self.sampler.epoch, epochs):
            if announces:
                self.sampler.set_epoch(epoch)
            for indices, x, y in self.loader:
                losses = F.cross_entropy(self.net(x), y, reduction="none")
                self.optimizer.zero_grad()
                losses.mean().backward()
                self.optimizer.step()
                self.sampler.observe(indices, losses)
                self.seen.append((self.sampler.epoch, indices.tolist(), losses.detach()))
                if len(self.seen) == stop:
                    return self
        return self

    def epochs(self) -> dict[int, list[int]]:
        return {e: [i for at, indices, _ in self.seen if at == e for i in indices] for e, _, _ in self.seen}


def planned_by_hand(loop: Loop, epoch: int, rate: float | None, coverage: float | None) -> list[int]:
    history = SignificanceHistory(SIZE)
    for before in range(epoch):
        for at, indices, losses in loop.seen:
            if at == before:
                history.observe(torch.tensor(indices), losses)
        history.fold()
    draws = torch.randperm(SIZE, generator=torch.Generator().manual_seed(epoch))
    rate = rate_at_coverage(history.significance()[draws], coverage, "soft") if coverage else rate
    assert rate is not None
    count = planned_count(SIZE, rate, batch_size=BATCH, at_least=coverage is not None, min_selected=2)
    selector = SampleSelector(weighting="none")
    return plan_epoch(history, draws, epoch=epoch, count=count, selector=selector).indices.tolist()


@pytest.mark.parametrize("announces", [True, False], ids=["set_epoch", "by itself"])
@pytest.mark.parametrize("target", [{"target_activation_rate": 0.4}, {"target_coverage": 0.6}], ids=str)
def test_what_is_loaded_is_the_plan(target: Any, announces: bool) -> None:
    loop = Loop(SignificanceSampler(SIZE, batch_size=BATCH, **target)).run(4, announces=announces)
    epochs = loop.epochs()
    assert epochs[0] == torch.randperm(SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    for epoch in (1, 2, 3):
        rate, coverage = target.get("target_activation_rate"), target.get("target_coverage")
        assert epochs[epoch] == planned_by_hand(loop, epoch, rate, coverage)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [5, 13, 16, 18], ids="after {} batches".format)
def test_a_resumed_loop_goes_on_exactly(stop: int, workers: int) -> None:
    def make() -> Loop:
        return Loop(SignificanceSampler(SIZE, batch_size=BATCH), num_workers=workers)

    straight = make().run(3)
    first = make().run(3, stop=stop)
    saved = copy.deepcopy([first.sampler.state_dict(), first.net.state_dict(), first.optimizer.state_dict()])
    again = make()
    for part, state in zip((again.sampler, again.net, again.optimizer), saved, strict=True):
        part.load_state_dict(state)
    again.run(3)
    assert [s[:2] for s in first.seen + again.seen] == [s[:2] for s in straight.seen]
    assert torch.equal(again.net.weight, straight.net.weight)


def test_the_state_is_of_tensors_and_primitives(tmp_path: Path) -> None:
    sampler = Loop(SignificanceSampler(SIZE)).run(2).sampler
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    other = SignificanceSampler(SIZE)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    sampler.set_epoch(2)  # the epoch had ended
    assert torch.equal(other.plan.indices, sampler.plan.indices)
    with pytest.raises(ValueError, match="7 samples, got that of 100"):
        SignificanceSampler(7).load_state_dict(sampler.state_dict())


def test_a_sample_that_is_not_finite_is_not_planned() -> None:
    sampler = SignificanceSampler(10, target_activation_rate=0.5)
    sampler.observe(torch.arange(10), torch.tensor([torch.nan, torch.inf, *[1.0] * 8]))
    sampler.set_epoch(1)
    assert not {0, 1} & set(sampler)
    assert len(sampler) == 5


def test_scores_and_rules_of_ones_own() -> None:
    sampler = SignificanceSampler(10, target_activation_rate=0.3, gate="topk", warmup_epochs=0)
    sampler.history.begin_with(torch.arange(10.0))
    never = torch.zeros(10, dtype=torch.bool)
    never[9] = True
    sampler.history.rules = PlanRules(never=never, always=torch.arange(10) == 2)
    sampler.replan(0)
    assert sorted(sampler) == [2, 7, 8]


def _train(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def maximum(values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    sampler = SignificanceSampler(SIZE + 1, num_replicas=2, rank=rank, maximum=maximum, batch_size=BATCH)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for indices in DataLoader(range(SIZE + 1), sampler=sampler, batch_size=BATCH):  # type: ignore[arg-type]
            sampler.observe(indices, (indices * (epoch + 3)) % 11 / 11)
            seen.append((epoch, indices.tolist()))
    torch.save((seen, sampler.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_share_one_plan(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_train, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (first, state), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(state["history"]["recent"], other["history"]["recent"])
    history = SignificanceHistory(SIZE + 1)
    everyone = torch.arange(SIZE + 1)
    history.observe(everyone, (everyone * 3) % 11 / 11)
    history.fold()
    draws = torch.randperm(SIZE + 1, generator=torch.Generator().manual_seed(1))
    draws = torch.cat([draws, draws[:1]])
    count = planned_count(SIZE + 2, 0.4, batch_size=BATCH, processes=2, min_selected=2)
    plan = plan_epoch(history, draws, epoch=1, count=count, selector=SampleSelector(weighting="none"))
    parts = [[i for epoch, batch in seen if epoch == 1 for i in batch] for seen in (first, second)]
    assert [i for pair in zip(*parts, strict=True) for i in pair] == plan.indices.tolist()


def test_several_processes_need_a_maximum() -> None:
    with pytest.raises(ValueError, match="maximum= with num_replicas=2"):
        SignificanceSampler(10, num_replicas=2)
