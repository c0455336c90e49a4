"""Samples that no trace can follow, and a shared tensor that looks like the samples' own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_ast.core import EntryError
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
