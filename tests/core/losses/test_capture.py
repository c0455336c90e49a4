"""Watched losses against the slow, obviously correct way: the user's own loss on each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_ast.core.losses.capture import LossCapture, LossReached, check_losses
from lightning_ast.errors import LossCaptureError

B = 6


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


CLASSES = torch.tensor([0, 3, 1, 1, 2, 0])
PIXELS = torch.randint(0, 4, (B, 3, 5), generator=torch.Generator().manual_seed(1))
SOFT = draw(B, 4).softmax(1)
SIGNS = torch.tensor([1.0, -1, 1, 1, -1, 1], dtype=torch.float64)
CLASS_WEIGHT = torch.tensor([1.0, 0.5, 3.0, 0.25], dtype=torch.float64)
P = draw(B, 3).sigmoid()
TEXT = torch.randint(1, 4, (B, 2), generator=torch.Generator().manual_seed(2))
FRAMES = torch.full((B,), 5)
LENGTHS = torch.tensor([1, 2, 2, 1, 2, 1])

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
    "ctc": lambda i: F.ctc_loss(draw(5, B, 4).log_softmax(2)[:, i], TEXT[i], FRAMES[i], LENGTHS[i]),
    "ctc_sum": lambda i: F.ctc_loss(
        draw(5, B, 4).log_softmax(2)[:, i], TEXT[i], FRAMES[i], LENGTHS[i], reduction="sum"
    ),
    "sum": lambda i: F.cross_entropy(draw(B, 4)[i], CLASSES[i], weight=CLASS_WEIGHT, reduction="sum"),
}
IN_MEAN = {name: CLASS_WEIGHT[CLASSES] for name in ("positional", "class_weight", "smoothing_weight", "nll")} | {
    "dense_ignore": (CLASS_WEIGHT[PIXELS] * (PIXELS != 2)).sum((1, 2))
}
"""What each sample counts for in the mean, where that is not the same for all."""


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")
@pytest.mark.parametrize("name", CASES)
def test_against_a_loop_over_single_samples(name: str) -> None:
    call = CASES[name]
    with LossCapture() as capture:
        value = call(slice(None))
    losses = capture.record(B).losses
    singles = torch.stack([call(slice(i, i + 1)) for i in range(B)])
    in_mean = IN_MEAN.get(name, torch.ones(B, dtype=torch.float64))
    torch.testing.assert_close(losses, singles * in_mean / in_mean.mean())
    torch.testing.assert_close(losses.sum() if "sum" in name else losses.mean(), value)
    assert torch.equal(value, call(slice(None))), "watching changes nothing"


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch < 2.13")
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_linear_cross_entropy(shape: tuple[int, ...]) -> None:
    weight, bias = draw(*shape), draw(*shape[:-1])
    targets = torch.randint(0, 4, (B, *shape[1:-1]), generator=torch.Generator().manual_seed(3))
    targets[0] = -100
    logits = (draw(B, 3) @ weight.flatten(0, -2).t()).view(B, *shape[:-1]) + bias
    with LossCapture() as capture:
        value = F.linear_cross_entropy(draw(B, 3), weight, targets, linear_bias=bias)
    record = capture.record(B)
    torch.testing.assert_close(record.logits, logits)
    torch.testing.assert_close(value, F.cross_entropy(logits, targets))
    torch.testing.assert_close(record.losses.mean(), value)
    assert record.losses[0] == 0


def test_weight_argument_of_recent_torch() -> None:
    try:
        F.mse_loss(draw(B, 3), P, weight=P)
    except TypeError:
        pytest.skip("this torch's mse_loss has no weight")
    with LossCapture() as capture:
        value = F.mse_loss(draw(B, 3), P, weight=P)
    torch.testing.assert_close(capture.record(B).losses.mean(), value)


def test_tokens_fold_back_to_samples() -> None:
    logits, targets = draw(B, 7, 4).requires_grad_(), torch.randint(0, 4, (B, 7))
    targets[:, 5:] = -100
    targets[0, 1:] = -100
    with LossCapture() as capture:
        value = F.cross_entropy(logits.view(-1, 4), targets.view(-1))
    losses = capture.record(B).losses
    singles = torch.stack([F.cross_entropy(logits[i], targets[i], reduction="sum") for i in range(B)])
    torch.testing.assert_close(losses, singles * B / 26)
    torch.testing.assert_close(losses.mean(), value)
    gradient = torch.autograd.grad(losses[2], logits)[0]
    assert gradient[2].abs().sum() > 0
    assert gradient[[0, 1, 3, 4, 5]].abs().sum() == 0, "a sample's loss depends on its own tokens alone"


def test_samples_without_valid_targets_have_loss_zero() -> None:
    targets = CLASSES.clone()
    targets[2] = -100
    with LossCapture() as capture:
        F.cross_entropy(draw(B, 4), targets)
    assert capture.record(B).losses[2] == 0
    with LossCapture() as capture:
        F.cross_entropy(draw(B, 4), torch.full((B,), -100))
    assert capture.record(B).losses.tolist() == [0] * B


def test_losses_of_16_bits_are_computed_in_32() -> None:
    with torch.autocast("cpu", torch.bfloat16), LossCapture() as capture:
        scores = torch.randn(B, 5) @ torch.randn(5, 4)
        value = F.cross_entropy(scores, CLASSES)
    assert scores.dtype == torch.bfloat16
    losses = capture.record(B).losses
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(scores.float(), CLASSES, reduction="none"))
    torch.testing.assert_close(losses.mean(), value, check_dtype=False)


def test_stop_runs_nothing_behind_the_loss() -> None:
    with LossCapture(stop=True) as capture, pytest.raises(LossReached):
        with torch.no_grad():
            F.mse_loss(draw(B, 3), P)
        try:
            F.cross_entropy(draw(B, 4), CLASSES)
        except Exception:
            pass
        raise AssertionError("the code behind the loss ran")
    torch.testing.assert_close(capture.record(B).losses, F.cross_entropy(draw(B, 4), CLASSES, reduction="none"))


def test_it_is_entered_in_one_place_and_left_in_another() -> None:
    other = Other()
    capture = LossCapture()
    capture.__enter__()
    capture.__enter__()  # a second time does nothing
    F.mse_loss(draw(B, 3), P)
    other.__enter__()
    capture.__exit__(None, None, None)
    capture.__exit__(None, None, None)
    before = other.calls
    F.mse_loss(draw(B, 3), P)
    assert other.calls > before, "the mode that was entered later is still on"
    other.__exit__(None, None, None)
    after = other.calls
    F.mse_loss(draw(B, 3), P)
    assert other.calls == after
    assert len(capture.calls) == 1
    with capture:
        F.l1_loss(draw(B, 3), P)
    assert [call.name for call in capture.calls] == ["mse_loss", "l1_loss"]
    capture.clear()
    assert capture.calls == []


class Other(TorchFunctionMode):
    """Counts calls."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_losses_in_compiled_code_are_not_seen() -> None:
    compiled = torch.compile(lambda x: F.cross_entropy(2 * x, CLASSES), backend="aot_eager", fullgraph=True)
    with LossCapture() as capture:
        compiled(draw(B, 4).requires_grad_())
    assert capture.calls == []


def test_losses_in_function_transforms_do_no_harm() -> None:
    one = torch.func.grad(F.cross_entropy)
    with LossCapture() as capture:
        torch.func.vmap(one)(draw(B, 4), CLASSES)
        F.cross_entropy(draw(B, 4), CLASSES)
    assert capture.labels(B).tolist() == CLASSES.tolist()


def test_nothing_called_names_the_remedy() -> None:
    with LossCapture() as capture:
        ((draw(B, 3) - P) ** 2).mean()
    with pytest.raises(LossCaptureError, match=r"by hand.*significance='gradient'.*per_sample_loss"):
        capture.record(B)


def test_several_called_are_named() -> None:
    with LossCapture() as capture:
        F.cross_entropy(draw(B, 4), CLASSES) + F.mse_loss(draw(B, 3), P)
    with pytest.raises(LossCaptureError, match=r"2 losses were called \(cross_entropy, mse_loss\)"):
        capture.record(B)


def change_in_place() -> None:
    x = draw(B, 3)
    F.mse_loss(x, P)
    x.zero_()


LATER = {
    "deprecated": (lambda: F.cross_entropy(draw(B, 4), CLASSES, size_average=True), "deprecated"),
    "size": (lambda: F.cross_entropy(draw(B + 1, 4), torch.zeros(B + 1, dtype=torch.long)), "leading dimension of 6"),
    "empty": (lambda: F.mse_loss(draw(0, 4), draw(0, 4), reduction="sum"), "leading dimension of 6"),
    "unbatched": (lambda: F.cross_entropy(draw(4), CLASSES[0]), "leading dimension of 6"),
    "changed": (change_in_place, "changed in place after it"),
    "picked": (lambda: F.mse_loss(grown(draw(B, 4))[torch.arange(2 * B) % B], draw(2 * B, 4)), "picked by an index"),
    "joined": (lambda: F.mse_loss(torch.cat([grown(draw(B, 4))] * 2), draw(2 * B, 4)), "do not lie together"),
}


def grown(x: Tensor) -> Tensor:
    return 2 * x.requires_grad_()


@pytest.mark.parametrize("name", LATER)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_what_cannot_be_taken_apart_is_refused_when_a_score_is_asked_for(name: str) -> None:
    call, message = LATER[name]
    with LossCapture() as capture:
        call()
    with pytest.raises(LossCaptureError, match=message):
        capture.record(B)


def test_unreduced_losses_are_averaged_over_each_sample() -> None:
    with LossCapture() as capture:
        losses = F.mse_loss(draw(B, 3), P, reduction="none")
    torch.testing.assert_close(capture.record(B).losses, losses.mean(1))


def test_labels() -> None:
    ignored = CLASSES.clone()
    ignored[1] = -100
    with LossCapture() as capture:
        F.mse_loss(draw(B, 3), P)
        F.cross_entropy(draw(B, 4), SOFT)
        with torch.no_grad():
            F.cross_entropy(draw(B, 4), ignored)
    assert capture.labels(B).tolist() == [0, -1, 1, 1, 2, 0], "a loss that is only logged may give them"
    assert capture.labels(B + 1) is None
    with capture:
        F.nll_loss(draw(B, 4).log_softmax(1), CLASSES)
    assert capture.labels(B).tolist() == CLASSES.tolist(), "one with gradient comes first"
    assert LossCapture().labels(B) is None


@pytest.mark.parametrize("wrong", [torch.tensor(1.0), torch.zeros(B, 2), torch.zeros(B, dtype=torch.long), 3.0])
def test_explicit_losses_are_checked(wrong: object) -> None:
    with pytest.raises(LossCaptureError, match=r"expected per-sample losses, .* of shape \(6,\)"):
        check_losses(wrong, B)
    good = torch.zeros(B)
    assert check_losses(good, B) is good
