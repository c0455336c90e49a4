"""``trim``: the most significant samples, which may have wrong labels, are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback
from lightning_ast.advice.predict import coverage_facts
from lightning_ast.core import SampleSelector, SignificanceHistory
from lightning_ast.core.gate import trimmed
from lightning_ast.demo.data import load_images
from lightning_ast.errors import ConfigurationError
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer
from tests.pruning.prune_by_hand import SIZE, fit, fresh, history_by_hand, loader, pruned


def test_a_share_is_trimmed() -> None:
    scores = torch.tensor([0.5, 3.0, 1.0, 2.0])
    assert trimmed(scores, 0.5).tolist() == [0.5, 0.0, 1.0, 0.0]
    assert trimmed(scores, 0.1).tolist() == scores.tolist()
    assert scores.tolist() == [0.5, 3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "target", [{"target_activation_rate": 0.4}, {"target_coverage": 0.6}], ids=["rate", "coverage"]
)
@pytest.mark.parametrize("gate", ["topk", "soft"])
def test_a_batch_is_selected_from_the_others(gate: Any, target: dict[str, float]) -> None:
    scores = torch.linspace(1, 2, 100)
    chosen = SampleSelector(gate=gate, trim=0.2, **target).select(scores).indices
    if gate == "topk":
        wanted = round(0.4 * 100) if "target_activation_rate" in target else None
        assert int(chosen.max()) == 79
        assert wanted is None or chosen.tolist() == list(range(40, 80))
    else:  # each of the others has 1 % of chance
        assert int((chosen >= 80).sum()) <= 2


def test_samples_never_seen_are_not_trimmed() -> None:
    history = SignificanceHistory(6)
    history.observe(torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 4.0, 2.0, 3.0]))
    history.fold()
    assert history.significance(trim=0.25).tolist() == [1.0, 0.0, 2.0, 3.0, 4.0, 4.0]


def test_a_pruned_epoch_leaves_out_the_most_significant() -> None:
    module = fresh()
    fit(module, loader(shuffle=True), pruned(gate="topk", trim=0.1))
    for epoch in (1, 2):
        ranked = history_by_hand(module, epoch).significance().argsort(descending=True).tolist()
        least = round(0.1 * SIZE)
        assert sorted(module.epochs()[epoch]) == sorted(ranked[least : least + round(0.4 * SIZE)])


class CountsWrong(PlainNet):
    """Counts the samples with wrong labels among those that were trained on in the last epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, wrong = batch
        if self.trainer.current_epoch == 4:
            self.seen.append(wrong)
        return nn.functional.cross_entropy(self(x), y)


def test_fewer_wrong_labels_are_trained_on() -> None:
    images = load_images("digits")
    x = images.train_images[:600].float() / 255
    y = images.train_labels[:600].clone()
    wrong = torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.2
    y[wrong] = (y[wrong] + 1) % 10
    data = DataLoader(TensorDataset(x, y, wrong), 32, shuffle=True)
    shares = []
    for trim in (0.0, 0.2):
        torch.manual_seed(0)
        module = CountsWrong()
        module.seen = []
        callback = SparseSelectionCallback(mode="prune", target_activation_rate=0.4, gate="topk", trim=trim)
        fit(module, data, callback, warmup=3, cooldown=0, max_epochs=5)
        shares.append(float(torch.cat(module.seen).float().mean()))
    hard, remedied = shares
    assert hard > 0.3, "wrong labels are hard to learn, and chosen again and again"
    assert remedied < 0.15


def test_advice_knows_what_is_left_out() -> None:
    scores = [torch.tensor([8.0, 4.0, 2.0, 1.0])]
    kept = coverage_facts(scores, [0.5], "topk", trim=0.25)
    assert kept is not None
    assert kept.rates == {0.5: 0.25}  # 4 of 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trim": 1.0}, r"trim: expected a share of the samples in \[0, 1\), got 1.0"),
        ({"trim": 20}, r"got 20. Did you mean 0.2"),
        ({"trim": 0.2, "target_activation_rate": 0.9}, "trim=0.2 leaves out what target_activation_rate=0.9 asks for"),
    ],
)
def test_faults_are_refused(options: dict[str, Any], message: str) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[SparseSelectionCallback(**options)])
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(PlainNet(), loader())
