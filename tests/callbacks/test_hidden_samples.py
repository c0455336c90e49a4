"""Steps that take the samples out of tensors, where no trace can follow them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_ast.core import EntryError
from tests.callbacks.plain_loop import B, Zoo, train


@pytest.mark.parametrize(
    "hide", [lambda x: torch.from_numpy(x.numpy() * 2), lambda x: torch.tensor(x.tolist())], ids=["numpy", "tolist"]
)
def test_it_is_told_what_hides_the_samples(hide: Callable[[Tensor], Tensor]) -> None:
    zoo = Zoo(
        lambda: {"net": nn.Linear(3, 2)},
        lambda m, batch, i: F.cross_entropy(m.net(hide(batch[0])), batch[1]),
        lambda: TensorDataset(torch.randn(4 * B, 3).double(), torch.arange(4 * B) % 2),
    )
    with pytest.raises(EntryError, match=r"`numpy\(\)`, `tolist\(\)` or `item\(\)`, cannot be followed"):
        train(zoo, "mask")
