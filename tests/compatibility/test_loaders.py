"""Each kind of loader trains, or is refused, as the table of the page on data says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ast import SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import ConfigurationError
from tests.compatibility.loaders import KINDS, SIZE, Kind
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*num_workers")


class Seeing(PlainNet):
    """A network that keeps the indices of what it trains on, by epoch."""

    def __init__(self) -> None:
        super().__init__(batchnorm=False)
        self.trained: dict[int, list[int]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        losses = []
        for x, y, indices in parts:
            self.trained.setdefault(self.current_epoch, []).extend(indices.tolist())
            losses.append(nn.functional.cross_entropy(self(x), y))
        return torch.stack(losses).sum()


class Telling(SparseLossMixin, Seeing):
    """The same, which tells the callback which samples a batch holds."""

    def sample_indices(self, batch: Any) -> Tensor:
        indices: Tensor = batch[2]
        return indices


def train(kind: Kind, make: Callable[[], Any], mode: str) -> tuple[Seeing, SparseSelectionCallback]:
    made = make()
    loader, options = made if isinstance(made, tuple) else (made, {})
    options = options if mode == "prune" else {}
    torch.manual_seed(0)
    module = Telling() if kind.tells_indices else Seeing()
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.5, **options)  # type: ignore[arg-type]
    limit = 6 if mode != "prune" else 1.0
    trainer = quiet_trainer(
        max_epochs=2, callbacks=[selection, TwoStageScheduler(warmup_epochs=1)], limit_train_batches=limit
    )
    trainer.fit(module, loader)
    return module, selection


CASES = [
    pytest.param(kind, make, id=f"{kind.text.split(':')[0]}-{number}")
    for kind in KINDS
    for number, make in enumerate(kind.make)
]


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_prune_trains_on_the_planned_samples_or_refuses(kind: Kind, make: Callable[[], Any]) -> None:
    if kind.refused is not None:
        with pytest.raises(ConfigurationError, match=kind.refused):
            train(kind, make, "prune")
        return
    module, selection = train(kind, make, "prune")
    sparse = selection.ledger.stages["sparse"]  # type: ignore[union-attr]
    assert 0.4 < sparse.selected / sparse.offered < 0.65
    assert len(module.trained[1]) == sparse.selected
    assert len(module.trained[1]) < len(module.trained[0])


@pytest.mark.parametrize(("kind", "make"), [case for case in CASES if "several" not in str(case.id)])
def test_partial_selects_in_the_batch(kind: Kind, make: Callable[[], Any]) -> None:
    _, selection = train(kind, make, "partial")
    sparse = selection.ledger.stages["sparse"]  # type: ignore[union-attr]
    assert 0.3 < sparse.selected / sparse.offered < 0.7
    assert sparse.offered <= SIZE + 12


def test_kinds_without_a_case_are_tested_where_the_comment_says() -> None:
    text = (Path(__file__).parent / "loaders.py").read_text()
    named = [part.split()[-1] for part in text.split(".py\n")[:-1] if "tests/" in part.split("\n")[-1]]
    assert len(named) == sum(not kind.make for kind in KINDS)
    assert all((PAGE.parents[1] / f"{name}.py").exists() for name in named)
