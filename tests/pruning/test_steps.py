"""The optimizer steps of a pruned epoch: as many as in a dense one, or fewer that schedules take for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from lightning_ast.core import even_count
from lightning_ast.errors import ConfigurationError
from lightning_ast.pruning.followed_steps import steps_due
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.prune_by_hand import SIZE, Witness, fit, fresh, loader, plan_by_hand, pruned

FULL = 10
"""Batches of 32 samples in a dense epoch of 300."""


class Scheduled(Witness):
    """Notes the learning rate of each optimizer step."""

    schedule: Any = "one-cycle"
    frequency = 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.steps = int(self.trainer.estimated_stepping_batches)
        made = {
            "one-cycle": lambda: OneCycleLR(optimizer, max_lr=0.2, total_steps=self.steps + 1),
            "cosine": lambda: CosineAnnealingLR(optimizer, T_max=self.steps),
            "milestones": lambda: MultiStepLR(optimizer, milestones=[FULL + 3, 2 * FULL + 5]),
            "linear warmup": lambda: LinearLR(optimizer, total_iters=self.steps // 2),
        }[self.schedule]()
        self.scheduler = made
        return [optimizer], [{"scheduler": made, "interval": "step", "frequency": self.frequency}]

    def on_fit_start(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_epoch_start(self) -> None:
        self.rates.append([])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.rates:  # a run that is resumed in the middle of an epoch is not told of its start
            self.rates[-1].append(optimizer.param_groups[0]["lr"])


def train(steps: str, *, schedule: str = "one-cycle", frequency: int = 1, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = Scheduled()
    module.schedule, module.frequency = schedule, frequency
    settings = options.pop("settings", {})
    scheduled = [GradientAccumulationScheduler(options.pop("scheduled"))] if "scheduled" in options else []
    trainer = fit(module, loader(), pruned(prune_steps=steps, **settings), *scheduled, **options)
    return module, trainer


def dense(**options: Any) -> tuple[Any, Any]:
    return train("keep", settings={"target_activation_rate": 1.0}, **options)


# ---------------------------------------------------------------------- as many steps


def test_kept_steps_share_the_samples_out_evenly() -> None:
    module, trainer = train("keep")
    sizes = {epoch: [len(i) for e, _, i, _ in module.batches if e == epoch] for epoch in {b[0] for b in module.batches}}
    assert sizes == {0: [32] * 9 + [12], 1: [12] * FULL, 2: [12] * FULL, 3: [32] * 9 + [12]}
    assert trainer.global_step == module.steps == 4 * FULL
    everyone = list(range(SIZE))
    assert module.epochs()[1] == plan_by_hand(module, everyone, epoch=1, count=120)


def test_kept_steps_have_the_schedule_of_the_dense_run() -> None:
    torch.manual_seed(0)
    plain = Scheduled()
    quiet_trainer(max_epochs=4).fit(plain, loader())  # without this callback
    assert train("keep")[0].rates == dense()[0].rates == plain.rates


def test_sizes_differ_by_one_at_most() -> None:
    module, _ = train("keep", settings={"target_activation_rate": 0.45})  # 135 samples
    sizes = [len(indices) for epoch, _, indices, _ in module.batches if epoch == 1]
    assert (sorted(sizes), sum(sizes)) == ([13] * 5 + [14] * 5, 135)


@pytest.mark.parametrize(
    ("offered", "rate", "processes", "expected"),
    [(300, 0.4, 1, 120), (300, 0.001, 1, 80), (300, 0.4, 2, 160), (301, 0.6, 2, 180), (300, 1.0, 1, 300)],
)
def test_even_counts(offered: int, rate: float, processes: int, expected: int) -> None:
    assert even_count(offered, rate, batches=10, batch_size=32, processes=processes) == expected


def test_even_counts_have_eight_samples_a_batch_and_the_minimum() -> None:
    assert even_count(300, 0.01, batches=75, batch_size=4) == 300
    assert even_count(320, 0.01, batches=20, batch_size=16) == 160
    assert even_count(10, 0.01, batches=10, batch_size=1) == 10, "batches of one have one"
    assert even_count(300, 0.1, batches=10, batch_size=32, min_selected=0.5) == 150


@pytest.mark.parametrize("options", [{"limit_train_batches": 7}, {"max_epochs": -1, "max_steps": 33}])
def test_kept_steps_with_limits(options: dict[str, Any]) -> None:
    module, trainer = train("keep", **options)
    assert trainer.global_step == module.steps == options.get("max_steps", 28)


def test_kept_steps_with_accumulation_and_a_last_batch_dropped() -> None:
    torch.manual_seed(0)
    module = Scheduled()
    data = loader(drop_last=True)
    trainer = fit(module, data, pruned(prune_steps="keep"), GradientAccumulationScheduler({0: 2, 2: 4}))
    assert trainer.global_step == module.steps == 2 * 5 + 2 * 3
    sizes = [len(indices) for epoch, _, indices, _ in module.batches if epoch == 1]
    assert (len(sizes), sum(sizes), max(sizes) - min(sizes)) == (9, round(0.4 * 288), 1)


# ---------------------------------------------------------------------- fewer steps, whose schedules follow


def ends(rates: list[list[float]]) -> list[float]:
    return [epoch[0] for epoch in rates]


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "milestones", "linear warmup"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"scheduled": {1: 4, 2: 2}}])
def test_followed_schedules_are_where_the_dense_run_is(schedule: str, options: dict[str, Any]) -> None:
    module, trainer = train("follow", schedule=schedule, **options)
    reference, dense_trainer = dense(schedule=schedule, **options)
    assert trainer.global_step < dense_trainer.global_step
    assert module.steps == reference.steps == dense_trainer.global_step
    assert ends(module.rates) == pytest.approx(ends(reference.rates), rel=1e-6), "at each epoch's start"
    assert module.rates[0] == reference.rates[0]
    assert module.scheduler.get_last_lr() == pytest.approx(reference.scheduler.get_last_lr(), rel=1e-6), "at the end"


def test_followed_schedules_within_an_epoch() -> None:
    """4 batches for 10: after the first, the schedule is where the dense run is after 2, then 5, 8 and 10."""
    module, reference = train("follow")[0], dense()[0]
    assert module.rates[1] == pytest.approx([reference.rates[1][i] for i in (0, 2, 5, 8)], rel=1e-6)


def test_the_metrics_own_scheduler_and_that_of_epochs_are_left_alone() -> None:
    class Others(Scheduled):
        def configure_optimizers(self) -> Any:
            (optimizer,), (by_step,) = super().configure_optimizers()
            self.plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=100)
            self.by_epoch = MultiStepLR(optimizer, milestones=[100])
            waiting = {"scheduler": self.plateau, "interval": "step", "monitor": "loss", "frequency": 1}
            return [optimizer], [by_step, waiting, {"scheduler": self.by_epoch, "interval": "epoch"}]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    torch.manual_seed(0)
    module = Others()
    fit(module, loader(), pruned(prune_steps="follow"))
    assert module.by_epoch.last_epoch == 4
    assert module.plateau.last_epoch == 2 * FULL + 2 * 4
    assert module.scheduler.last_epoch == 4 * FULL


def test_a_module_steps_its_schedulers_its_own_way() -> None:
    class Counts(Scheduled):
        calls = 0

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.calls += 1
            scheduler.step()

    torch.manual_seed(0)
    module = Counts()
    fit(module, loader(), pruned(prune_steps="follow"))
    assert module.calls == 4 * FULL


@pytest.mark.parametrize("dense_batches", [1, 7, 10, 100])
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_followed_steps_add_up(dense_batches: int, accumulate: int) -> None:
    for batches in range(1, dense_batches + 1):
        lengths = {"dense": dense_batches, "pruned": batches, "accumulate": accumulate}
        extra = [steps_due(done, **lengths) for done in range(1, batches + 1)]
        assert min(extra) >= 0
        ends = [n % accumulate == 0 or n == batches for n in range(1, batches + 1)]
        assert not any(due for due, is_end in zip(extra, ends) if not is_end), "between steps no rate may change"
        assert sum(ends) + sum(extra) == -(-dense_batches // accumulate)


def test_a_scheduler_that_leaves_steps_out_cannot_follow() -> None:
    with pytest.raises(ConfigurationError, match="set their frequency to 1"):
        train("follow", frequency=3)
    train("keep", frequency=3)


# ---------------------------------------------------------------------- both


@pytest.mark.parametrize("steps", ["keep", "follow"])
@pytest.mark.parametrize(
    "point", [("epoch end", 1, None), ("batch end", 1, 0), ("batch end", 1, 2), ("batch end", 2, 3)]
)
def test_resumes(tmp_path: Path, steps: str, point: Any) -> None:
    path = tmp_path / "point.ckpt"
    straight, trainer = train_from(steps, SaveAt(path, *point))
    again, resumed = train_from(steps, None, ckpt_path=path, seed=7)
    assert_same_weights(weights(straight), weights(again))
    assert again.batches == straight.batches[len(straight.batches) - len(again.batches) :]
    assert resumed.global_step == trainer.global_step
    assert again.scheduler.state_dict() == straight.scheduler.state_dict()


def train_from(steps: str, save: Any, *, ckpt_path: Any = None, seed: int = 0) -> tuple[Any, Any]:
    module = fresh(Scheduled, seed=seed)
    torch.manual_seed(seed + 100)
    callbacks = [pruned(prune_steps=steps), *([save] if save else [])]
    return module, fit(module, loader(shuffle=True), *callbacks, ckpt_path=ckpt_path)


class ByHand(Scheduled):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "settings", "options", "message"),
    [
        (ByHand, {"prune_steps": "follow"}, {}, "manual optimization"),
        (Scheduled, {"prune_steps": "follow"}, {"max_steps": 20}, "max_steps=20"),
        (Scheduled, {"prune_steps": "kept"}, {}, "Did you mean 'keep'"),
    ],
)
def test_what_cannot_be_is_refused(module: Any, settings: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(module(), loader(), pruned(**settings), **options)


def test_a_dry_run_follows() -> None:
    module = fresh(Scheduled)
    fit(module, loader(), pruned(prune_steps="follow"), fast_dev_run=True, warmup=0, cooldown=0)
    assert len(module.batches) == 1


def test_a_setting_of_another_mode_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="prune_steps='keep' has no effect in mode='mask'"):
        fit(fresh(), loader(), pruned(mode="mask", prune_steps="keep"), max_epochs=1, warmup=0, cooldown=0)
