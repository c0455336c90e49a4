"""Every built-in against a loop over samples in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ast.core import significance as S
from lightning_ast.core.losses.capture import LossCapture, LossRecord

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 4, generator=GENERATOR)
TARGETS = torch.tensor([0, 2, 2, 3, 1])
LOSSES = F.cross_entropy(LOGITS, TARGETS, reduction="none")
INPUTS = torch.randn(5, 3, 4, 4, generator=GENERATOR) * torch.arange(1, 6).view(5, 1, 1, 1)


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(v) for v in row]
    return [e / sum(exps) for e in exps]


def rows(logits: Tensor) -> list[list[float]]:
    return [softmax(row) for row in logits.tolist()]


def test_el2n_multiclass() -> None:
    expected = [
        math.sqrt(sum((p - (c == t)) ** 2 for c, p in enumerate(row))) for row, t in zip(rows(LOGITS), TARGETS.tolist())
    ]
    assert S.el2n(LOSSES, LOGITS, None, TARGETS).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["class indices", "class probabilities"])
def test_the_gradient_score_of_plain_cross_entropy_is_el2n(soft: bool) -> None:
    """What ``significance="gradient"`` takes where the logits are the entry: B times the norm of each gradient row."""
    logits = LOGITS.double().requires_grad_()
    targets = torch.randn(5, 4, generator=GENERATOR).softmax(1).double() if soft else TARGETS
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    expected = S.el2n(LOSSES, LOGITS, None, targets, kind="multiclass").double()
    torch.testing.assert_close(5 * gradient.norm(dim=1), expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_score_has_the_class_weights_that_el2n_leaves_out() -> None:
    logits = LOGITS.clone().requires_grad_()
    weight = torch.tensor([1.0, 0.5, 3.0, 0.25])
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, TARGETS, weight=weight), logits)
    el2n = S.el2n(LOSSES, LOGITS, None, TARGETS)
    assert not torch.allclose(5 * gradient.norm(dim=1), el2n, rtol=0.05)
    torch.testing.assert_close(5 * gradient.norm(dim=1), el2n * weight[TARGETS] / weight[TARGETS].mean())


@pytest.mark.parametrize("name", ["gradient", "no_such"])
def test_a_score_that_is_not_made_of_losses_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)made of losses \(el2n, .*'{name}': 'gradient' is taken where it enters"
    ):
        S.compute_significance(name, None, LOSSES, None)


def test_el2n_soft_targets_and_binary() -> None:
    soft = torch.randn(5, 4, generator=GENERATOR).softmax(1)
    expected = (LOGITS.softmax(1) - soft).norm(dim=1)
    torch.testing.assert_close(S.el2n(LOSSES, LOGITS, None, soft, kind="multiclass"), expected)
    labels = (LOGITS > 0.3).float()
    expected = (LOGITS.sigmoid() - labels).norm(dim=1)
    torch.testing.assert_close(S.el2n(LOSSES, LOGITS, None, labels, kind="binary"), expected)
    expected = (LOGITS[:, 0].sigmoid() - labels[:, 0]).abs()
    torch.testing.assert_close(S.el2n(LOSSES, LOGITS[:, 0], None, labels[:, 0], kind="binary"), expected)


def test_el2n_tokens_with_ignored_ones() -> None:
    logits, targets = torch.randn(5, 3, 4, generator=GENERATOR), torch.randint(0, 4, (5, 3), generator=GENERATOR)
    targets[1, 1:] = -100
    per_token = S.el2n(torch.zeros(15), logits.view(15, 4), None, targets.view(15).clamp_min(0)).view(5, 3)
    expected = torch.stack([per_token[i][targets[i] >= 0].mean() for i in range(5)])
    got = S.el2n(torch.zeros(5), logits.view(15, 4), None, targets.view(15), ignore_index=-100)
    torch.testing.assert_close(got, expected)
    dense = S.el2n(torch.zeros(5), logits.transpose(1, 2), None, targets, ignore_index=-100)  # (B, C, T)
    torch.testing.assert_close(dense, expected)


def test_el2n_substitutes_the_loss_for_regression() -> None:
    prediction, truth = LOGITS, LOGITS + 1.5
    with LossCapture() as capture:
        F.mse_loss(prediction, truth)
    record = capture.record(5)
    torch.testing.assert_close(S.compute_significance("el2n", record, record.losses, None), torch.full((5,), 2.25))
    torch.testing.assert_close(S.compute_significance("el2n", None, LOSSES, None), LOSSES)


def test_loss() -> None:
    assert S.loss(torch.tensor([1.0, 0.0, 2.5])).tolist() == [1.0, 0.0, 2.5]
    assert S.loss(torch.tensor([1.0, 0.5, 2.5])).tolist() == [1.0, 0.5, 2.5]
    assert S.loss(torch.tensor([-1.0, 0.0, 2.5])).tolist() == [0.0, 1.0, 3.5], "a density's loss has no zero"


def test_loss_entropy_is_the_published_formula() -> None:
    entropy = [-sum(p * math.log(p) for p in row) for row in rows(LOGITS)]
    expected = [0.7 * a + 0.3 * b for a, b in zip(LOSSES.tolist(), entropy)]
    assert S.loss_entropy(LOSSES, LOGITS, None, TARGETS).tolist() == pytest.approx(expected, rel=1e-5)
    sure = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    assert S.loss_entropy(torch.zeros(1), sure, None, torch.tensor([0])).tolist() == [0.0], "no NaN at p = 0"


def test_loss_entropy_binary() -> None:
    p = LOGITS[:, 0].sigmoid().tolist()
    entropy = [-(q * math.log(q) + (1 - q) * math.log(1 - q)) for q in p]
    got = S.loss_entropy(LOSSES, LOGITS[:, 0], None, TARGETS.float(), kind="binary")
    assert got.tolist() == pytest.approx([0.7 * a + 0.3 * b for a, b in zip(LOSSES.tolist(), entropy)], rel=1e-5)


def test_loss_intensity() -> None:
    spreads = [torch.tensor(INPUTS[i].flatten().tolist()).std().item() for i in range(5)]
    mean_loss, mean_spread = sum(LOSSES.tolist()) / 5, sum(spreads) / 5
    expected = [0.7 * a / mean_loss + 0.3 * b / mean_spread for a, b in zip(LOSSES.tolist(), spreads)]
    got = S.loss_intensity(LOSSES, None, INPUTS)
    assert got.tolist() == pytest.approx(expected, rel=1e-5)
    assert got.mean().item() == pytest.approx(1.0)


def test_confidence() -> None:
    expected = [1 - row[t] for row, t in zip(rows(LOGITS), TARGETS.tolist())]
    assert S.confidence(LOSSES, LOGITS, None, TARGETS).tolist() == pytest.approx(expected, rel=1e-5)
    soft = F.one_hot(TARGETS, 4).float()
    assert S.confidence(LOSSES, LOGITS, None, soft, kind="multiclass").tolist() == pytest.approx(expected, rel=1e-5)
    labels = (LOGITS > 0).float()
    expected_binary = (LOGITS.sigmoid() - labels).abs().mean(1)
    torch.testing.assert_close(S.confidence(LOSSES, LOGITS, None, labels, kind="binary"), expected_binary)


@pytest.mark.parametrize("name", ["loss_entropy", "confidence"])
def test_undefined_for_regression(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*regression.*significance='loss'"):
        S.compute_significance(name, None, LOSSES, None)


def test_loss_intensity_needs_an_input() -> None:
    with pytest.raises(ValueError, match="needs a floating-point input"):
        S.compute_significance("loss_intensity", None, LOSSES, None)


def test_ambiguous_targets_are_asked_about() -> None:
    with pytest.raises(ValueError, match="pass kind="):
        S.el2n(LOSSES, LOGITS, None, LOGITS)


def test_own_callable_gets_all_four_and_is_checked() -> None:
    record = LossRecord("cross_entropy", LOSSES, LOGITS, TARGETS, "multiclass")
    got = []

    def own(losses: Tensor, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        got.extend([losses, logits, inputs, targets])
        return logits.amax(1)

    torch.testing.assert_close(S.compute_significance(own, record, LOSSES, INPUTS), LOGITS.amax(1).clamp_min(0))
    assert all(a is b for a, b in zip(got[1:], [LOGITS, INPUTS, TARGETS]))
    with pytest.raises(ValueError, match=r"expected significance of shape \(5,\)"):
        S.compute_significance(lambda losses, *_: losses.mean(), record, LOSSES, INPUTS)


def test_result_is_finite_and_non_negative() -> None:
    bad = torch.tensor([1.0, math.nan, math.inf, -2.0, 3.0])
    assert S.compute_significance(lambda losses, *_: bad, None, LOSSES, None).tolist() == [1.0, 0.0, 0.0, 0.0, 3.0]
