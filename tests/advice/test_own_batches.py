"""``advise`` where the batches are not torch's ``BatchSampler``'s: ``prune`` trains there, and is not predicted."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.advice import advise
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer

LOADING: dict[str, Any] = {
    "a batch sampler": lambda x, y: DataLoader(
        TensorDataset(x, y), batch_sampler=[[*range(start, start + 32 + start % 7)] for start in range(0, 256, 32)]
    ),
    "ready batches": lambda x, y: DataLoader(list(zip(x.split(32), y.split(32))), batch_size=None),
}


@pytest.mark.parametrize("name", LOADING)
def test_prune_is_not_predicted_for_batches_of_the_users_own(digits: tuple[Tensor, Tensor], name: str) -> None:
    advice = advise(quiet_trainer(max_epochs=2), PlainNet(), LOADING[name](*digits), budget_seconds=0.2)
    assert "needs batches of torch's BatchSampler to predict it" in advice.facts.step.refused["prune"]
    assert advice.facts.run.batches_per_epoch == (8 if name == "a batch sampler" else -(-len(digits[0]) // 32))
