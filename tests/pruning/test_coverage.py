"""A pruned epoch loads the fewest samples that carry a share of what is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler

from lightning_ast import SparseSelectionCallback
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import SaveAt, assert_same_weights, gloo, weights
from tests.pruning.prune_by_hand import SIZE, Indexed, Recorded, Witness, fit, fresh, history_by_hand, loader, pruned
from tests.pruning.test_steps import FULL, Scheduled, ends


def covering(**options: Any) -> SparseSelectionCallback:
    return SparseSelectionCallback(**{"mode": "prune", "target_coverage": 0.8, **options})


def fewest(scores: torch.Tensor, coverage: float) -> int:
    """Count by hand: take the largest one by one until they carry the share."""
    total, carried, count = float(scores.double().sum()), 0.0, 0
    for score in sorted(scores.double().tolist(), reverse=True):
        if carried >= coverage * total:
            break
        carried, count = carried + score, count + 1
    return count


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_the_fewest_samples_that_carry_the_share(steps: Any) -> None:
    module, callback = fresh(), covering(gate="topk", prune_steps=steps)
    trainer = fit(module, loader(shuffle=True, batch_size=100), callback, max_epochs=6)
    rates = []
    for epoch in range(1, 5):
        scores = history_by_hand(module, epoch).significance()
        loaded = module.epochs()[epoch]
        count = fewest(scores, 0.8)
        if steps == "keep":
            assert len(loaded) == count
            assert set(loaded) == set(scores.topk(count).indices.tolist())
        else:  # no last batch of a single sample
            assert abs(len(loaded) - count) <= 1
        rates.append(len(loaded) / SIZE)
    assert rates[-1] < rates[0] < 0.95, "what is left to learn is in fewer and fewer samples"
    assert callback.ledger.stages["sparse"].selected == round(sum(rates) * SIZE)
    assert callback.ledger.stages["sparse"].offered == 4 * SIZE
    if steps == "keep":
        assert trainer.global_step == 6 * 3


def test_the_soft_gate_covers_the_share_on_average() -> None:
    callback = covering()
    seen = []

    class Notes(Witness):
        def on_train_epoch_end(self) -> None:
            seen.append((callback.stage, callback.coverage, callback.activation_rate))

    module = fresh(Notes)
    fit(module, loader(shuffle=True, batch_size=100), callback, max_epochs=8)
    sparse = [(coverage, rate) for stage, coverage, rate in seen if stage == "sparse"]
    assert len(sparse) == 6
    assert sum(coverage for coverage, _ in sparse) / 6 == pytest.approx(0.8, rel=0.02)
    for epoch, (coverage, rate) in enumerate(sparse, start=1):
        scores = history_by_hand(module, epoch).significance().double()
        loaded = module.epochs()[epoch]
        assert rate == len(loaded) / SIZE
        assert coverage == pytest.approx(float(scores[loaded].sum() / scores.sum()), rel=1e-4)


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_nothing_to_skip_yet_loads_the_whole_epoch(steps: Any) -> None:
    """Where every sample matters alike there is nothing to leave out: as the dense run, bit by bit."""

    class Slow(Scheduled):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    plain = fresh(Slow)
    fit(plain, loader(), covering(target_coverage=1.0))
    module = fresh(Slow)
    callback = covering(target_coverage=0.99, prune_steps=steps)
    fit(module, loader(), callback, cooldown=0)
    assert [len(indices) for indices in module.epochs().values()] == [SIZE] * 4
    assert_same_weights(weights(plain), weights(module))
    totals = callback.ledger.stages["sparse"]
    assert (totals.steps, totals.dense_steps, totals.selected) == (3 * FULL, 3 * FULL, 3 * SIZE)
    assert callback.coverage == 1.0


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_what_is_never_offered_is_not_covered(steps: Any) -> None:
    sampler = Recorded(SubsetRandomSampler(range(0, SIZE, 3)))
    module, callback = fresh(), covering(gate="topk", prune_steps=steps)
    fit(module, loader(sampler=sampler, batch_size=50), callback)
    for epoch in (1, 2):
        scores = history_by_hand(module, epoch).significance()[sampler.drawn[epoch]]
        assert abs(len(module.epochs()[epoch]) - fewest(scores, 0.8)) <= 1


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_whole_batches_cover_no_less(steps: Any) -> None:
    """Of 288 samples in whole batches of 32, rounded up; a longer run comes near 8 a batch, of which "keep" warns."""
    module = fresh()
    fit(module, loader(drop_last=True), covering(gate="topk", prune_steps=steps), max_epochs=5)
    for epoch in range(1, 4):
        scores = history_by_hand(module, epoch).significance()[:288].double()
        loaded = module.epochs()[epoch]
        assert steps == "keep" or len(loaded) % 32 == 0
        assert float(scores[loaded].sum() / scores.sum()) >= 0.8 - 1e-6


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_before_anything_is_known_all_are_loaded(steps: Any) -> None:
    module, callback = fresh(), covering(prune_steps=steps)
    fit(module, loader(shuffle=True), callback, warmup=0)
    assert len(module.epochs()[0]) == SIZE
    assert callback.ledger.stages["sparse"].dense_steps == FULL
    assert len(module.epochs()[1]) < SIZE


def test_a_run_whose_only_sparse_epoch_is_the_first_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no epoch would be pruned: with target_coverage"):
        fit(fresh(), loader(shuffle=True), covering(), warmup=0, cooldown=0, max_epochs=1)
    scores = torch.arange(1.0, SIZE + 1).tolist()
    module = fresh()
    fit(module, loader(shuffle=True), covering(initial_scores=scores), warmup=0, cooldown=0, max_epochs=1)
    assert len(module.epochs()[0]) < SIZE


@pytest.mark.parametrize("steps", ["follow", "keep"])
def test_no_last_batch_of_few_samples(steps: Any) -> None:
    module = fresh()
    fit(module, loader(batch_size=64, shuffle=True), covering(prune_steps=steps), max_epochs=8)
    last = [len(indices) for epoch, _, indices, _ in module.batches if epoch > 0]
    assert min(last) >= 8


def test_small_batches_keep_eight_samples() -> None:
    module = fresh()
    with pytest.warns(UserWarning, match="prune_steps='keep' leaves 8 samples in each batch of 16"):
        fit(module, loader(batch_size=16), covering(target_coverage=0.2))
    assert {len(i) for e, _, i, _ in module.batches if e in (1, 2)} == {8}


def test_batches_of_eight_are_loaded_whole() -> None:
    module, callback = fresh(), covering(target_coverage=0.5)
    with pytest.warns(UserWarning, match="Use larger batches, or prune_steps='follow'"):
        fit(module, loader(batch_size=8), callback)
    totals = callback.ledger.stages["sparse"]
    assert totals.dense_steps == totals.steps == 2 * 38


@pytest.mark.filterwarnings("ignore:Total length of")
def test_less_than_a_batch_with_drop_last() -> None:
    module = fresh()
    fit(module, loader(dataset=Indexed(20), drop_last=True), covering(), warmup=0)
    assert module.batches == [], "as without this callback"


@pytest.mark.parametrize(("before", "after"), [("replan", "keep"), ("keep", "replan"), ("replan", "coverage")])
def test_a_schedule_does_not_go_on_with_other_steps(tmp_path: Path, before: Any, after: Any) -> None:
    def made(steps: str) -> SparseSelectionCallback:
        return covering() if steps == "coverage" else pruned(prune_steps=steps)

    path = tmp_path / "point.ckpt"
    fit(fresh(Scheduled), loader(), made(before), SaveAt(path, "epoch end", 1, None))
    message = f"counts the steps of prune_steps='{before}'"
    with pytest.raises(ConfigurationError, match=message):
        fit(fresh(Scheduled), loader(), made(after), ckpt_path=path)
    fit(fresh(), loader(), made(before), SaveAt(path, "epoch end", 1, None))  # without a schedule there is no harm
    fit(fresh(), loader(), made(after), ckpt_path=path)


def test_what_is_covered_is_what_the_sampler_offers() -> None:
    sampler = Recorded(WeightedRandomSampler(torch.linspace(0.1, 2, SIZE).tolist(), num_samples=200))
    module = fresh()
    torch.manual_seed(0)
    fit(module, loader(sampler=sampler), covering(gate="topk"))
    for epoch in (1, 2):
        scores = history_by_hand(module, epoch).significance()[sampler.drawn[epoch]]
        assert len(module.epochs()[epoch]) == fewest(scores, 0.8)


@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_schedules_are_those_of_the_dense_run(steps: Any) -> None:
    dense, module = fresh(Scheduled), fresh(Scheduled)
    fit(dense, loader(), covering(target_coverage=1.0))
    fit(module, loader(), covering(prune_steps=steps))
    assert module.steps == dense.steps == 4 * FULL
    assert ends(module.rates) == pytest.approx(ends(dense.rates), rel=1e-6)
    assert module.scheduler.get_last_lr() == pytest.approx(dense.scheduler.get_last_lr(), rel=1e-6)
    if steps == "follow":
        assert [len(rates) for rates in module.rates][1] < FULL


@pytest.mark.parametrize("steps", ["keep", "follow"])
@pytest.mark.parametrize(
    "point", [("epoch end", 0, None), ("epoch end", 1, None), ("batch end", 1, 2), ("batch end", 2, 0)]
)
def test_resumes(tmp_path: Path, steps: Any, point: Any) -> None:
    def train(*callbacks: Any, seed: int = 0, ckpt_path: Any = None) -> Any:
        module, callback = fresh(Scheduled, seed=seed), covering(prune_steps=steps)
        torch.manual_seed(seed + 100)
        sampler = WeightedRandomSampler(torch.linspace(0.1, 2, SIZE).tolist(), num_samples=250)
        fit(module, loader(sampler=sampler), callback, *callbacks, ckpt_path=ckpt_path)
        return module, callback

    path = tmp_path / "point.ckpt"
    straight, before = train(SaveAt(path, *point))
    again, after = train(seed=7, ckpt_path=path)
    assert again.batches == straight.batches[len(straight.batches) - len(again.batches) :]
    assert_same_weights(weights(straight), weights(again))
    assert again.scheduler.state_dict() == straight.scheduler.state_dict()
    assert before.ledger.stages["sparse"].selected == after.ledger.stages["sparse"].selected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("steps", ["keep", "follow"])
def test_two_ranks_have_one_plan(tmp_path: Path, steps: Any) -> None:
    class Saves(Scheduled):
        def on_train_end(self) -> None:
            torch.save((self.batches, weights(self)), tmp_path / f"{self.global_rank}.pt")

    torch.manual_seed(0)
    fit(Saves(), loader(shuffle=True), covering(gate="topk", prune_steps=steps), devices=2, strategy=gloo())
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, weight in ranks[0][1].items():
        assert "running" in name or torch.equal(weight, ranks[1][1][name])
    assert [(e, b, len(i)) for e, b, i, _ in ranks[0][0]] == [(e, b, len(i)) for e, b, i, _ in ranks[1][0]]
    witness = Witness()
    witness.batches = sorted((batch for batches, _ in ranks for batch in batches), key=lambda batch: batch[0])
    scores = history_by_hand(witness, 1).significance()
    loaded = witness.epochs()[1]
    count = fewest(scores, 0.8)
    assert abs(len(loaded) - count) <= 2, "the ranks have as many each"
    assert set(scores.topk(count - 2).indices.tolist()) <= set(loaded)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_rank_without_a_loss_in_a_whole_epoch() -> None:
    class Empty(Witness):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            nothing = sum(parameter.sum() * 0 for parameter in self.parameters())
            return nothing if self.global_rank and batch_idx == 1 else loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    fit(Empty(), loader(), covering(target_coverage=0.99), devices=2, strategy=gloo(), max_epochs=3)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"prune_steps": "replan"}, {}, "prune_steps='replan' needs to know the number of steps"),
        ({"prune_steps": "follow"}, {"val_check_interval": 3}, "val_check_interval=3"),
        ({"target_activation_rate": 0.4}, {}, "target_coverage"),
    ],
)
def test_what_cannot_be_is_refused(settings: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(fresh(), loader(), covering(**settings), **options)
