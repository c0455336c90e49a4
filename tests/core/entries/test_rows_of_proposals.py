"""Rows that are not samples: picked or made one by one, as masked tokens are. No size makes them samples' rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import EntryFinder, Found

B, T, H = 4, 6, 5


def proved(loss_of: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> Found:
    torch.manual_seed(0)
    body, head = nn.Linear(3, H), nn.Linear(H, 2)
    x = torch.randn(B, T, 3)
    trace = SampleTrace(x, B)
    with trace:
        loss = loss_of(body, head, x)
    return EntryFinder().prove(loss, B, trace)


def picked(counts: list[int]) -> Tensor:
    return torch.arange(T) < torch.tensor(counts)[:, None]


@pytest.mark.parametrize("counts", [[2, 2, 2, 2], [3, 3, 1, 1], [1, 2, 3, 2], [1, 1, 3, 3], [1, 2, 3, 4], [1, 1, 1, 1]])
def test_masked_tokens(counts: list[int]) -> None:
    found = proved(lambda body, head, x: head(body(x).tanh()[picked(counts)]).square().mean())
    regular = counts == [1, 1, 1, 1]
    assert [entry.place.shape for entry in found.entries] == [(B, 2) if regular else (B * T, H)]
    assert bool(found.unclear) != regular


@pytest.mark.parametrize(
    "arrange",
    [
        lambda h: h.reshape(-1, H),
        lambda h: h.transpose(0, 1).reshape(-1, H),
        lambda h: torch.cat(list(h.unbind(1))),
        lambda h: torch.cat([h[:, 0], h[:, 1]]),
        lambda h: h.mean(1).repeat(3, 1),
        lambda h: h.mean(1).repeat_interleave(3, 0),
        lambda h: h.mean(1)[:, None].expand(-1, 3, -1).flatten(0, 1),
        lambda h: h.unflatten(1, (2, 3)).flatten(0, 1).mean(1),
    ],
    ids=["flat", "time-major", "joined", "two steps", "repeated", "interleaved", "expanded", "windows"],
)
def test_rows_that_were_rearranged(arrange: Callable[[Tensor], Tensor]) -> None:
    found = proved(lambda body, head, x: head(arrange(body(x).tanh())).square().mean())
    assert len(found.entries) == 1
    assert found.entries[0].place.shape[1] == 2
    assert found.entries[0].exact
    assert not found.unclear
