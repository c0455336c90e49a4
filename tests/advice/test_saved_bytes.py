"""What autograd saves for a backward is counted for tensors with a storage of their own and for others."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_ast.advice.probe import SavedBytes

ROWS = 64


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 4)

    def training_step(self, batch: Tensor) -> Tensor:
        out = self.layer(batch)
        values = out.values() if out.is_nested else out
        return values.square().mean()


def jagged(rows: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(rows.split([24, 40])), layout=torch.jagged)


@pytest.mark.parametrize("make", [lambda rows: rows, jagged], ids=["rows", "jagged"])
def test_the_input_of_a_layer_is_counted(make: object) -> None:
    module = Net()
    saved = SavedBytes(module)
    module.training_step(make(torch.randn(ROWS, 16))).backward()  # type: ignore[operator]
    assert saved.total is not None
    assert saved.total >= ROWS * 16 * 4
