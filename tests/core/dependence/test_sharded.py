"""Parameters that are gathered from several processes within the forward: a sample is followed through them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_ast.core.dependence.trace import SampleTrace
from tests.core.dependence.tracing import B, places


@pytest.fixture
def alone() -> Iterator[None]:
    """One process that exchanges with itself."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")  # the name before torch 2.14
@pytest.mark.usefixtures("alone")
def test_gathered_parameters_do_not_depend_on_the_samples() -> None:
    part = torch.rand(12)
    x = torch.rand(B, 3) + 1
    with SampleTrace(x, B) as trace:
        buffer = torch.empty(12)
        torch.distributed.all_gather_into_tensor(buffer, part)
        out = x @ nn.Parameter(buffer.view(3, 4))
        out.sum()
    assert places(trace, out) == [B - 1]
