"""Captured losses against the slow, obviously correct way: the user's own loss on each sample alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core.losses import LossCapture, LossCaptureError, LossReached, check_losses

B = 6


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


CLASSES = torch.tensor([0, 3, 1, 1, 2, 0])
PIXELS = torch.randint(0, 4, (B, 3, 5), generator=torch.Generator().manual_seed(1))
SOFT = draw(B, 4).softmax(1)
SIGNS = torch.tensor([1.0, -1, 1, 1, -1, 1], dtype=torch.float64)
CLASS_WEIGHT = torch.tensor([1.0, 0.5, 3.0, 0.25], dtype=torch.float64)
P = draw(B, 3).sigmoid()

Call = Callable[[slice], Tensor]
CASES: dict[str, Call] = {
    "cross_entropy": lambda i: F.cross_entropy(draw(B, 4)[i], CLASSES[i]),
    "module": lambda i: nn.CrossEntropyLoss()(draw(B, 4)[i], CLASSES[i]),
    "positional": lambda i: F.cross_entropy(draw(B, 4)[i], CLASSES[i], CLASS_WEIGHT, None, -100),
    "class_weight": lambda i: F.cross_entropy(draw(B, 4)[i], CLASSES[i], weight=CLASS_WEIGHT),
    "label_smoothing": lambda i: F.cross_entropy(draw(B, 4)[i], CLASSES[i], label_smoothing=0.1),
    "smoothing_weight": lambda i: F.cross_entropy(draw(B, 4)[i], CLASSES[i], weight=CLASS_WEIGHT, label_smoothing=0.2),
    "soft_targets": lambda i: F.cross_entropy(draw(B, 4)[i], SOFT[i]),
    "soft_weight": lambda i: F.cross_entropy(draw(B, 4)[i], SOFT[i], weight=CLASS_WEIGHT),
    "dense": lambda i: F.cross_entropy(draw(B, 4, 3, 5)[i], PIXELS[i]),
    "dense_soft": lambda i: F.cross_entropy(draw(B, 4, 3, 5)[i], draw(B, 4, 3, 5).softmax(1)[i]),
    "dense_ignore": lambda i: F.cross_entropy(draw(B, 4, 3, 5)[i], PIXELS[i], ignore_index=2, weight=CLASS_WEIGHT),
    "nll": lambda i: F.nll_loss(draw(B, 4).log_softmax(1)[i], CLASSES[i], weight=CLASS_WEIGHT),
    "mse": lambda i: F.mse_loss(draw(B, 3)[i], draw(B, 3, 1).squeeze(2)[i]),
    "l1": lambda i: F.l1_loss(draw(B, 3)[i], P[i]),
    "smooth_l1": lambda i: F.smooth_l1_loss(draw(B, 3)[i], P[i], beta=0.5),
    "huber": lambda i: F.huber_loss(draw(B, 3)[i], P[i], delta=0.7),
    "bce": lambda i: F.binary_cross_entropy(P[i], P[i].round()),
    "bce_1d": lambda i: F.binary_cross_entropy(P[i, 0], P[i, 0].round()),
    "bce_logits": lambda i: F.binary_cross_entropy_with_logits(
        draw(B, 3)[i], P[i].round(), pos_weight=CLASS_WEIGHT[:3]
    ),
    "kl_mean": lambda i: F.kl_div(draw(B, 4).log_softmax(1)[i], SOFT[i], reduction="mean", log_target=False),
    "kl_batchmean": lambda i: F.kl_div(
        draw(B, 4).log_softmax(1)[i], SOFT[i].log(), reduction="batchmean", log_target=True
    ),
    "gaussian_nll": lambda i: F.gaussian_nll_loss(draw(B, 3)[i], P[i], P[i] + 0.5),
    "poisson_nll": lambda i: F.poisson_nll_loss(draw(B, 3)[i], P[i]),
    "soft_margin": lambda i: F.soft_margin_loss(draw(B, 3)[i], P[i].round() * 2 - 1),
    "hinge_embedding": lambda i: F.hinge_embedding_loss(draw(B)[i], SIGNS[i]),
    "multi_margin": lambda i: F.multi_margin_loss(draw(B, 4)[i], CLASSES[i]),
    "multilabel_margin": lambda i: F.multilabel_margin_loss(
        draw(B, 4)[i], torch.eye(4, dtype=torch.long)[CLASSES][i] - 1
    ),
    "multilabel_soft_margin": lambda i: F.multilabel_soft_margin_loss(draw(B, 3)[i], P[i].round()),
    "margin_ranking": lambda i: F.margin_ranking_loss(draw(B)[i], P[i, 0], SIGNS[i], margin=0.3),
    "cosine_embedding": lambda i: F.cosine_embedding_loss(draw(B, 3)[i], P[i], SIGNS[i]),
    "triplet": lambda i: F.triplet_margin_loss(draw(B, 3)[i], P[i], draw(B, 3)[i] + 0.1),
    "triplet_distance": lambda i: F.triplet_margin_with_distance_loss(draw(B, 3)[i], P[i], draw(B, 3)[i] + 0.1),
    "sum": lambda i: F.cross_entropy(draw(B, 4)[i], CLASSES[i], weight=CLASS_WEIGHT, reduction="sum"),
}


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")
@pytest.mark.parametrize("name", CASES)
def test_against_a_loop_over_single_samples(name: str) -> None:
    call = CASES[name]
    with LossCapture(B) as capture:
        value = call(slice(None))
    record = capture.record()
    singles = torch.stack([call(slice(i, i + 1)) for i in range(B)])
    assert record.losses.shape == (B,)
    torch.testing.assert_close(record.losses, singles)
    torch.testing.assert_close(record.total, value)  # the user's own number, from the parts
    assert torch.equal(value, call(slice(None))), "watching changes nothing"


def test_weight_argument_of_recent_torch() -> None:
    try:
        F.mse_loss(draw(B, 3), P, weight=P)
    except TypeError:
        pytest.skip("this torch's mse_loss has no weight")
    with LossCapture(B) as capture:
        value = F.mse_loss(draw(B, 3), P, weight=P)
    torch.testing.assert_close(capture.record().total, value)


def test_tokens_fold_back_to_samples() -> None:
    logits, targets = draw(B, 7, 4).requires_grad_(), torch.randint(0, 4, (B, 7))
    targets[:, 5:] = -100
    targets[0, 1:] = -100
    with LossCapture(B) as capture:
        value = F.cross_entropy(logits.view(-1, 4), targets.view(-1))
    record = capture.record()
    singles = torch.stack([F.cross_entropy(logits[i], targets[i]) for i in range(B)])
    torch.testing.assert_close(record.losses, singles)
    assert record.counts.tolist() == [1, 5, 5, 5, 5, 5]
    torch.testing.assert_close(record.total, value)
    gradient = torch.autograd.grad(record.losses[2], logits)[0]
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1, 3, 4, 5]].abs().sum() == 0, "a sample's loss depends on its own tokens alone"


def test_a_sample_without_valid_targets_has_loss_zero() -> None:
    targets = CLASSES.clone()
    targets[2] = -100
    with LossCapture(B) as capture:
        F.cross_entropy(draw(B, 4), targets)
    assert capture.record().losses[2] == 0


def test_autocast_gives_float_losses() -> None:
    with torch.autocast("cpu", torch.bfloat16), LossCapture(B) as capture:
        scores = torch.randn(B, 5) @ torch.randn(5, 4)
        value = F.cross_entropy(scores, CLASSES)
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(capture.record().total, value)


def test_rewrite_replaces_what_the_user_gets() -> None:
    with LossCapture(B, rewrite=lambda record, compute, graded: record.losses[0] * 2 + 0 * compute()):
        value = F.cross_entropy(draw(B, 4), CLASSES)
    torch.testing.assert_close(value, 2 * F.cross_entropy(draw(B, 4)[:1], CLASSES[:1]))


def test_stop_runs_nothing_behind_the_loss() -> None:
    with LossCapture(B, stop=True) as capture, pytest.raises(LossReached):
        try:
            F.cross_entropy(draw(B, 4), CLASSES)
        except Exception:
            pass
        raise AssertionError("the code behind the loss ran")
    assert len(capture.records) == 1


def test_nothing_captured_names_the_remedy() -> None:
    with LossCapture(B) as capture:
        ((draw(B, 3) - P) ** 2).mean()
    with pytest.raises(LossCaptureError, match=r"by hand.*per_sample_loss"):
        capture.record()


def test_several_captured_are_named() -> None:
    with LossCapture(B) as capture:
        F.cross_entropy(draw(B, 4), CLASSES) + F.mse_loss(draw(B, 3), P)
    with pytest.raises(LossCaptureError, match=r"2 losses were captured \(cross_entropy, mse_loss\)"):
        capture.record()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.cross_entropy(draw(B, 4), CLASSES, reduction="none"), "averaged by hand"),
        (lambda: F.cross_entropy(draw(B, 4), CLASSES, size_average=True), "deprecated"),
        (lambda: F.cross_entropy(draw(B + 1, 4), torch.zeros(B + 1, dtype=torch.long)), "leading dimension of 6"),
        (
            lambda: F.ctc_loss(
                draw(5, B, 4).log_softmax(2),
                torch.ones(B, 2, dtype=torch.long),
                torch.full((B,), 5),
                torch.full((B,), 2),
            ),
            "ctc_loss.*per_sample_loss",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_what_cannot_be_taken_apart_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with LossCapture(B), pytest.raises(LossCaptureError, match=message):
        call()


def test_unreduced_accepts_what_the_user_averages() -> None:
    with LossCapture(B, unreduced=True) as capture:
        losses = F.cross_entropy(draw(B, 4), CLASSES, reduction="none")
    torch.testing.assert_close(capture.records[0].losses, losses)
    assert capture.records[0].kind == "multiclass"


@pytest.mark.parametrize("wrong", [torch.tensor(1.0), torch.zeros(B, 2), torch.zeros(B, dtype=torch.long), 3.0])
def test_explicit_losses_are_checked(wrong: object) -> None:
    with pytest.raises(LossCaptureError, match=r"expected per-sample losses, .* of shape \(6,\)"):
        check_losses(wrong, B)
    good = torch.zeros(B)
    assert check_losses(good, B) is good
