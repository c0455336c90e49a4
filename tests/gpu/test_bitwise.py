"""Deterministic runs on the device: resumed ones end with the same bits, and off means off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.gpu.runs import callbacks_of, train
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import MODES, SaveAt, StopAfter, assert_same_weights, weights


def generators() -> list[Tensor]:
    """The state of torch's global generators."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def run(digits: Digits, device: str, *callbacks: Any, seed: int = 0, module_seed: int = 0, **options: Any) -> Any:
    """Weights and generators at the end of a shuffled run with dropout and BatchNorm, from given seeds."""
    torch.manual_seed(module_seed)
    module = PlainNet()
    torch.manual_seed(seed)
    data = loader(digits, shuffle=True)
    train(module, digits, device, *callbacks, data=data, **{"deterministic": True, "max_epochs": 3, **options})
    return weights(module), generators()


@pytest.mark.parametrize(
    ("mode", "point"),
    [
        ("prune", ("epoch end", 1, None)),
        ("prune", ("batch end", 0, 3)),
        ("prune", ("batch end", 1, 1)),
        ("prune", ("batch end", 2, 1)),
        ("partial", ("epoch end", 0, None)),
        ("partial", ("epoch end", 1, None)),
        ("mask", ("epoch end", 1, None)),
        ("subset", ("epoch end", 1, None)),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(
    digits: Digits, device: str, mode: str, point: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    straight = run(digits, device, *callbacks_of(mode, gate="soft"), SaveAt(path, *point))
    again = run(digits, device, *callbacks_of(mode, gate="soft"), seed=7, module_seed=7, ckpt_path=path)
    assert_same_weights(straight[0], again[0])
    assert all(map(torch.equal, straight[1], again[1])), "the global generators"


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_repeated_bit_by_bit(digits: Digits, device: str, mode: str) -> None:
    one, other = (run(digits, device, *callbacks_of(mode, gate="soft")) for _ in range(2))
    assert_same_weights(one[0], other[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_warmup_is_the_plain_run(digits: Digits, device: str, mode: str) -> None:
    plain = run(digits, device, StopAfter(16))
    ours = run(digits, device, *callbacks_of(mode, warmup=2), StopAfter(16))
    assert_same_weights(plain[0], ours[0])
    assert all(map(torch.equal, plain[1], ours[1])), "the global generators"


@pytest.mark.parametrize("target", ["target_activation_rate", "target_coverage"])
@pytest.mark.parametrize("mode", MODES)
def test_a_target_of_one_is_the_plain_run(digits: Digits, device: str, mode: str, target: str) -> None:
    plain = run(digits, device)
    callback = SparseSelectionCallback(mode=mode, **{target: 1.0})  # type: ignore[arg-type]
    ours = run(digits, device, callback, TwoStageScheduler(warmup_epochs=1))
    assert_same_weights(plain[0], ours[0])
    assert all(map(torch.equal, plain[1], ours[1])), "the global generators"


def test_the_instrument_sees_another_seed(digits: Digits, device: str) -> None:
    one, other = (run(digits, device, seed=seed) for seed in (0, 1))
    assert not torch.equal(one[0]["net.0.weight"], other[0]["net.0.weight"])
