"""One callback object serves one fit at a time, and a Trainer takes one callback of a kind."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import (
    ConfigurationError,
    EnergyMonitor,
    PIController,
    SparseSelectionCallback,
    SparseTrainingMonitor,
    TwoStageScheduler,
)
from tests.helpers.modules import OneLayer
from tests.helpers.training import MODES, assert_same_weights, quiet_trainer, weights


class At(pl.Callback):
    """Does something in the midst of a fit, once."""

    def __init__(self, action: Callable[[], Any], batch: int = 1) -> None:
        self.action, self.batch = action, batch

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.action()


def data() -> DataLoader:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.arange(32) % 3), batch_size=8)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.LightningModule:
    quiet_trainer(callbacks=list(callbacks), **options).fit(module, data())
    return module


def selection(mode: Any = "partial", **options: Any) -> SparseSelectionCallback:
    return SparseSelectionCallback(mode=mode, **options)


def refused(callback: pl.Callback, *more: pl.Callback) -> pl.LightningModule:
    """Fit another module with a callback that is in use."""
    module = OneLayer()
    before = weights(module)
    with pytest.raises(ConfigurationError, match="belongs to a fit that is still running"):
        fit(module, callback, *more)
    assert "training_step" not in vars(module), "it is not wrapped"
    assert_same_weights(weights(module), before)
    return module


# ------------------------------------------------------------------ two fits at once


@pytest.mark.parametrize("mode", MODES)
def test_a_nested_fit_is_refused_and_the_first_goes_on(mode: str) -> None:
    alone = selection(mode)
    expected = weights(fit(OneLayer(), alone, max_epochs=2))
    callback, module = selection(mode), OneLayer()
    fit(module, callback, At(lambda: refused(callback)), max_epochs=2)
    assert_same_weights(weights(module), expected)
    assert callback.ledger.state_dict()["stages"]["sparse"]["selected"] == alone.ledger.selected
    assert "training_step" not in vars(module), "the wrapper is gone"
    assert_same_weights(weights(fit(OneLayer(), callback, max_epochs=2)), expected)  # it can be used again


def test_two_threads_with_one_object() -> None:
    callback, inside, errors = selection(), threading.Event(), []
    go_on = threading.Event()

    def first() -> None:
        fit(OneLayer(), callback, At(lambda: (inside.set(), go_on.wait(60))))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    try:
        fit(OneLayer(), callback)
    except ConfigurationError as error:
        errors.append(error)
    go_on.set()
    thread.join()
    assert len(errors) == 1
    assert callback.ledger.offered == 32, "the first fit came to its end"


def test_two_threads_with_two_objects() -> None:
    expected = weights(fit(OneLayer(), selection()))
    modules, barrier = [OneLayer(), OneLayer()], threading.Barrier(2)
    threads = [
        threading.Thread(target=fit, args=(module, selection(), At(lambda: barrier.wait(60)))) for module in modules
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for module in modules:
        assert_same_weights(weights(module), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_a_crash_it_can_be_used_again(error: type[BaseException]) -> None:
    def crash() -> None:
        raise error("stop")

    callback, monitor, energy = selection(), SparseTrainingMonitor(), EnergyMonitor(meters=[])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((error, SystemExit)):  # Lightning turns Ctrl+C into an exit, and ignores it from then on
        fit(OneLayer(), callback, monitor, energy, At(crash))
    signal.signal(signal.SIGINT, handler)
    expected = weights(fit(OneLayer(), selection()))
    assert_same_weights(weights(fit(OneLayer(), callback, monitor, energy)), expected)


def test_after_a_crash_that_it_was_not_told_of() -> None:
    class Breaks(pl.Callback):
        def on_exception(self, *_: Any) -> None:
            raise ValueError("this callback breaks while the exception is handled")

    def crash() -> None:
        raise RuntimeError("stop")

    callback, module = selection(), OneLayer()
    with pytest.raises(ValueError, match="breaks"):
        fit(module, Breaks(), callback, At(crash))
    expected = weights(fit(OneLayer(), selection()))
    assert_same_weights(weights(fit(OneLayer(), callback)), expected)
    assert "training_step" not in vars(module), "the new fit put the old module back"


def test_a_fault_of_another_callback_in_the_second_fit() -> None:
    """The second fit ends before the callback is asked, which hears of the exception all the same."""

    class Breaks(pl.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            raise ValueError("broken")

    def second() -> None:
        with pytest.raises(ValueError, match="broken"):
            fit(OneLayer(), Breaks(), callback)

    expected = weights(fit(OneLayer(), selection()))
    callback = selection()
    assert_same_weights(weights(fit(OneLayer(), callback, At(second))), expected)


def test_a_validation_with_the_same_object_leaves_the_fit_alone() -> None:
    def validate() -> None:
        quiet_trainer(callbacks=[callback]).validate(OneLayer(), data(), verbose=False)

    expected = weights(fit(OneLayer(), selection()))
    callback = selection()
    assert_same_weights(weights(fit(OneLayer(), callback, At(validate))), expected)


def test_a_checkpoint_that_another_trainer_loads_is_not_for_the_fit(tmp_path: Any) -> None:
    fit(OneLayer(), selection(), SaveLast(tmp_path / "other.ckpt"), max_epochs=3)

    def validate() -> None:
        quiet_trainer(callbacks=[callback]).validate(OneLayer(), data(), tmp_path / "other.ckpt", verbose=False)

    alone, callback = selection(), selection()
    expected = weights(fit(OneLayer(), alone, max_epochs=2))
    assert_same_weights(weights(fit(OneLayer(), callback, At(validate), max_epochs=2)), expected)
    assert callback.ledger.offered == alone.ledger.offered


class SaveLast(pl.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("make", [SparseTrainingMonitor, lambda: EnergyMonitor(meters=[])], ids=["monitor", "energy"])
def test_monitors_serve_one_fit_at_a_time(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = make()
    fit(OneLayer(), monitor, At(lambda: refused(monitor)), max_epochs=2)
    if isinstance(monitor, EnergyMonitor):
        assert [costs.epoch for costs in monitor.epochs] == [0, 1]
    else:
        assert capsys.readouterr().out.count("Epoch ") >= 2
    fit(OneLayer(), monitor)


def test_a_controller_serves_one_fit_at_a_time() -> None:
    controller = PIController()
    other = selection(controller=controller)
    fit(OneLayer(), selection(controller=controller), At(lambda: refused(other)))
    fit(OneLayer(), other)


def test_a_copy_serves_a_fit_of_its_own() -> None:
    callback = selection()
    fit(OneLayer(), callback, At(lambda: fit(OneLayer(), copy.deepcopy(callback))))
    assert callback.ledger.offered == 32


# ------------------------------------------------------------------ two of a kind in one Trainer


class OwnSelection(SparseSelectionCallback):
    pass


class OtherSelection(SparseSelectionCallback):
    pass


class OwnMonitor(SparseTrainingMonitor):
    pass


class OwnEnergy(EnergyMonitor):
    pass


PAIRS: dict[str, list[Callable[[], pl.Callback]]] = {
    "selections": [SparseSelectionCallback, SparseSelectionCallback],
    "a selection and a subclass": [SparseSelectionCallback, OwnSelection],
    "two subclasses": [OwnSelection, OtherSelection],
    "one subclass twice": [OwnSelection, OwnSelection],
    "monitors": [SparseTrainingMonitor, SparseTrainingMonitor],
    "a monitor and a subclass": [OwnMonitor, SparseTrainingMonitor],
    "energy monitors": [EnergyMonitor, EnergyMonitor],
    "an energy monitor and a subclass": [EnergyMonitor, OwnEnergy],
    "schedulers": [SparseSelectionCallback, TwoStageScheduler, lambda: TwoStageScheduler(warmup_epochs=2)],
}


def is_refused(*callbacks: pl.Callback) -> None:
    """Check the error: Lightning's own where two callbacks have one state key, which it says in the constructor."""
    states = [callback.state_key for callback in callbacks if not isinstance(callback, TwoStageScheduler)]
    error, said = ConfigurationError, r"expected one \w+.*, got 2"
    if len(set(states)) < len(states):
        error, said = RuntimeError, f"Found more than one stateful callback of type `{states[0]}`"
    with pytest.raises(error, match=said):
        fit(OneLayer(), *callbacks)


@pytest.mark.parametrize("kinds", PAIRS.values(), ids=PAIRS)
def test_two_of_a_kind_in_the_list(kinds: list[Callable[[], pl.Callback]]) -> None:
    is_refused(*(kind() for kind in kinds))


@pytest.mark.parametrize("kind", [SparseSelectionCallback, SparseTrainingMonitor, EnergyMonitor])
def test_one_object_twice_in_the_list(kind: Callable[[], pl.Callback]) -> None:
    callback = kind()
    is_refused(callback, callback)


@pytest.mark.parametrize("kinds", PAIRS.values(), ids=PAIRS)
def test_two_of_a_kind_from_the_module(kinds: list[Callable[[], pl.Callback]]) -> None:
    class Configured(OneLayer):
        def configure_callbacks(self) -> list[pl.Callback]:
            return [kind() for kind in kinds]

    with pytest.raises(ConfigurationError, match=r"expected one \w+.*, got 2"):
        fit(Configured())


def test_one_of_each_is_no_fault(tmp_path: Any) -> None:
    """State keys stay Lightning's: a checkpoint's state finds its callback, and holds plain text alone."""

    def chain() -> list[pl.Callback]:
        return [SparseSelectionCallback(), SparseTrainingMonitor(), EnergyMonitor(meters=[])]

    trainer = quiet_trainer(callbacks=chain())
    trainer.fit(OneLayer(), data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert set(saved) == {"SparseSelectionCallback", "SparseTrainingMonitor", "EnergyMonitor"}
    assert {type(key) for key in saved} == {str}
    resumed = chain()
    quiet_trainer(callbacks=resumed, max_epochs=2).fit(OneLayer(), data(), ckpt_path=tmp_path / "end.ckpt")
    assert resumed[0].ledger.offered == 64
    assert len(resumed[2].epochs) == 2


def test_a_checkpoint_before_any_fit(tmp_path: Any) -> None:
    trainer = quiet_trainer(callbacks=[SparseSelectionCallback(), SparseTrainingMonitor(), EnergyMonitor(meters=[])])
    trainer.validate(OneLayer(), data(), verbose=False)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    assert not torch.load(tmp_path / "before.ckpt", weights_only=True)["callbacks"]
