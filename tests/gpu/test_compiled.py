"""Compiled networks and CUDA graphs: right, or refused with a reason ahead of the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_ast.errors import BatchError, ConfigurationError, EntryError, LossCaptureError
from tests.gpu.runs import Mlp, callbacks_of, distance, finite, train
from tests.helpers.data import Digits, loader
from tests.helpers.modules import fresh
from tests.helpers.training import MODES

REFUSALS = ConfigurationError, EntryError, LossCaptureError, BatchError
CLOSE = 1e-2


def trained(digits: Digits, device: str, mode: str, change: Any = None) -> nn.Module:
    """Eight dense and eight sparse steps on batches of one size; a pruned epoch has four."""
    module = fresh(Mlp)
    if change is not None:
        module = module.to(device)
        module.net = change(module.net)
    data = loader(digits, drop_last=True)
    train(module, digits, device, *callbacks_of(mode), data=data, max_epochs=2)
    return module


def assert_right_or_refused(digits: Digits, device: str, mode: str, change: Any) -> None:
    eager = trained(digits, device, mode)
    try:
        module = trained(digits, device, mode, change)
    except REFUSALS as error:
        print(f"{mode}: refused: {error}")
        return
    assert finite(module)
    apart = distance(eager, module, Mlp)
    print(f"{mode}: {apart:.1e} from the eager run")
    assert apart < CLOSE


def compiled(device: str, **options: Any) -> Any:
    """Inductor on CUDA; on a CPU what takes no C++ compiler."""
    return lambda net: torch.compile(net, **(options if device == "cuda" else {"backend": "aot_eager"}))


@pytest.mark.parametrize("mode", MODES)
def test_inductor(digits: Digits, device: str, mode: str) -> None:
    eager = trained(digits, device, mode)
    module = trained(digits, device, mode, compiled(device))
    apart = distance(eager, module, Mlp)
    print(f"{mode}: {apart:.1e} from the eager run")
    assert apart < CLOSE


@pytest.mark.parametrize("mode", ["plain", "mask", "prune"])
def test_reduce_overhead(digits: Digits, device: str, mode: str) -> None:
    assert_right_or_refused(digits, device, mode, compiled(device, mode="reduce-overhead"))


@pytest.mark.parametrize("mode", ["plain", "mask", "partial", "prune"])
def test_graphed_callables(digits: Digits, device: str, mode: str) -> None:
    """All batches have the size of the captured one."""

    def graphed(net: nn.Module) -> nn.Module:
        if device == "cpu":
            return net
        return torch.cuda.make_graphed_callables(net, (digits[0][:64].to(device),))

    assert_right_or_refused(digits, device, mode, graphed)
