"""Scores of the user's own that select at random: refused at the first batch, or warned of once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ast import ConfigurationError, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, fit, weights

Score = Callable[..., Any]


def run(digits: Digits, score: Score, *, mode: str = "mask", warm: bool = False, mixin: bool = False, steps: int = -1):
    callback = SparseSelectionCallback(mode=mode, significance="gradient" if mixin else score)
    module = fresh(mixed(score) if mixin else PlainNet)
    schedule = [TwoStageScheduler(warmup_epochs=1)] if warm or mode == "prune" else []
    data = loader((digits[0][:128], digits[1][:128]), batch_size=32)
    before = weights(module)
    try:
        fit(module, data, callback, *schedule, max_epochs=2, max_steps=steps)
    except Exception:
        assert all(torch.equal(before[name], value) for name, value in weights(module).items() if "net.1" not in name)
        raise
    return callback


def mixed(score: Score) -> type[PlainNet]:
    class Net(SparseLossMixin, PlainNet):
        def significance(self, losses: Tensor, logits: Any, inputs: Any, targets: Any) -> Tensor:
            return score(losses, logits, inputs, targets)

    return Net


UNUSABLE: dict[str, tuple[Score, str]] = {
    "negative": (lambda losses, *_: -losses - 1, "Of 32 values, 32 are negative and 0 are NaN"),
    "nan": (lambda losses, *_: losses * math.nan, "Of 32 values, 0 are negative and 32 are NaN or infinite"),
    "infinite": (lambda losses, *_: losses + math.inf, "0 are negative and 32 are NaN or infinite"),
    "too large for float32": (lambda losses, *_: losses.double() * 1e300, "32 are NaN or infinite"),
    "mixed": (lambda losses, *_: torch.tensor([-1.0, math.nan, 0.0, -math.inf] * 8), "8 are negative and 16 are NaN"),
    "integers": (lambda losses, *_: torch.full((32,), -3), "32 are negative"),
}


@pytest.mark.parametrize("warm", [False, True], ids=["sparse", "warmup"])
@pytest.mark.parametrize("mode", MODES)
def test_no_usable_value_is_refused_at_the_first_batch(digits: Digits, mode: str, warm: bool) -> None:
    score, message = UNUSABLE["negative"]
    with pytest.raises(ConfigurationError, match=message):
        run(digits, score, mode=mode, warm=warm)


@pytest.mark.parametrize("mixin", [False, True], ids=["callable", "method"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_every_kind_of_no_usable_value(digits: Digits, kind: str, mixin: bool) -> None:
    score, message = UNUSABLE[kind]
    with pytest.raises(ConfigurationError, match=message) as error:
        run(digits, score, mixin=mixin)
    assert "subtract the smallest possible value or take exp()" in str(error.value)


def partly(losses: Tensor, *_: Any) -> Tensor:
    return losses.where(torch.arange(losses.numel()) % 4 != 0, torch.full_like(losses, math.nan))


@pytest.mark.parametrize("warm", [False, True], ids=["sparse", "warmup"])
@pytest.mark.parametrize("mode", MODES)
def test_a_lost_part_is_warned_of_once(digits: Digits, mode: str, warm: bool) -> None:
    with pytest.warns(UserWarning, match="Of 32 values, 0 are negative and 8 are NaN or infinite") as caught:
        run(digits, partly, mode=mode, warm=warm)
    assert len([w for w in caught if "significance must give" in str(w.message)]) == 1


def test_values_that_are_lost_later_are_warned_of(digits: Digits) -> None:
    """A later batch does not end a run that trains."""
    seen: list[int] = []

    def turns(losses: Tensor, *_: Any) -> Tensor:
        seen.append(losses.numel())
        return losses if len(seen) < 3 else -losses

    with pytest.warns(UserWarning, match="Of 32 values, 32 are negative"):
        callback = run(digits, turns)
    assert callback.ledger.offered == 256


def test_scores_that_are_all_zero_are_warned_of(digits: Digits) -> None:
    with pytest.warns(UserWarning, match="significance of all 32 samples of the first batch is 0.*at random"):
        run(digits, lambda losses, *_: torch.zeros_like(losses), steps=1)


@pytest.mark.parametrize(
    "score",
    [
        lambda losses, *_: torch.ones_like(losses),
        lambda losses, *_: losses > losses.median(),
        lambda losses, *_: losses.argsort(),
        lambda losses, *_: losses.double(),
    ],
    ids=["random share", "bool", "integers", "float64"],
)
def test_usable_scores_are_not_warned_of(digits: Digits, score: Score) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lightning-ast")
        assert run(digits, score, steps=2).ledger.selected < 64


@pytest.mark.parametrize(
    ("score", "got"),
    [
        (lambda losses, *_: losses.mean(), r"shape \(\), torch.float32"),
        (lambda losses, *_: losses[:, None], r"shape \(32, 1\)"),
        (lambda losses, *_: losses.tolist(), "list"),
        (lambda losses, *_: None, "NoneType"),
        (lambda losses, *_: losses.to(torch.complex64), r"shape \(32,\), torch.complex64"),
    ],
    ids=["mean", "column", "list", "none", "complex"],
)
def test_what_is_no_score_is_refused(digits: Digits, score: Score, got: str) -> None:
    with pytest.raises(ValueError, match=rf"shape \(32,\), one value a sample, got {got}"):
        run(digits, score)


@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
def test_a_bad_sample_is_not_held_against_the_score(digits: Digits) -> None:
    """The quarantine leaves it out: what the score says of it counts for nothing."""
    x = digits[0].clone()
    x[0] = math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*significance")
        for mode in ("mask", "prune"):
            callback = SparseSelectionCallback(
                mode=mode, quarantine_limit=1.0, significance=lambda losses, logits, *_: _nan_where_zero(losses)
            )
            schedule = TwoStageScheduler(warmup_epochs=1)
            fit(fresh(Nan), loader((x[:64], digits[1][:64]), batch_size=32), callback, schedule, max_epochs=2)
            assert len(callback.quarantined) >= 1


def _nan_where_zero(losses: Tensor) -> Tensor:
    return losses.where(losses > 0, torch.full_like(losses, math.nan))


class Nan(PlainNet):
    """A first loss that is NaN, whatever the input."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        scores = self(x)
        hurt = (torch.arange(len(x)) == 0) & (batch_idx == 0)
        return torch.nn.functional.cross_entropy(scores.masked_fill(hurt[:, None], math.nan), y)
