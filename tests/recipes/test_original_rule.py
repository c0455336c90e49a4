"""The original's rule beside its own code: what is selected, and what where nothing passes the threshold."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_ast.demo import ImageData, SimpleCNN
from lightning_ast.recipes import OriginalRule
from tests.helpers.training import quiet_trainer


class Kept(Callback):
    """Remembers the positions that were selected, step by step, and the losses of the batch."""

    def __init__(self, rule: OriginalRule) -> None:
        self.rule = rule
        self.positions: list[list[int]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        kept = self.rule.last_selection
        assert kept is not None
        self.positions.append(kept.indices.tolist())


def run(kind: type[OriginalRule] = OriginalRule, **settings: Any) -> tuple[OriginalRule, list[list[int]]]:
    pl.seed_everything(0, verbose=False)
    rule = kind(**settings)
    kept = Kept(rule)
    trainer = quiet_trainer(callbacks=[rule, kept], limit_val_batches=0)
    trainer.fit(SimpleCNN(1, image_size=8, width=4), datamodule=ImageData("digits", batch_size=32, train_limit=256))
    return rule, kept.positions


def test_where_nothing_passes_two_random_samples_are_trained_on() -> None:
    rule, first = run(initial_threshold=9.0, seed=1, fallback="random")
    assert [len(each) for each in first] == [2] * 8
    assert rule.ledger.selected == 16
    assert len({tuple(each) for each in first}) > 4, "not the same two each time"
    assert run(initial_threshold=9.0, seed=1, fallback="random")[1] == first
    assert run(initial_threshold=9.0, seed=2, fallback="random")[1] != first


def test_where_too_few_pass_the_largest_tenth_is_trained_on() -> None:
    scores: list[Tensor] = []

    class Watched(OriginalRule):
        def _scored(self, *inputs: Any) -> Tensor:
            scores.append(super()._scored(*inputs))
            return scores[-1]

    rule, kept = run(Watched, initial_threshold=9.0)
    assert rule.ledger.selected == 8 * 3, "3 of 32"
    assert kept == [sorted(each.topk(3).indices.tolist()) for each in scores[-8:]]


def test_where_some_pass_they_alone_are_trained_on() -> None:
    _, kept = run(initial_threshold=1.0, score="loss_intensity", fallback="random")
    assert all(len(each) != 2 for each in kept[:4])
    assert 4 < len(kept[0]) < 28, "a relative score has the mean 1"


@pytest.mark.parametrize("kept_share", [0.9, 0.1])
def test_the_threshold_moves_as_the_readme_has_it(kept_share: float) -> None:
    rule = OriginalRule(target_activation_rate=0.4, kp=0.005, ki=0.0001, ema_alpha=0.1)
    threshold, integral, mean = 3.0, 0.0, 0.4
    assert rule.controller is not None
    for _ in range(50):
        rule.controller.update(kept_share, target=0.4)
        mean = 0.1 * kept_share + 0.9 * mean
        error = mean - 0.4
        integral = max(-100.0, min(100.0, integral + error))
        threshold = max(0.5, min(10.0, threshold + 0.005 * error + 0.0001 * integral))
        assert float(rule.controller.threshold(torch.tensor(0.0), target=0.4)) == pytest.approx(threshold)
