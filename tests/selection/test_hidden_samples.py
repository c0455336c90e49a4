"""Samples that no trace can follow, and a shared tensor that looks like the samples' own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_ast.errors import EntryError
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import fit, half
from tests.selection.plain_loop import B, Zoo, check, train


@pytest.mark.parametrize(
    "hide", [lambda x: torch.from_numpy(x.numpy() * 2), lambda x: torch.tensor(x.tolist())], ids=["numpy", "tolist"]
)
def test_it_is_told_what_hides_the_samples(hide: Callable[[Tensor], Tensor]) -> None:
    zoo = Zoo(
        lambda: {"net": nn.Linear(3, 2)},
        lambda m, batch, i: F.cross_entropy(m.net(hide(batch[0])), batch[1]),
        lambda: TensorDataset(torch.randn(4 * B, 3).double(), torch.arange(4 * B) % 2),
    )
    with pytest.raises(EntryError, match=r"`numpy\(\)`, `tolist\(\)` or `item\(\)` cannot be followed"):
        train(zoo, "mask")


def test_a_shared_tensor_of_as_many_rows_as_are_selected() -> None:
    anchors = torch.linspace(-1, 1, 12).view(4, 3).double()
    zoo = Zoo(
        lambda: {"net": nn.Linear(3, 2)},
        lambda m, batch, i: F.cross_entropy(m.cut(m.net(batch["x"])), batch["y"]) + m.net(batch["a"]).square().mean(),
        lambda: TensorDataset(torch.randn(4 * B, 3).double(), torch.arange(4 * B) % 2),
        collate=lambda rows: {
            "x": torch.stack([x for x, _ in rows]),
            "y": torch.stack([y for _, y in rows]),
            "a": anchors,
        },
    )
    check(zoo, "subset")


def test_a_batch_whose_samples_are_out_of_sight_is_refused(digits: Digits) -> None:
    class Opaque:
        def __init__(self, x: Tensor) -> None:
            self.x = lambda: x

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden, y = batch["hidden"].x(), batch["all_y"].x()
            return F.cross_entropy(self(hidden), y)

    x, y = digits[0][:64], digits[1][:64]
    data = torch.utils.data.DataLoader(
        [{"hidden": Opaque(x), "all_y": Opaque(y), "id": torch.arange(64)}], batch_size=None
    )
    with pytest.raises(EntryError, match="nothing in the graph of the loss was seen to depend on one of the 64"):
        fit(fresh(Net), data, half(), max_epochs=3)


def test_a_run_that_ends_before_a_proof_is_told_of(digits: Digits) -> None:
    """Several parts of a batch are tried, one in each step, until one shows the rows or all have failed."""

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(torch.from_numpy(batch["x"].numpy())), torch.tensor(batch["y"].tolist()))

    x, y = digits[0][:256], digits[1][:256]
    rows = [{"x": a, "y": b, "z": a.mean(), "w": a.sum()} for a, b in zip(x, y, strict=True)]
    data = torch.utils.data.DataLoader(rows, batch_size=32)
    with pytest.warns(UserWarning, match="every batch was a dense one: the run ended before it could be proved"):
        fit(fresh(Net), data, half(), max_steps=2)
    with pytest.raises(EntryError), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(fresh(Net), data, half(), max_steps=8)
    assert not [each for each in told if "every batch was a dense one" in str(each.message)], "the error says it"
