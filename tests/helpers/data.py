"""Data that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Digits", "loader"]

Digits = tuple[Tensor, Tensor]


def loader(digits: tuple[Tensor, Tensor], *, kind: str = "tuple", batch_size: int = 64, **options: Any) -> DataLoader:
    """A real DataLoader whose batches are tuples, lists or dicts."""

    def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        return {"tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}}[kind]

    return DataLoader(TensorDataset(*digits), batch_size=batch_size, collate_fn=collate, **options)
