"""Lightning's tuner finds what it finds without the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
)
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.tuner import Tuner

from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, assert_same_weights, quiet_trainer
from tests.selection.plain_and_ours import (
    AtEpochEnd,
    DigitsData,
    assert_clean,
    only_new_objects,
    ours,
    random_state,
    seed,
)


class Tunable(PlainNet):
    """What Lightning's tuner wants of a module."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lr = 0.05

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@pytest.mark.parametrize("tool", ["lr_find", "scale_batch_size", "LearningRateFinder", "BatchSizeFinder"])
@pytest.mark.parametrize("mode", [*(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[:2]), *MODES[2:]])
def test_the_tuner_finds_what_it_finds_without(
    digits: Digits, mode: str, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curve, what is suggested, and the warmup of the fit that follows, bitwise; which then is sparse."""
    monkeypatch.chdir(tmp_path)
    search = {"min_lr": 1e-3, "max_lr": 3.0, "early_stop_threshold": None}
    scaling = {"mode": "power", "steps_per_trial": 2, "init_val": 8, "max_trials": 2}
    found: list[Any] = []
    ends: list[AtEpochEnd] = []
    for selection in ([], ours(mode)):
        module, datamodule = fresh(Tunable), DigitsData((digits[0][:256], digits[1][:256]))
        ends.append(AtEpochEnd())
        finder: Any = None
        if tool == "LearningRateFinder":
            finder = LearningRateFinder(num_training_steps=20, **search)
        elif tool == "BatchSizeFinder":
            finder = BatchSizeFinder(**scaling)
        callbacks = [*selection, ends[-1], *([] if finder is None else [finder])]
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=3, num_sanity_val_steps=0)
        seed()
        if tool == "lr_find":
            result = Tuner(trainer).lr_find(module, datamodule=datamodule, num_training=20, **search)
            found.append((result.results, result.suggestion(), random_state()))
        elif tool == "scale_batch_size":
            with only_new_objects():
                size = Tuner(trainer).scale_batch_size(module, datamodule=datamodule, **scaling)
            found.append((size, random_state()))
        with only_new_objects():
            trainer.fit(module, datamodule=datamodule)
        if tool == "LearningRateFinder":
            found.append((finder.optimal_lr.results, finder.optimal_lr.suggestion()))
        elif tool == "BatchSizeFinder":
            found.append(finder.optimal_batch_size)
        found[-1] = (found[-1], module.lr, datamodule.batch_size)
        assert trainer.current_epoch == 3
        if selection:
            assert_clean(trainer, module)
            ledger = selection[0].ledger
            assert ledger.offered == 3 * 256, "the trials are not in the books"
            assert 256 + 0.4 * 512 < ledger.selected < 256 + 0.6 * 512
    assert found[0] == found[1]
    if tool.endswith("Finder") and not hasattr(_FitLoop, "is_resuming"):
        return  # in Lightning 2.5 a finder's own checkpoint resumes the run: another random state, the same samples
    assert_same_weights(ends[0].weights[0], ends[1].weights[0])
    assert ends[0].random[0] == ends[1].random[0]
