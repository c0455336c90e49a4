"""An empty batch in one of several processes: refused in the sparse stage, where they weigh their selections together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback
from tests.helpers.modules import OneLayer
from tests.helpers.training import gloo, quiet_trainer


def collate(rows: list[int]) -> Any:
    """Drop all samples of a batch that holds the first one."""
    kept = [] if 0 in rows else rows
    return torch.ones(len(kept), 6), torch.zeros(len(kept), dtype=torch.long)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_it_is_refused_with_the_remedy() -> None:
    trainer = quiet_trainer(devices=2, strategy=gloo(), callbacks=[SparseSelectionCallback()])
    with pytest.raises(
        ProcessRaisedException, match=r"expected at least one sample in every batch of the sparse stage"
    ):
        trainer.fit(OneLayer(), DataLoader(range(32), batch_size=8, collate_fn=collate))
