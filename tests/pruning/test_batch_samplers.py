"""Batch samplers of the user's own keep their groups: what reaches the model is what the plan leaves of each batch."""

from __future__ import annotations

import itertools
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset, default_collate

from lightning_ast import SparseLossMixin
from lightning_ast.core import even_count
from lightning_ast.core.gate import floor_for
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.own_batch_samplers import MADE, Batches, Lengths, OwnRandom, Recorded, batches_by_hand, length_of
from tests.pruning.prune_by_hand import SIZE, Cycle, Indexed, Witness, fit, fresh, history_by_hand, loader, pruned

pytestmark = pytest.mark.filterwarnings("ignore:lightning-ast. prune_steps=.* leaves")


class Lengthy(pl.Callback):
    """What Lightning was told of each epoch's length when it began."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.told.append(int(trainer.num_training_batches))


def batches_of(module: Witness) -> dict[int, Batches]:
    return {epoch: [b[2] for b in module.batches if b[0] == epoch] for epoch in sorted({b[0] for b in module.batches})}


CASES = [(kind, steps, 0) for kind in MADE for steps in ("keep", "follow", "replan")]
CASES += [("lengths", "keep", 2), ("grouped", "follow", 2)]


@pytest.mark.parametrize(("kind", "steps", "workers"), CASES, ids=str)
def test_what_reaches_the_model_is_what_the_plan_leaves_of_each_batch(kind: str, steps: Any, workers: int) -> None:
    sampler, lengths = Recorded(MADE[kind]()), Lengthy()
    groups = getattr(sampler, "group_ids", None)
    module = fresh(Cycle)
    torch.manual_seed(1)
    data = loader(batch_sampler=sampler, batch_size=1, num_workers=workers)
    callback = pruned(prune_steps=steps)
    trainer = fit(module, data, callback, lengths)
    seen = batches_of(module)
    drawn = sampler.drawn[-4:]
    assert seen[0] == drawn[0]
    assert seen[3] == drawn[3]
    for epoch in (1, 2):
        offered = sum(map(len, drawn[epoch]))
        size = round(offered / len(drawn[epoch])) if steps == "keep" else 0
        count = even_count(offered, 0.4, batches=len(sampler), batch_size=size, min_selected=2)
        refills = steps == "follow"
        planned = batches_by_hand(module, drawn[epoch], epoch=epoch, count=count, groups=groups, refills=refills)
        assert seen[epoch] == planned
        assert all(len(batch) > 1 or batch in drawn[epoch] for batch in seen[epoch]), "one sample only as drawn"
        if groups is not None and kind == "grouped":
            assert all(len({groups[index] for index in batch}) == 1 for batch in seen[epoch])
        if refills and kind == "grouped":
            assert len(seen[epoch]) < 0.7 * len(sampler)
    assert lengths.told == [len(seen[epoch]) for epoch in range(4)]
    assert trainer.global_step == sum(lengths.told)
    assert module.steps == 4 * len(sampler), "the schedule ends with the run"
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == module.steps
    sparse = callback.ledger.stages["sparse"]
    assert sparse.selected == sum(len(batch) for epoch in (1, 2) for batch in seen[epoch])
    assert sparse.offered == sum(len(batch) for epoch in (1, 2) for batch in drawn[epoch])


@pytest.mark.parametrize(("kind", "workers"), [("lengths", 2), ("grouped", 0)], ids=str)
def test_dense_epochs_are_bitwise_the_plain_run(kind: str, workers: int) -> None:
    results = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        module = fresh(Cycle)
        torch.manual_seed(5)
        data = loader(batch_sampler=MADE[kind](), batch_size=1, num_workers=workers, dataset=Indexed(noise=0.1))
        quiet_trainer(callbacks=callbacks, max_epochs=3).fit(module, data)
        results.append((module, torch.rand(3)))
    (plain, after), (ours, our_after) = results
    assert ours.batches == plain.batches
    assert torch.equal(after, our_after)
    assert_same_weights(weights(plain), weights(ours))


LIMITS = {
    "no warmup": {"warmup": 0},
    "limited": {"limit_train_batches": 8},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1},
    "accumulated": {"accumulate_grad_batches": 4},
    "validated": {"val_check_interval": 0.5, "num_sanity_val_steps": 0},
    "a list": {"batch_sampler": [[*range(start, start + 20)] for start in range(0, SIZE, 20)]},
}


@pytest.mark.parametrize("steps", ["keep", "follow"])
@pytest.mark.parametrize("name", LIMITS)
def test_lengths_are_announced_whatever_the_trainer_limits(name: str, steps: Any) -> None:
    limits = dict(LIMITS[name])
    sampler = limits.pop("batch_sampler", None) or MADE["grouped"]()
    module, lengths, told = fresh(Cycle), Lengthy(), []

    class Validated(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
            told.append((trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready))

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(batch_sampler=sampler, batch_size=1)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=150)

    trainer = fit(module, Data(), pruned(prune_steps=steps), lengths, Validated(), **limits)
    seen = batches_of(module)
    assert [len(seen[epoch]) for epoch in range(4)] == lengths.told
    most = limits.get("limit_train_batches", len(sampler))
    assert lengths.told[3] == most
    assert (lengths.told[1] < most) == (steps == "follow" and name != "a list")
    factor = limits.get("accumulate_grad_batches", 1)
    assert trainer.global_step == sum(-(-length // factor) for length in lengths.told)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == module.steps == 4 * -(-most // factor)
    each = 0.5 if name == "validated" else 1.0
    due = [(epoch, int(length * each) * part) for epoch, length in enumerate(lengths.told) for part in (1, 2)]
    assert [point for point in told if point[1]] == [point for point in due if point[1] <= lengths.told[point[0]]]


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_a_coverage_decides_how_much_of_each_batch_is_left(steps: Any) -> None:
    module, lengths = fresh(Cycle), Lengthy()
    callback = pruned(target_activation_rate=None, target_coverage=0.6, prune_steps=steps, gate="topk")
    fit(module, loader(batch_sampler=MADE["grouped"](), batch_size=1), callback, lengths, max_epochs=6)
    seen = batches_of(module)
    assert [len(seen[epoch]) for epoch in range(6)] == lengths.told
    assert sum(map(len, seen[1])) < 0.6 * SIZE
    assert callback.coverage == 1.0, "the last epoch is a dense one"
    assert callback.ledger.activation_rate < 1


POINTS = [("epoch end", 1, None), ("batch end", 0, 3), ("batch end", 2, 1), ("batch end", 3, 5)]


@pytest.mark.parametrize("steps", ["keep", "follow"])
@pytest.mark.parametrize(("kind", "workers"), [("grouped", 0), ("grouped", 2), ("classes", 0)], ids=str)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Any, kind: str, steps: Any, workers: int) -> None:
    def run(*saves: pl.Callback, seed: int, ckpt_path: Any = None) -> tuple[Any, Any, Any]:
        module = fresh(Cycle, seed=seed, batchnorm=False)
        torch.manual_seed(seed + 100)
        dataset = Indexed(noise=0.0 if workers else 0.1)  # workers draw from generators of their own
        data = loader(batch_sampler=MADE[kind](), batch_size=1, num_workers=workers, dataset=dataset)
        callback = pruned(prune_steps=steps, weighting="sqrt")
        fit(module, data, callback, *saves, ckpt_path=ckpt_path)
        return module, torch.rand(1), callback.state_dict()

    points = [POINTS[2]] if workers else POINTS
    straight, after, before = run(*(SaveAt(tmp_path / f"{p[:2]}", *p) for p in points), seed=0)
    for point in points:
        again, our_after, now = run(seed=7, ckpt_path=tmp_path / f"{point[:2]}")
        assert 0 < len(again.batches) < len(straight.batches)
        assert [b[:3] for b in again.batches] == [b[:3] for b in straight.batches[-len(again.batches) :]], point
        assert_same_weights(weights(straight), weights(again))
        assert torch.equal(after, our_after)
        for name in ("scores", "recent"):
            assert torch.equal(before["epochs"]["history"][name], now["epochs"]["history"][name])
        assert before["ledger"]["stages"]["sparse"]["selected"] == now["ledger"]["stages"]["sparse"]["selected"]


SOURCES: dict[str, Any] = {
    "python": random.Random,
    "numpy": np.random.default_rng,
    "numpy, as it was": np.random.RandomState,
    "numpy, Philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_resumed_run_goes_on_with_the_samplers_own_generator(tmp_path: Any, name: str) -> None:
    path = tmp_path / "run.ckpt"

    def run(*saves: pl.Callback, ckpt_path: Any = None) -> Any:
        module = fresh(batchnorm=False)
        fit(
            module,
            loader(batch_sampler=OwnRandom(SOURCES[name](3)), batch_size=1),
            pruned(),
            *saves,
            ckpt_path=ckpt_path,
        )
        return module

    straight, again = run(SaveAt(path, "batch end", 1, 2)), run(ckpt_path=path)
    assert [b[:3] for b in again.batches] == [b[:3] for b in straight.batches[-len(again.batches) :]]


@pytest.mark.parametrize(("weighting", "power"), [("unbiased", 1.0), ("sqrt", 0.5)])
def test_weights_belong_to_their_samples(weighting: Any, power: float) -> None:
    """The weighted mean of a batch estimates that of the batch as it was drawn: p by the threshold of the whole plan."""
    sampler, module, seen = Recorded(Lengths()), fresh(), []
    callback = pruned(weighting=weighting)

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            plan, threshold = callback.session.epochs.epoch.plan, callback.session.selector.last_threshold
            if callback.stage == "sparse" and not seen:
                seen.append((trainer.current_epoch, plan, float(threshold)))

    fit(module, loader(batch_sampler=sampler, batch_size=1), callback, Weights(), gradient_clip_val=None)
    ((epoch, plan, threshold),) = seen
    scores = history_by_hand(module, epoch).significance().double()
    weight_of = dict(zip(plan.indices.tolist(), plan.weights.tolist()))
    drawn = sampler.drawn[-4:][epoch]
    checked = 0
    for batch, whole in zip(batches_of(module)[epoch], drawn):
        assert set(batch) <= set(whole)
        for index in batch:
            probability = min(1.0, max(float(scores[index]) / threshold, floor_for(0.4)))
            ratio = len(batch) / len(whole)
            if len(batch) > 2:  # else one of them may have been brought back
                assert weight_of[index] == pytest.approx(probability**-power * ratio, rel=1e-3)
                checked += 1
    assert checked > 50


def test_a_batch_is_never_left_with_one_sample() -> None:
    """Pairs of which few are planned: one that is planned alone brings its companion along."""
    pairs = [[index, index + 1] for index in range(0, 80, 2)]
    module = fresh()
    with pytest.warns(match="'replan' leaves 2 samples in each batch of 2"):
        fit(module, loader(batch_sampler=pairs, batch_size=1), pruned(target_activation_rate=0.1))
    assert batches_of(module)[1] == pairs, "as many batches as a dense epoch, and none of one sample"
    module = fresh()
    settings = {"target_activation_rate": 0.1, "prune_steps": "follow"}
    with pytest.warns(match="names its group_ids and prune_steps='follow'"):
        fit(module, loader(batch_sampler=pairs, batch_size=1), pruned(**settings))
    assert 4 <= len(batches_of(module)[1]) <= 8, "those with a planned sample"
    assert all(batch in pairs for batch in batches_of(module)[1])


def test_the_number_of_batches_is_not_taken_for_that_of_samples(recwarn: pytest.WarningsRecorder) -> None:
    """Half of 7 batches would be 4 where 3.5 are needed, which is no excess: of 224 samples it is exactly the half."""
    module = fresh()
    batches = [[*range(start, start + 32)] for start in range(0, 224, 32)]
    fit(module, loader(batch_sampler=batches, batch_size=1), pruned(target_activation_rate=0.5, prune_steps="keep"))
    assert len(module.epochs()[1]) == 112
    assert not [warning for warning in recwarn if "leaves" in str(warning.message)]


class Numbered(Sampler[int]):
    """Knows the number of the epoch, which Lightning tells it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Changing(Lengths):
    """Has fewer batches from epoch to epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Numbered()

    def __iter__(self) -> Any:
        return itertools.islice(super().__iter__(), len(self))

    def __len__(self) -> int:
        return len(self.batches) - 2 * self.sampler.epoch


class Seeded(Lengths):
    """Shuffles by the number of the epoch, which the user's hook tells it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.epoch)
        return super().__iter__()


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_the_users_own_hook_may_number_the_epochs(tmp_path: Any, steps: Any) -> None:
    class Telling(Witness):
        def on_train_epoch_start(self) -> None:
            self.trainer.train_dataloader.batch_sampler.set_epoch(self.current_epoch)

    paths = [tmp_path / "middle.ckpt", tmp_path / "end.ckpt"]
    saves = [SaveAt(paths[0], "batch end", 1, 2), SaveAt(paths[1], "epoch end", 1)]
    sampler, straight = Recorded(Seeded()), fresh(Telling, batchnorm=False)
    sampler.set_epoch = sampler.sampler.set_epoch
    fit(straight, loader(batch_sampler=sampler, batch_size=1), pruned(prune_steps=steps), *saves)
    for epoch, drawn in enumerate(sampler.drawn[-4:]):
        expected = Seeded()
        expected.set_epoch(epoch)
        assert drawn == list(expected)
    for path in paths:
        again = fresh(Telling, seed=7, batchnorm=False)
        fit(again, loader(batch_sampler=Seeded(), batch_size=1), pruned(prune_steps=steps), ckpt_path=path)
        assert [b[:3] for b in again.batches] == [b[:3] for b in straight.batches[-len(again.batches) :]]


@pytest.mark.parametrize("options", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=str)
def test_epochs_may_differ_in_length(tmp_path: Any, options: Any) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(batch_sampler=Changing(), batch_size=1)

    path, lengths = tmp_path / "run.ckpt", Lengthy()
    module, again = fresh(batchnorm=False), fresh(batchnorm=False)
    val = DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=150)
    fit(module, Data(), pruned(), lengths, SaveAt(path, "batch end", 1, 2), **options)
    assert lengths.told == [len(Lengths()) - 2 * epoch for epoch in range(4)]
    assert [len(batches) for batches in batches_of(module).values()] == lengths.told
    fit(again, Data(), pruned(), ckpt_path=path, **options)
    assert [b[:3] for b in again.batches] == [b[:3] for b in module.batches[-len(again.batches) :]]
    ends = Lengthy()
    fit(fresh(), loader(batch_sampler=Changing(), batch_size=1), pruned(prune_steps="follow"), ends, val=val)
    assert ends.told[3] == lengths.told[3]


class Shorter(Lengths):
    def __len__(self) -> int:
        return len(self.batches) + 1


class Named(Lengths):
    group_ids = (length_of(index) for index in range(SIZE))


REFUSED = [
    (Shorter, {}, r"Shorter drew 30 batches where its length was 31"),
    (lambda: iter([[0, 1]] * 4), {}, "the batch sampler has no __len__"),
    (lambda: [[0, 1], ["2", "3"]], {}, "a batch sampler of lists of dataset indices: list yields others"),
    (lambda: [0, 1, 2, 3], {}, "a batch sampler of lists of dataset indices: list yields others"),
    (lambda: [[0, 1], [2, SIZE]], {}, r"list drew indices outside \[0, 300\)"),
    (MADE["grouped"], {"val_check_interval": 3}, "val_check_interval=3 may be more than the batches"),
]


@pytest.mark.parametrize(("make", "limits", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_planned_is_refused_before_the_first_batch(make: Any, limits: Any, message: str) -> None:
    module = fresh()
    val = DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=150)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, loader(batch_sampler=make(), batch_size=1), pruned(prune_steps="follow"), val=val, **limits)
    assert module.batches == []


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_scores_find_their_samples_where_collating_sorts_a_batch(steps: Any) -> None:
    """As for packed sequences: the longest first."""

    def longest_first(rows: list[Any]) -> Any:
        return default_collate(sorted(rows, key=lambda row: -length_of(row[2])))

    class Told(SparseLossMixin, Witness):
        def sample_indices(self, batch: Any) -> Any:
            return batch[2]

    module, callback = fresh(Told), pruned(prune_steps=steps)
    fit(module, loader(batch_sampler=MADE["grouped"](), batch_size=1, collate_fn=longest_first), callback)
    callback.session.epochs.history.fold()
    found = callback.session.epochs.history.significance()
    torch.testing.assert_close(found, history_by_hand(module, 4).significance(), rtol=1e-3, atol=1e-5)


def test_groups_are_named_for_each_sample() -> None:
    sampler = MADE["grouped"]()
    sampler.group_ids = [*sampler.group_ids, 0]
    with pytest.raises(ConfigurationError, match="group_ids names the groups of 301 samples, and the dataset has 300"):
        fit(fresh(), loader(batch_sampler=sampler, batch_size=1), pruned())
