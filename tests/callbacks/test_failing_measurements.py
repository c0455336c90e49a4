"""Meters, pictures, writers and terminals that fail in mid-run: one warning, and the training is what it was."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_ast import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.energy import RaplMeter
from tests.helpers.data import Digits
from tests.helpers.logs import scalars, warned
from tests.helpers.modules import PlainNet
from tests.helpers.training import assert_same_weights, quiet_trainer, weights


def train(
    digits: Digits, *extra: pl.Callback, data: Any = None, logger: Any = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Train three epochs, and give the weights and what was warned of."""
    torch.manual_seed(0)
    module = PlainNet(batchnorm=False)
    selection = SparseSelectionCallback(target_activation_rate=0.5)
    chain = [selection, TwoStageScheduler(warmup_epochs=1), *extra]
    data = DataLoader(TensorDataset(*digits), batch_size=64) if data is None else data
    with warned() as said:
        quiet_trainer(max_epochs=3, callbacks=chain, logger=logger, log_every_n_steps=1).fit(module, data)
    return weights(module), said


@pytest.fixture(scope="module")
def few(request: pytest.FixtureRequest) -> Digits:
    images, labels = request.getfixturevalue("digits")
    return images[:128], labels[:128]


@pytest.fixture(scope="module")
def plain(few: Digits) -> dict[str, Tensor]:
    trained, said = train(few)
    assert said == []
    return trained


class Failing:
    """A meter that fails from the third reading on."""

    kind, name, identity, longest_interval_seconds = "gpu", "a meter", "test", 0.0

    def __init__(self, failure: Any) -> None:
        self.failure, self.reads = failure, 0

    def read_joules(self) -> Any:
        self.reads += 1
        if self.reads <= 3:
            return 100.0 * self.reads
        if isinstance(self.failure, Exception):
            raise self.failure
        return self.failure


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError(5, "I/O error"), "OSError: .*I/O error"),
        (KeyError("lost"), "KeyError: 'lost'"),
        (MemoryError(), "MemoryError"),
        (None, "TypeError"),
        ("watts", "ValueError"),
        (float("nan"), "a meter reads nan joules"),
        (float("inf"), "a meter reads inf joules"),
        (1.0, "a meter fell from 300.0 to 1.0 joules"),
    ],
    ids=["file", "key", "memory", "nothing", "text", "NaN", "infinite", "reset"],
)
def test_a_meter_that_fails(few: Digits, plain: dict[str, Tensor], failure: Any, reason: str) -> None:
    energy = EnergyMonitor(meters=[Failing(failure)])
    trained, said = train(few, energy)
    assert_same_weights(plain, trained)
    assert len(said) == 1
    assert re.search(f"energy is no longer measured: {reason}", said[0])
    assert energy.joules is None
    assert [costs.epoch_joules for costs in energy.epochs[1:]] == [None, None]
    assert all(costs.epoch_seconds > 0 for costs in energy.epochs)


def test_rapl_files_that_go_away(few: Digits, plain: dict[str, Tensor], tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, content in {"name": "package-0", "energy_uj": "100", "max_energy_range_uj": "1000000"}.items():
        (zone / name).write_text(content)

    class Unplug(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                (zone / "energy_uj").unlink()

    energy = EnergyMonitor(meters=[RaplMeter(tmp_path)])
    trained, said = train(few, energy, Unplug())
    assert_same_weights(plain, trained)
    assert len(said) == 1
    assert "can no longer be read" in said[0]
    assert [costs.cpu_joules is None for costs in energy.epochs] == [False, True, True]


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("method", ["add_image", "add_histogram", "add_custom_scalars"])
def test_a_writer_that_fails(
    few: Digits, plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    monkeypatch.setattr(logger.experiment, method, full_disk)
    trained, said = train(few, SparseTrainingMonitor(), logger=logger)
    assert_same_weights(plain, trained)
    assert len(said) == 1
    assert "to a logger failed, and training goes on without it: OSError: [Errno 28] No space left on" in said[0]
    assert "ast/activation_rate" in scalars(tmp_path)


def test_a_picture_that_cannot_be_drawn(
    few: Digits, plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "add_subplot", full_disk)
    trained, said = train(few, SparseTrainingMonitor(), logger=TensorBoardLogger(str(tmp_path), name="", version=""))
    assert_same_weights(plain, trained)
    assert len(said) == 1
    assert "SparseTrainingMonitor failed, and training goes on without it: OSError" in said[0]
    assert "ast/significance_p50" in scalars(tmp_path)


def test_a_terminal_that_is_closed(few: Digits, plain: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stdout", Closed())
    trained, said = train(few, SparseTrainingMonitor())
    assert_same_weights(plain, trained)
    assert len(said) == 1
    assert "BrokenPipeError" in said[0]


class Keyed(TensorDataset):
    """Found by keys of more than 64 bits; has no length to speak of."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key % 2**70)

    def __getitems__(self, keys: list[int]) -> Any:
        return [self[key] for key in keys]

    def __len__(self) -> int:
        raise NotImplementedError("a length")


class Keys(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(2**70, 2**70 + 128))

    def __len__(self) -> int:
        return 128


def test_keys_that_are_no_places_in_a_data_set(few: Digits, plain: dict[str, Tensor], tmp_path: Path) -> None:
    data = DataLoader(Keyed(*few), batch_size=64, sampler=Keys())
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    trained, said = train(few, SparseTrainingMonitor(), data=data, logger=logger)
    assert_same_weights(plain, trained)
    assert said == []
    assert "ast/significance_p50" in scalars(tmp_path)
