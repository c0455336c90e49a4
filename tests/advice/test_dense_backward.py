"""What the advice says of a backward that 'partial' spends on every sample: how much, at which rate, and why."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback
from lightning_ast.advice.measure import Measurement
from lightning_ast.advice.measured import CoverageFacts, DenseBackward, Facts
from lightning_ast.advice.predict import Predictions
from lightning_ast.advice.verdict import decide
from tests.advice.test_predict import facts
from tests.helpers.training import quiet_trainer

BATCHNORM = {"aten.native_batch_norm_backward.default": 2, "aten.add.Tensor": 1}
FEW_VALUES = "for want of values: BatchNorm needs 16 a channel among the selected rows"


def reason(measured: Facts) -> str | None:
    found = [each for each in decide(Predictions(measured)).reasons if "on every sample" in each]
    assert len(found) < 2
    return found[0] if found else None


def told(*dense: DenseBackward, rate: float = 0.4, **step: Any) -> str | None:
    return reason(facts(run={"own_rate": rate}, step={"dense_backwards": dense, **step}))


def test_the_share_is_that_of_the_rate_asked_for() -> None:
    measured = DenseBackward(0.1, 1.0, BATCHNORM), DenseBackward(0.35, 0.0, {}), DenseBackward(0.6, 0.0, {})
    assert told(*measured) is None
    assert told(*measured, rate=0.3) is None
    at_tenth = told(*measured, rate=0.1)
    assert at_tenth is not None
    assert at_tenth.startswith(f"'partial' spends 100% of the backward on every sample at a rate of 0.1, {FEW_VALUES}")
    nearest = told(*measured, rate=0.15)
    assert nearest is not None
    assert "at a rate of 0.1 (measured nearest to 0.15), for want of values" in nearest


def test_a_coverage_is_asked_for_by_the_rate_that_it_needs() -> None:
    dense = DenseBackward(0.1, 1.0, BATCHNORM), DenseBackward(0.6, 0.5, {"aten.foo": 1})
    got = facts(run={"own_coverage": 0.9}, step={"dense_backwards": dense}, coverage=CoverageFacts(10, {0.9: 0.5}))
    said = reason(got)
    assert said is not None
    assert (
        "spends 50% of the backward on every sample at a rate of 0.6 (measured nearest to 0.5), for want of a" in said
    )


def test_the_causes_are_told_apart() -> None:
    both = told(DenseBackward(0.4, 0.8, {**BATCHNORM, "aten.rot90.default": 1}))
    assert both is not None
    assert f"for want of a rule: aten.rot90.default; and {FEW_VALUES}, so use larger batches or a higher rate." in both
    exact = told(DenseBackward(0.4, 0.8, BATCHNORM), batchnorm="exact")
    assert exact is not None
    assert "as batchnorm='exact' has it" in exact
    assert "want of" not in exact
    mixing = told(DenseBackward(0.4, 0.8, {"aten.add.Tensor": 1}))
    assert mixing is not None
    assert "for want of a rule: aten.add.Tensor" in mixing


def test_little_is_passed_over_and_what_is_not_counted_is_not() -> None:
    assert told(DenseBackward(0.4, 0.05, {"aten.foo": 1})) is None
    assert told(DenseBackward(0.4, 0.8, {"aten.foo": 1}), refused={"partial": "no"}) is None
    unknown = told(DenseBackward(0.4, None, {"aten.foo": 1}))
    assert unknown is not None
    assert "a share of the backward that was not counted" in unknown


class Normed(pl.LightningModule):
    """A network whose BatchNorm has one value a channel of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("rate", "has_few"), [(0.4, False), (0.1, True)])
def test_a_network_with_batchnorm(rate: float, has_few: bool) -> None:
    """Batches of 64: 6 rows at a tenth are fewer than 16, and 26 are not."""
    data = DataLoader(TensorDataset(torch.randn(256, 8), torch.randint(0, 4, (256,))), batch_size=64)
    selection = SparseSelectionCallback(target_activation_rate=rate, mode="partial", gate="topk")
    trainer = quiet_trainer(max_epochs=4, callbacks=[selection])
    measured = Measurement(trainer, Normed(), data, None, budget_seconds=0.5).facts()
    said = reason(measured)
    assert (said is not None) == has_few, measured.step.dense_backwards
    if said is not None:
        assert f"at a rate of 0.1, {FEW_VALUES}" in said
