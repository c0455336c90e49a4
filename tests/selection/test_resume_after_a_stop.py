"""A checkpoint that is written behind a run which was stopped in the midst of an epoch: that epoch counts as over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import StopAfter, quiet_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.set_vital. is deprecated",
    "ignore:lightning-ast. the run ended after",  # within the warmup
)

FULL = 8
"""Batches of a dense epoch."""


class Noted(PlainNet):
    """Notes the epoch and the index of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.places.append((self.trainer.current_epoch, batch_idx))
        return super().training_step(batch, batch_idx)


def train(digits: Digits, mode: Any, kind: Any, *extra: Any, ckpt_path: Path | None = None) -> tuple[Any, Any]:
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.5)
    callbacks = [selection, TwoStageScheduler(warmup_epochs=1), *extra]
    trainer = quiet_trainer(max_epochs=4, callbacks=callbacks)
    module = fresh(Noted)
    trainer.fit(module, kind(TensorDataset(*digits), batch_size=64, shuffle=True), ckpt_path=ckpt_path)
    return module.places, trainer


@pytest.mark.parametrize(
    ("mode", "kind"), [("partial", DataLoader), ("partial", StatefulDataLoader), ("prune", DataLoader)]
)
@pytest.mark.parametrize("stop", [3, FULL + 2], ids=["warmup", "sparse"])
def test_the_next_epoch_follows(digits: Digits, tmp_path: Path, mode: str, kind: Any, stop: int) -> None:
    before, trainer = train(digits, mode, kind, StopAfter(stop))
    assert len(before) == stop
    path = tmp_path / "stopped.ckpt"
    trainer.save_checkpoint(path)
    after, _ = train(digits, mode, kind, ckpt_path=path)
    stopped = before[-1][0]
    assert after[0] == (stopped + 1, 0)
    assert {epoch for epoch, _ in after} == set(range(stopped + 1, 4))
