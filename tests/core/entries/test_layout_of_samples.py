"""Where the samples lie in a tensor: what the sizes allow, and what a change proves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ast.core.dependence.records import Dependence
from lightning_ast.core.entries.layout import Layout, layouts_by_size, prove_layout, row_norms, spread
from lightning_ast.core.partial.rows import place_of

B = 4


def arranged(values: Tensor, layout: Layout, others: int = 3) -> Tensor:
    """Lay ``(B, pre, post, others)`` out as a matrix, the samples along ``layout.dim``."""
    rows = values.permute(1, 0, 2, 3).reshape(layout.pre * len(values) * layout.post, others)
    return rows if layout.dim == 0 else rows.T.contiguous()


def proved(*profiles: Tensor, sample: int = 2) -> Layout | None:
    """The layout that is proved by a change of a tensor, given along each of its dimensions."""
    return prove_layout(Dependence(tuple(map(len, profiles)), profiles, independent=False), B, sample)


LAYOUTS = [Layout(2, dim, pre, post) for dim in (0, 1) for pre, post in ((1, 1), (1, 2), (2, 1), (3, 2))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("sample", range(B))
def test_a_change_proves_the_layout(layout: Layout, sample: int) -> None:
    change = torch.zeros(B, layout.pre, layout.post, 3)
    change[sample] = torch.rand(layout.pre, layout.post, 3) + 0.1
    tensor = arranged(change, layout)
    profiles = (tensor.sum(1), tensor.sum(0))
    assert proved(*profiles, sample=sample) == layout


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_norms_and_factors_reach_the_samples_rows(layout: Layout) -> None:
    values = torch.randn(B, layout.pre, layout.post, 3)
    tensor = arranged(values, layout)
    place = layout.place(tuple(tensor.shape), B)
    assert place is not None
    torch.testing.assert_close(row_norms(tensor, place), values.flatten(1).norm(dim=1))
    factors = torch.arange(1.0, B + 1)
    expected = arranged(values * factors.view(-1, 1, 1, 1), layout)
    torch.testing.assert_close(tensor * spread(factors, place), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_norms_are_taken_in_at_least_single_precision(dtype: torch.dtype) -> None:
    gradient = torch.full((B, 2), 300.0).to(dtype)
    for post in (1, 2):
        norms = row_norms(gradient.repeat_interleave(post, 0), place_of((B * post, 2), 0, 1, post))
        assert norms.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(
            norms.double(), torch.full((B,), 300.0 * (2 * post) ** 0.5).double(), rtol=1e-2, atol=0
        )


def test_as_many_columns_as_samples_are_told_apart_by_what_changes() -> None:
    change = torch.zeros(B, B)
    change[:, 2] = torch.tensor([0.1, 0.0, 3.0, 0.2])
    layout = proved(change.sum(1), change.sum(0))
    assert layout == Layout(2, 1, 1, 1)


def test_a_small_change_of_the_others_is_no_proof_of_exactness() -> None:
    change = torch.tensor([0.1, 0.1, 2.0, 0.1])
    layout = proved(change)
    assert layout is not None
    assert not layout.exact


def test_a_partner_may_change_more_than_the_sample() -> None:
    change = torch.tensor([0.0, 9.0, 1.0, 0.0])  # mixup with a share of 0.1
    layout = proved(change)
    assert layout == Layout(1, 0, 1, 1, exact=False)


@pytest.mark.parametrize(
    "change", [[0.0] * 4, [1.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 7 + [1.0]], ids=["none", "all", "other", "half"]
)
def test_other_changes_prove_nothing(change: list[float]) -> None:
    assert proved(torch.tensor(change)) is None


def test_rows_that_are_no_multiple_of_the_samples_are_of_no_layout() -> None:
    assert list(layouts_by_size((6, 3), B)) == []
    assert list(layouts_by_size((0, 3), B)) == []
    assert proved(torch.ones(6)) is None


def test_other_batches() -> None:
    assert Layout(2, 0, 1, 3).place((2 * 5, 7), 2) == place_of((10, 7), 0, 1, 5)  # longer sequences
    assert Layout(2, 0, 3, 1).place((2 * 5, 7), 2) == place_of((10, 7), 0, 5, 1)
    assert Layout(2, 0, 2, 3).place((6 * 2, 7), 2) == place_of((12, 7), 0, 2, 3)
    assert Layout(2, 0, 2, 3).place((10, 7), 2) is None
    assert Layout(2, 0, 1, 1).place((10, 7), 2) is None
    assert Layout(2, 0, 1, 1).place((2, 7, 1), 2) is None
    assert Layout(2, 0, 1, 3).place((9, 7), 2) is None
