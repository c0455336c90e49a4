"""Schedules in real runs: endless and finite loaders, limits in steps and in time, and runs that stay dense."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ast import ConfigurationError, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from tests.helpers.modules import OneLayer
from tests.helpers.training import SaveAt, StopAfter, fit, quiet_trainer

BATCHES = 4


def rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=generator), torch.arange(count) % 3


class Stream(IterableDataset):
    """Samples without a length, of so many batches an epoch, or endless."""

    def __init__(self, batches: int | None = None) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        x, y = rows(8)
        number = 0
        while self.batches is None or number < self.batches:
            yield from zip(x, y, strict=True)
            number += 1


class TwoOptimizers(OneLayer):
    """Manual optimization, two steps a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        loss = F.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net, self.other)]


class Stages(pl.Callback):
    """Writes down the first letter of the stage of every batch."""

    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection = selection
        self.seen = ""

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += self.selection.stage[0]


def sized() -> DataLoader:
    return DataLoader(TensorDataset(*rows(8 * BATCHES)), batch_size=8)


def stream(batches: int | None = None) -> DataLoader:
    return DataLoader(Stream(batches), batch_size=8)


def run(
    schedule: dict[str, Any] | None,
    data: DataLoader | None = None,
    *extra: pl.Callback,
    module: pl.LightningModule | None = None,
    mode: Any = "partial",
    first: bool = True,
    ckpt_path: Path | None = None,
    **options: Any,
) -> str:
    """Train, and return the stages of the batches."""
    selection = SparseSelectionCallback(mode=mode)
    stages = Stages(selection)
    chain = [selection, stages, *extra]
    if schedule is not None:
        chain.insert(0 if first else len(chain), TwoStageScheduler(**schedule))
    limits = {"max_epochs": None, **options}
    quiet_trainer(callbacks=chain, **limits).fit(
        module or OneLayer(), sized() if data is None else data, ckpt_path=ckpt_path
    )
    return stages.seen


def test_whole_epochs() -> None:
    assert run(None, max_epochs=1) == "ssss", "without a scheduler every step is sparse"
    for first in (True, False):
        both = {"warmup_epochs": 1, "cooldown_epochs": 1}
        assert run(both, first=first, max_epochs=3) == "wwwwsssscccc", "whatever the order of the callbacks"
    assert run({"warmup_epochs": 1}, max_epochs=-1, max_steps=6) == "wwwwss"
    assert run({"warmup_epochs": 1}, None, StopAfter(6), max_epochs=-1) == "wwwwss", "a run without a known end"


def test_shares_of_epochs() -> None:
    assert run({"warmup_epochs": 0.25}, max_epochs=1) == "wsss"
    assert run({"warmup_epochs": 0.25, "cooldown_epochs": 0.25}, max_epochs=-1, max_steps=8) == "wwsssscc"
    assert run({"warmup_epochs": 0.5}, max_epochs=2, accumulate_grad_batches=2) == "wwwwssss"


def test_target_of_the_scheduler_wins() -> None:
    selection = SparseSelectionCallback(target_activation_rate=0.9)
    scheduler = TwoStageScheduler(warmup_epochs=0, target_activation_rate=0.25)
    with pytest.warns(UserWarning, match="TwoStageScheduler counts, 0.25"):
        fit(OneLayer(), sized(), selection, scheduler, max_epochs=2)
    assert selection.ledger.activation_rate == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("data", [sized, stream, lambda: stream(3)], ids=["finite", "endless", "unsized"])
def test_shares_of_max_steps(data: Any) -> None:
    schedule = {"warmup_epochs": 0.2, "cooldown_epochs": 0.3}
    assert run(schedule, data(), max_steps=10) == "wwsssssccc"
    assert run({"warmup_steps": 3, "cooldown_steps": 2}, data(), max_steps=10) == "wwwssssscc"


def test_the_limit_that_is_reached_first() -> None:
    assert run({"warmup_epochs": 0.5}, max_epochs=1, max_steps=100) == "wwss"
    assert run({"warmup_epochs": 0.5}, max_epochs=100, max_steps=6) == "wwwsss"
    assert run({"cooldown_steps": 3, "warmup_steps": 1}, max_epochs=2, max_steps=100) == "wsssssssccc"[:5] + "ccc"
    assert run({"cooldown_steps": 3, "warmup_steps": 1}, max_epochs=9, max_steps=6) == "wssccc"


def test_steps_are_optimizer_steps() -> None:
    assert run({"warmup_steps": 1}, stream(), max_steps=3, accumulate_grad_batches=2) == "wwssss"
    assert run({"warmup_epochs": 0.5}, stream(), max_steps=4, accumulate_grad_batches=2) == "wwwwssss"
    growing = GradientAccumulationScheduler({0: 1, 1: 2})
    assert run({"warmup_steps": 5, "cooldown_steps": 1}, None, growing, max_epochs=3) == "wwww" + "wwss" + "sscc"


def test_manual_optimization_counts_every_optimizer() -> None:
    assert run({"warmup_epochs": 0.5}, stream(), module=TwoOptimizers(), max_steps=8) == "wwss"
    assert run({"warmup_steps": 2, "cooldown_steps": 2}, module=TwoOptimizers(), max_steps=8) == "wssc"
    with pytest.raises(ConfigurationError, match="give a share of the run, or cooldown_steps"):
        run({"cooldown_epochs": 1}, module=TwoOptimizers(), max_steps=8)


@pytest.mark.parametrize("batch", [3, 5])
def test_resume_in_mid_epoch(batch: int, tmp_path: Path) -> None:
    schedule = {"warmup_steps": 2, "cooldown_steps": 1}
    options = {"max_steps": 4, "accumulate_grad_batches": 2}
    path = tmp_path / "mid.ckpt"
    whole = run(schedule, stream(), SaveAt(path, "batch end", 0, batch - 1), **options)
    assert whole == "wwwwsscc"
    rest = run(schedule, stream(), ckpt_path=path, **options)
    assert whole.endswith(rest), "also from the midst of an accumulation window"
    assert "sscc".endswith(rest[-4:])


def test_resume_in_mid_epoch_finds_its_stage(tmp_path: Path) -> None:
    """Lightning does not call on_train_epoch_start then: the stage follows from the step."""
    path = tmp_path / "mid.ckpt"
    whole = run({"warmup_epochs": 0.5}, None, SaveAt(path, "batch end", 0, 2), max_epochs=1)
    assert whole == "wwss"
    assert run({"warmup_epochs": 0.5}, max_epochs=1, ckpt_path=path) == "s"


def test_limits_that_are_no_steps() -> None:
    done = run({"warmup_steps": 2}, None, max_time=timedelta(seconds=0.5))
    assert done.startswith("wws"), "max_time alone: steps and whole epochs can be counted"
    with pytest.raises(ConfigurationError, match=r"known length.*max_time"):
        run({"warmup_epochs": 0.1}, max_time=timedelta(seconds=5))
    assert run({"warmup_steps": 2}, None, StopAfter(5), max_epochs=-1) == "wwsss"


# ------------------------------------------------------------------ a run that stays dense


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ({"warmup_steps": 10}, {"max_steps": 10}),
        ({"warmup_steps": 8}, {"max_epochs": 2}),
        ({"warmup_epochs": 0.99}, {"max_steps": 10}),
        ({"warmup_epochs": 3}, {"max_epochs": 9, "max_steps": 12}),
        ({"warmup_steps": 2, "cooldown_steps": 3}, {"max_steps": 10, "max_epochs": 1}),
    ],
)
def test_a_run_without_a_sparse_step_is_refused(schedule: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="leave no sparse step"):
        run(schedule, **options)


def test_a_whole_warmup_over_an_endless_loader_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="ended after 5 optimizer steps without a sparse one"), caplog.at_level("INFO"):
        assert run({"warmup_epochs": 1}, stream(), max_steps=5) == "wwwww"
    assert "when warmup_epochs=1 ends is not known" in caplog.text


def test_the_first_epoch_shows_it(recwarn: pytest.WarningsRecorder) -> None:
    seen = run({"warmup_epochs": 4}, stream(3), max_steps=8)
    warned = [str(w.message) for w in recwarn if "lightning-ast" in str(w.message)]
    assert seen == "w" * 8
    assert len(warned) == 1
    assert "an epoch has 3 optimizer steps, so warmup_epochs=4 will leave no sparse step" in warned[0]


def test_manual_steps_use_a_run_up(recwarn: pytest.WarningsRecorder) -> None:
    """Two steps a batch: max_steps=10 are 5 batches, and a warmup of 2 epochs takes 8 of them."""
    assert run({"warmup_epochs": 2}, module=TwoOptimizers(), max_steps=10) == "wwwww"
    warned = [str(w.message) for w in recwarn if "lightning-ast" in str(w.message)]
    assert len(warned) == 1
    assert "an epoch has 8 optimizer steps" in warned[0]


@pytest.mark.parametrize("case", ["unsized", "manual"])
def test_a_warmup_in_steps_that_the_epochs_do_not_reach(case: str, recwarn: pytest.WarningsRecorder) -> None:
    """Certain behind the first epoch, not only at the end."""
    data, module = (stream(3), None) if case == "unsized" else (None, TwoOptimizers())
    assert set(run({"warmup_steps": 1000}, data, module=module, max_epochs=3)) == {"w"}
    warned = [str(w.message) for w in recwarn if "lightning-ast" in str(w.message)]
    assert len(warned) == 1
    assert "so warmup_steps=1000 will leave no sparse step in this run of 3 epochs" in warned[0]


@pytest.mark.parametrize("end", ["early", "time"])
def test_an_early_end_is_warned_of(end: str) -> None:
    stop = EarlyStopping("loss", patience=1, min_delta=100.0) if end == "early" else StopAfter(1)
    with pytest.warns(UserWarning, match="without a sparse one: all of it is dense"):
        run({"warmup_epochs": 5}, None, stop, max_epochs=20)


# ------------------------------------------------------------------ prune: whole epochs


def test_prune_rounds_steps_to_whole_epochs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        seen = run({"warmup_steps": 7, "cooldown_steps": 3}, mode="prune", max_epochs=5)
    assert seen == "w" * 2 * BATCHES + "ss" * 2 + "c" * BATCHES
    assert "the first 2 are the warmup and the last 1 the cooldown" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        assert run({"warmup_steps": 4}, mode="prune", max_epochs=2) == "wwwwss"
    assert "whole epochs" not in caplog.text, "it is exactly one"


def test_prune_within_max_steps() -> None:
    assert run({"warmup_epochs": 0.25}, mode="prune", max_steps=10) == "wwww" + "ss" * 3
    with pytest.raises(ConfigurationError, match="no epoch would be pruned"):
        run({"warmup_steps": 7}, mode="prune", max_steps=8)
    with pytest.raises(ConfigurationError, match="give epochs"):
        run({"warmup_steps": 4}, mode="prune", module=TwoOptimizers(), max_epochs=3)


# ------------------------------------------------------------------ fast_dev_run


@pytest.mark.parametrize("mode", ["partial", "subset", "mask", "prune"])
@pytest.mark.parametrize("batches", [1, 3])
def test_a_smoke_test_selects(mode: str, batches: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        seen = run({"warmup_epochs": 5, "cooldown_steps": 3}, mode=mode, fast_dev_run=batches)
    assert set(seen) == {"s"}
    assert caplog.text.count("fast_dev_run trains every batch sparsely") == 1
    assert "warmup_epochs=5 and cooldown_steps=3" in caplog.text


def test_a_smoke_test_over_an_endless_loader_and_with_faults(caplog: pytest.LogCaptureFixture) -> None:
    assert run({"warmup_epochs": 0.5}, stream(), fast_dev_run=2) == "ss"
    assert run({"warmup_epochs": 1}, module=TwoOptimizers(), fast_dev_run=2) == "s"
    with pytest.raises(ConfigurationError, match="warmup_steps: expected an int"):
        run({"warmup_steps": -1}, fast_dev_run=True)
    caplog.clear()
    with caplog.at_level("INFO"):
        run({"warmup_epochs": 0}, fast_dev_run=True)
    assert "sparsely" not in caplog.text, "nothing was left out"


# ------------------------------------------------------------------ the monitor's ETA


def test_the_monitor_knows_the_end_of_a_run_in_steps(capsys: pytest.CaptureFixture[str]) -> None:
    run({"warmup_steps": 4}, None, SparseTrainingMonitor(), max_steps=12)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert ["ETA" in line for line in lines] == [True, True, False]


@pytest.mark.parametrize(("given", "kept"), [(1.0, 1), (3.0, 3), (0.0, 0.0), (0.25, 0.25), (1.5, 1.5)])
def test_a_whole_float_counts_epochs(given: float, kept: float) -> None:
    schedule = TwoStageScheduler(warmup_epochs=given, cooldown_epochs=given)
    for epochs in (schedule.warmup_epochs, schedule.cooldown_epochs):
        assert (epochs, type(epochs)) == (kept, type(kept))
