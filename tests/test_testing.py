"""The check that users run on their own model: it finds wrong gradients, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_ast.core import densify
from lightning_ast.errors import EntryError, LossCaptureError
from lightning_ast.testing import check_partial_backward
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import assert_same_weights, quiet_trainer, weights


def batch_of(digits: Digits, size: int = 20) -> Digits:
    return digits[0][:size], digits[1][:size]


def test_a_lightning_module_as_it_is(digits: Digits) -> None:
    torch.manual_seed(0)
    check = check_partial_backward(PlainNet(batchnorm=False), batch_of(digits))
    assert check.relative_error < 1e-5
    assert (check.selected, check.batch_size) == (8, 20)
    assert check.flops_share == pytest.approx(0.4)
    assert not check.dense_ops
    assert set(check.relative_error_by_parameter) == {"net.0.weight", "net.0.bias", "net.5.weight", "net.5.bias"}
    for said in ("8 of 20 samples", "cosine 1.0", "40.0%", "ops over all rows: none", "net.0.weight"):
        assert said in str(check)


def test_batchnorm_both_ways(digits: Digits) -> None:
    torch.manual_seed(0)
    module = PlainNet()
    exact = check_partial_backward(module, batch_of(digits))
    selected = check_partial_backward(module, batch_of(digits), batchnorm="selected")
    assert exact.relative_error < 1e-5
    assert selected.relative_error > 1e-3
    assert exact.dense_ops == {"aten.native_batch_norm_backward.default": 1}
    assert "aten.native_batch_norm_backward.default (x1)" in str(exact)
    assert selected.flops_share < exact.flops_share
    assert exact.selected_flops_share == selected.flops_share
    said = "batchnorm='exact' costs that; with 'selected', the default of a run, the share of the FLOPs is "
    assert f"{said}{selected.flops_share:.1%}" in str(exact)
    assert "'exact'" not in str(selected)


def test_too_few_values_for_batchnorm() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    check = check_partial_backward(
        module, torch.randn(20, 4), batchnorm="selected", loss=lambda m, b: m(b).square().sum()
    )
    assert check.dense_ops == {"aten.native_batch_norm_backward.default": 1}
    assert "fewer than 16 values a channel among the selected rows" in str(check)
    assert check.selected_flops_share is None


def test_the_module_is_left_as_it_was(digits: Digits) -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 10))
    module.bias.grad = torch.ones(10)
    before, state = weights(module), torch.get_rng_state()
    check = check_partial_backward(
        module, batch_of(digits), losses=lambda m, b: F.cross_entropy(m(b[0].flatten(1)), b[1], reduction="none")
    )
    assert check.relative_error < 1e-5, "the power iteration starts from the same vectors both times"
    assert_same_weights(before, weights(module))
    assert torch.equal(module.bias.grad, torch.ones(10))
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_are_left_as_they_were(digits: Digits) -> None:
    class Measured(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy, self.mean = MulticlassAccuracy(10), MeanMetric()
            self.listed = CatMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.net(batch[0])
            for metric in (self.mean, self.listed):
                metric.update(scores.mean())
            self.accuracy(scores, batch[1])
            return F.cross_entropy(scores, batch[1])

    module = Measured()
    module.mean.update(3.0)
    module.listed.update(4.0)
    check_partial_backward(module, batch_of(digits))
    assert (module.mean.compute(), module.mean.update_count) == (3.0, 1)
    assert module.listed.compute() == 4.0
    assert not module.accuracy.update_called


@pytest.mark.parametrize("shape", [(), (60,), (20, 1)], ids=str)
def test_losses_of_another_shape_are_refused(digits: Digits, shape: tuple[int, ...]) -> None:
    def losses(module: Any, batch: Any) -> Tensor:
        return module.net(batch[0]).sum() + torch.zeros(shape)

    with pytest.raises(LossCaptureError, match=r"expected per-sample losses, .* of shape \(20,\)"):
        check_partial_backward(PlainNet(), batch_of(digits), losses=losses)


def test_wrong_use_is_named(digits: Digits) -> None:
    with pytest.raises(ValueError, match="expected indices of the batch's 20 samples"):
        check_partial_backward(PlainNet(), batch_of(digits), indices=torch.tensor([3, 20]))
    with pytest.raises(ValueError, match="no parameter of PlainNet requires gradients"):
        check_partial_backward(PlainNet().requires_grad_(False), batch_of(digits))


def test_wrong_gradients_are_found(digits: Digits) -> None:
    class Wrong(torch.autograd.Function):
        """A backward that is not linear in the gradient: it looks at all rows."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g if type(g) is Tensor else 2 * g

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10))

    def losses(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module[2](Wrong.apply(module[:2](batch[0]))), batch[1], reduction="none")

    check = check_partial_backward(net, batch_of(digits), losses=losses)
    assert check.relative_error_by_parameter["1.weight"] == pytest.approx(1.0, rel=1e-4)
    assert check.relative_error_by_parameter["2.weight"] < 1e-5
    assert check.relative_error > 0.1


def test_the_training_step_is_what_is_checked(digits: Digits) -> None:
    """Whatever its form: a loss by hand with a term of the batch, logged, returned in a dict, by a step of one argument."""

    class ByHand(PlainNet):
        def training_step(self, batch: Any) -> dict[str, Tensor]:
            scores = self(batch[0])
            self.log("scores", scores.mean())
            loss = (F.cross_entropy(scores, batch[1], reduction="none") ** 2).mean() + scores.square().mean()
            return {"loss": loss}

        def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("it is not what the network is trained with")

    module = ByHand(batchnorm=False)
    check = check_partial_backward(module, batch_of(digits), indices=torch.tensor([3]))
    assert check.relative_error < 1e-5
    assert (check.selected, check.flops_share) == (1, pytest.approx(0.05))
    assert "log" not in vars(module)


def test_a_loss_of_any_form_on_any_module(digits: Digits) -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        z = F.normalize(net(batch[0].flatten(1)), dim=1)
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)).flip(0))

    check = check_partial_backward(
        nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8)), batch_of(digits), loss=loss
    )
    assert check.relative_error < 1e-5
    assert set(check.relative_error_by_parameter) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_after_a_fit(digits: Digits) -> None:
    """The module still has its trainer, which refuses to log."""
    module = PlainNet(batchnorm=False)
    quiet_trainer(max_steps=1).fit(module, loader(digits))
    assert check_partial_backward(module, batch_of(digits)).relative_error < 1e-5


def test_refusals_name_the_remedy(digits: Digits) -> None:
    with pytest.raises(TypeError, match="Linear has no training_step: pass `loss="):
        check_partial_backward(nn.Linear(2, 2), batch_of(digits))

    class Manual(PlainNet):
        automatic_optimization = False

    class Nothing(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Free(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net[0](torch.ones(1, 1, 8, 8)).mean()

    with pytest.raises(TypeError, match="Manual runs its own backward: pass `loss="):
        check_partial_backward(Manual(), batch_of(digits))
    with pytest.raises(TypeError, match="expected training_step of Nothing to return a loss, got NoneType"):
        check_partial_backward(Nothing(), batch_of(digits))
    with pytest.raises(EntryError, match="expected a batch of 20 samples"):
        check_partial_backward(Free(), batch_of(digits))


def test_a_hook_that_densifies_is_seen_in_the_cost(digits: Digits) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def losses(module: nn.Module, batch: Any) -> Tensor:
        hidden = module[:3](batch[0])
        hidden.register_hook(densify)
        return F.cross_entropy(module[3](hidden), batch[1], reduction="none")

    check = check_partial_backward(net, batch_of(digits), losses=losses)
    assert check.relative_error < 1e-5
    assert 0.7 < check.flops_share < 1
