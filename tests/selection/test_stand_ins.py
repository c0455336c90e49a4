"""NaN in batches of every kind: what the step sees is finite, what the dataset holds is left alone."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.selection.stand_ins import StandIns
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer, weights

BAD, BATCH = 5, 16
Pair = namedtuple("Pair", ["x", "y"])

pytestmark = pytest.mark.filterwarnings(
    "ignore:lightning-ast. NaN or infinity",
    "ignore:lightning-ast. which rows belong to which sample is taken from the sizes",  # of arrays
)


@dataclass
class Fields:
    """A dataclass with arrays."""

    x: Any
    y: Any


KINDS: dict[str, Any] = {
    "tuple of tensors": lambda rows: tuple(torch.stack(column) for column in zip(*rows)),
    "tuple of arrays": lambda rows: tuple(np.stack([t.numpy() for t in column]) for column in zip(*rows)),
    "dict of arrays": lambda rows: dict(zip("xy", KINDS["tuple of arrays"](rows))),
    "named tuple": lambda rows: Pair(*KINDS["tuple of arrays"](rows)),
    "dataclass": lambda rows: Fields(*KINDS["tuple of arrays"](rows)),
    "samples of tensors": lambda rows: [{"x": x, "y": y} for x, y in rows],
    "samples of arrays": lambda rows: [{"x": x.numpy(), "y": int(y)} for x, y in rows],
    "pairs": lambda rows: [(x.numpy(), int(y)) for x, y in rows],
    "lists": lambda rows: {"x": [x.numpy() for x, _ in rows], "y": [int(y) for _, y in rows]},
}


def as_tensors(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch of any of the kinds."""
    if isinstance(batch, list):
        batch = list(zip(*(each.values() if isinstance(each, dict) else each for each in batch)))
    elif isinstance(batch, dict):
        batch = list(batch.values())
    elif isinstance(batch, Fields):
        batch = batch.x, batch.y
    x, y = (torch.stack([torch.as_tensor(each) for each in column]) for column in batch)
    return x, y.long()


class Net(PlainNet):
    """Takes every kind of batch; BatchNorm would carry one NaN to all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.finite: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = as_tensors(batch)
        self.finite.append(bool(x.isfinite().all()))
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["partial", "subset"])
def test_the_step_sees_finite_values_and_the_dataset_keeps_its_own(digits: Digits, mode: str, kind: str) -> None:
    images = digits[0][: 2 * BATCH].clone()
    images[BAD, 0, 2, 2] = math.nan
    before = images.clone()
    rows = list(zip(images, digits[1]))  # views of one memory
    torch.manual_seed(0)
    module, callback = Net(), SparseSelectionCallback(mode=mode, quarantine_limit=0.1)
    schedule = TwoStageScheduler(warmup_epochs=1)
    trainer = quiet_trainer(callbacks=[callback, schedule], max_epochs=2)
    trainer.fit(module, DataLoader(rows, batch_size=BATCH, collate_fn=KINDS[kind]))
    assert all(module.finite)
    assert all(bool(value.isfinite().all()) for value in weights(module).values())
    assert [(s.epoch, s.batch, s.position) for s in callback.quarantined] == [(0, 0, BAD), (1, 0, BAD)]
    assert torch.equal(images.isnan(), before.isnan())
    assert torch.equal(images.nan_to_num(), before.nan_to_num())


def test_jagged_tensors_keep_their_lengths() -> None:
    jagged = torch.nested.nested_tensor([torch.tensor([1.0, math.nan]), torch.ones(3)], layout=torch.jagged)
    stand_ins, offsets = StandIns(), jagged.offsets().clone()
    stand_ins.put([jagged], [jagged.clone()])
    assert jagged.values().tolist() == [1, 0, 1, 1, 1]
    stand_ins.restore()
    assert jagged.values()[1].isnan()
    assert torch.equal(jagged.offsets(), offsets)


def test_arrays_that_belong_to_others_are_not_written_to() -> None:
    memory = np.zeros((3, 2))
    view, frozen = memory[:2], np.zeros(2)
    frozen.flags.writeable = False
    stand_ins = StandIns()
    stand_ins.put((view, frozen), (view + 1, frozen + 1))
    assert not memory.any()
    assert not frozen.any()
    stand_ins.restore()


class Ragged(torch.utils.data.Dataset[Any]):
    """Samples of two to four rows, one of them with NaN."""

    def __len__(self) -> int:
        return 4 * BATCH

    def __getitem__(self, index: int) -> tuple[Any, int]:
        x = np.random.default_rng(index).standard_normal((2 + index % 3, 64)).astype("float32")
        if index == BAD:
            x[0, 0] = np.nan
        return x, index % 10


class MeanOfRows(PlainNet):
    """Classifies the mean of the rows of each sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows, labels = batch
        images = torch.stack([torch.from_numpy(each).mean(0) for each in rows])
        return F.cross_entropy(self(images.view(-1, 1, 8, 8)), torch.tensor(labels))


@pytest.mark.parametrize("mode", ["mask", "partial", "prune"])
def test_arrays_of_different_shapes(mode: Any) -> None:
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.5, quarantine_limit=0.2)
    trainer = quiet_trainer(max_epochs=3, callbacks=[selection, TwoStageScheduler(warmup_epochs=1)])
    module = MeanOfRows(batchnorm=False)
    trainer.fit(module, DataLoader(Ragged(), batch_size=BATCH, collate_fn=lambda rows: tuple(zip(*rows))))
    assert {sample.position for sample in selection.quarantined} == {BAD}
    assert all(bool(w.isfinite().all()) for w in module.parameters())
