"""No step of the warmup waits for the device."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ast.core.batch.inputs import all_finite, find_finite, replace_in_batch
from lightning_ast.core.history import SignificanceHistory
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.selection import quarantine as _quarantine
from lightning_ast.selection.quarantine import Quarantine
from lightning_ast.selection.step_state import BatchFacts, StepState
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, StopAfter, quiet_trainer
from tests.selection.plain_and_ours import BATCH, Quiet, assert_clean, data, ours


class NoData(SingleDeviceStrategy):
    """Trains on the ``meta`` device: every operation works, but nothing can be read. Who would wait for a GPU fails."""

    def __init__(self) -> None:
        class Accelerator(CPUAccelerator):
            def setup_device(self, device: torch.device) -> None:
                pass

        super().__init__(device=torch.device("meta"), accelerator=Accelerator())

    def teardown(self) -> None:
        pass


class OnItsWay:
    """News from the device that have not arrived."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer on the ``meta`` device. Two things are put in place of what that device cannot do: Lightning's own look
    at the loader's length before the fit, and the asynchronous copy, which the package has for CUDA alone.
    """

    def send(found: Any) -> None:
        assert found.bad.device.type == "meta"
        found.bad, found.arrived = torch.zeros(found.bad.shape, dtype=torch.bool), OnItsWay()

    monkeypatch.setattr("lightning.pytorch.loops.fit_loop.has_len_all_ranks", lambda *_, **__: True)
    monkeypatch.setattr(_quarantine, "_send", send)


def fit_without_data(few: Digits, callbacks: list[Any], cls: type[PlainNet] = Quiet) -> pl.Trainer:
    """Six warmup steps. The first batch, in which a sample is followed, may wait; here that fails, and is warned of."""

    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        strategy=NoData(),
        devices=1,
        callbacks=[*callbacks, StopAfter(6)],
        max_epochs=4,
        min_epochs=0,
        log_every_n_steps=1000,
        enable_model_summary=False,
        **defaults,
    )
    trainer.fit(fresh(cls), data(few))
    assert trainer.global_step == 6
    return trainer


@pytest.mark.usefixtures("meta")
def test_without_the_callback_nothing_is_waited_for_and_who_waits_fails(few: Digits) -> None:
    class Waits(Quiet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            loss.item()
            return loss

    fit_without_data(few, [])
    with pytest.raises(RuntimeError, match="meta"):
        fit_without_data(few, [], Waits)


@pytest.mark.filterwarnings("ignore:lightning-ast. the run ended after", "ignore:lightning-ast. which rows belong")
@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_warmup_step_waits_for_no_device(few: Digits, mode: str, warmup: int) -> None:
    """In ``prune`` with a warmup of one epoch the scores of the steps are remembered, too."""
    callbacks = ours(mode, warmup=warmup)
    trainer = fit_without_data(few, callbacks)
    assert callbacks[0].ledger.offered == 6 * BATCH
    assert_clean(trainer, trainer.lightning_module)


def test_looking_for_samples_that_are_not_finite_waits_for_no_device() -> None:
    x, y = torch.rand(8, 3, device="meta"), torch.randint(0, 3, (8,), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        all_finite(x)
    finite = find_finite((x, y), 8)
    assert finite is not None
    assert (finite.shape, finite.device.type) == ((8,), "meta")
    replaced = replace_in_batch((x, y), finite)
    assert [(t.shape, t.dtype) for t in replaced] == [(x.shape, x.dtype), (y.shape, y.dtype)]
    quarantine, plan = Quarantine(0.01, Processes(quiet_trainer())), StepState(BatchFacts(size=8))
    memory = StorageWeakRef(x.untyped_storage())
    quarantine.examine(plan, (x, y))
    assert StorageWeakRef(x.untyped_storage()) != memory
    quarantine.restore()
    assert StorageWeakRef(x.untyped_storage()) == memory
    assert plan.bad.shape == (8,)
    assert not plan.known_bad
    assert quarantine.eligible(plan, torch.rand(8, device="meta"), plan.bad).shape == (8,)
    assert quarantine.lost(torch.rand((), device="meta")) is False


def test_what_says_that_it_waits_for_no_device_does_not() -> None:
    SignificanceHistory(20).observe(torch.arange(8), torch.rand(8, device="meta"))


class SwitchesSync(pl.Callback):
    """In the steady state an operation that waits for the GPU raises: from one batch's start to its end."""

    def __init__(self, after: int) -> None:
        self.after, self.steps = after, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        logs = (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % trainer.log_every_n_steps == 0
        strict = trainer.global_step >= self.after and not logs
        self.steps += strict
        torch.cuda.set_sync_debug_mode("error" if strict else "default")

    def on_train_epoch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")


class StopsAfterWarmup(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["plain", *MODES])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_warmup_step_on_a_gpu_waits_for_nothing(digits: Digits, mode: str) -> None:
    """What raises in ``plain`` is Lightning's own."""
    switch = SwitchesSync(after=4)
    trainer = quiet_trainer(
        accelerator="gpu",
        callbacks=[switch, *([] if mode == "plain" else ours(mode)), StopsAfterWarmup()],
        max_epochs=2,
        log_every_n_steps=1000,
    )
    try:
        trainer.fit(fresh(Quiet), data(digits, pin_memory=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert switch.steps >= 16
