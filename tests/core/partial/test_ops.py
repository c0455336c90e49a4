"""Each rule on its own: an op given a row gradient, beside the same op given the full tensor. And the gathers behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_ast.core import RowGradient, densify
from lightning_ast.core.partial.gradient import wrap
from lightning_ast.core.partial.rows import Rows, place_of
from tests.core.partial.oracle import row_gradient

A = torch.ops.aten
B = 7


def flat() -> RowGradient:
    return row_gradient((7, 4))


def last() -> RowGradient:
    return row_gradient((4, 7), 1)


def one() -> RowGradient:
    return row_gradient((7,))


def tokens() -> RowGradient:
    return row_gradient((21, 4), 0, 1, 3)


def views() -> RowGradient:
    return row_gradient((21, 4), 0, 3, 1)


def volume(size: int) -> RowGradient:
    return row_gradient((7, 2, size, size, size))


def two(op: Any) -> tuple[Any, ...]:
    first = flat()
    return op, first, first.like(torch.randn(2, 4))


def fractional_max_pool3d() -> tuple[Any, ...]:
    x, sizes = torch.randn(7, 2, 4, 4, 4), ([2, 2, 2], [2, 2, 2])
    indices = A.fractional_max_pool3d(x, *sizes, torch.rand(7, 2, 3))[1]
    return A.fractional_max_pool3d_backward, volume(2), x, *sizes, indices


X = torch.randn(7, 2, 4, 4, 4)
KEEPS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "split": lambda: (A.split.Tensor, flat(), 3, 1),
    "split-views": lambda: (A.split.Tensor, views(), 7, 0),
    "split-sizes-views": lambda: (A.split_with_sizes, views(), [7, 14], 0),
    "slice-views": lambda: (A.slice.Tensor, views(), 0, 7, 21),
    "unbind": lambda: (A.unbind.int, flat(), 1),
    "unbind-before": lambda: (A.unbind.int, last(), 0),
    "squeeze": lambda: (A.squeeze.default, row_gradient((1, 7, 1, 4), 1)),
    "squeeze-dims": lambda: (A.squeeze.dims, row_gradient((1, 7, 1, 4), 1), [0, 2]),
    "squeeze-negative": lambda: (A.squeeze.dim, row_gradient((7, 1, 4)), -2),
    "unsqueeze-negative": lambda: (A.unsqueeze, last(), -1),
    "sub": lambda: (A.sub.Tensor, *(2 * (flat(),))),
    "add-tokens": lambda: (A.add.Tensor, *(2 * (tokens(),))),
    "mul-in-place": lambda: (A.mul_.Tensor, flat(), torch.randn(4)),
    "mul-in-place-rows": lambda: (A.mul_.Tensor, flat(), torch.randn(7, 1)),
    "mul-broadcast-up": lambda: (A.mul.Tensor, flat(), torch.randn(3, 7, 4)),
    "div-in-place": lambda: (A.div_.Tensor, flat(), torch.rand(7, 4) + 1),
    "neg-in-place": lambda: (A.neg_, flat()),
    "zero": lambda: (A.zero_, flat()),
    "triu": lambda: (A.triu, row_gradient((7, 4, 4)), 1),
    "ger": lambda: (A.ger, one(), torch.randn(3)),
    "mean-dim": lambda: (A.mean.dim, flat(), [1], True),
    "sum-other-dim": lambda: (A.sum.dim_IntList, flat(), [1]),
    "masked-fill-in-place": lambda: (A.masked_fill_.Tensor, flat(), torch.rand(7, 4) > 0.5, torch.tensor(0.0)),
    "where-broadcast": lambda: (A.where.self, torch.rand(3, 1, 4) > 0.5, flat(), torch.tensor(0.0)),
    "native-dropout": lambda: (A.native_dropout_backward, flat(), torch.rand(7, 4) > 0.5, 2.0),
    "logit": lambda: (A.logit_backward, flat(), torch.rand(7, 4), 1e-6),
    "log-sigmoid-no-buffer": lambda: (A.log_sigmoid_backward, one(), torch.randn(7), torch.randn(7)),
    "reflect3d": lambda: (A.reflection_pad3d_backward, volume(6), X, [1] * 6),
    "replicate1d": lambda: (A.replication_pad1d_backward, row_gradient((7, 2, 6)), torch.randn(7, 2, 4), [1, 1]),
    "nearest3d": lambda: (A.upsample_nearest3d_backward, volume(8), [8, 8, 8], [7, 2, 4, 4, 4]),
    "nearest-exact3d": lambda: (A._upsample_nearest_exact3d_backward, volume(8), [8, 8, 8], [7, 2, 4, 4, 4]),
    "antialias": lambda: (A._upsample_bicubic2d_aa_backward, row_gradient((7, 2, 4, 4)), [4, 4], [7, 2, 8, 8], False),
    "grid3d": lambda: (A.grid_sampler_3d_backward, volume(3), X, torch.rand(7, 3, 3, 3, 3), 0, 0, False, [True, True]),
    "expand-up": lambda: (A.expand, flat(), [2, 7, 4]),
    "pad": lambda: (A.constant_pad_nd, flat(), [1, 2], 0.0),
    "cumsum-dtype": lambda: (A.cumsum, flat(), 1),
    "roll": lambda: (A.roll, flat(), [1], [-1]),
    "bmm-rows": lambda: (A.bmm, row_gradient((2, 7, 4), 1), torch.randn(2, 4, 3)),
    "bmm-right": lambda: (A.bmm, torch.randn(2, 3, 4), row_gradient((2, 4, 7), 2)),
    "slice-backward-views": lambda: (A.slice_backward, views(), [42, 4], 0, 21, 42, 1),
    "slice-backward": lambda: (A.slice_backward, flat(), [7, 9], 1, 2, 6, 1),
    "select-backward": lambda: (A.select_backward, flat(), [7, 4, 3], -1, 2),
    "select-backward-before": lambda: (A.select_backward, flat(), [3, 7, 4], 0, 2),
    "unfold-backward": lambda: (A.unfold_backward, row_gradient((7, 3, 2)), [7, 6], 1, 2, 2),
    "diagonal-backward": lambda: (A.diagonal_backward, flat(), [7, 4, 5], 0, 1, 2),
    "isnan": lambda: (A.isnan, flat()),
    "isinf": lambda: (A.isinf, flat()),
    "alias": lambda: (A.alias, flat()),
    "conj": lambda: (A._conj, wrap(torch.randn(2, 4, dtype=torch.cfloat), flat().rows, place_of((7, 4), 0))),
    "unsafe-view": lambda: (A._unsafe_view, tokens(), [7, 3, 4]),
    "reshape-alias": lambda: (A._reshape_alias, tokens(), [7, 3, 4], [12, 4, 1]),
    "unsafe-split": lambda: (A.unsafe_split.Tensor, flat(), 3, 1),
    "unsafe-split-sizes": lambda: (A.unsafe_split_with_sizes, flat(), [1, 3], 1),
    "add-in-place": lambda: two(A.add_.Tensor),
    "sub-in-place": lambda: two(A.sub_.Tensor),
    "mul-in-place-scalar": lambda: (A.mul_.Scalar, flat(), 2.0),
    "div-in-place-scalar": lambda: (A.div_.Scalar, flat(), 2.0),
    "masked-fill-tensor": lambda: (A.masked_fill.Tensor, flat(), torch.rand(7, 4) > 0.5, torch.tensor(0.0)),
    "antialias-lanczos": lambda: (A._upsample_lanczos2d_aa_backward, row_gradient((7, 2, 4, 4)), [4, 4], [7, 2, 8, 8], False),
    "nearest-exact1d": lambda: (A._upsample_nearest_exact1d_backward, row_gradient((7, 2, 8)), [8], [7, 2, 4]),
    "fractional3d": fractional_max_pool3d,
}  # fmt: skip
if not hasattr(A, "_upsample_lanczos2d_aa_backward"):  # an older torch
    del KEEPS["antialias-lanczos"]
SUMS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "mv": lambda: (A.mv, torch.randn(3, 7), one()),
    "dot": lambda: (A.dot, torch.randn(7), one()),
    "mean": lambda: (A.mean.default, flat()),
    "mean-rows": lambda: (A.mean.dim, tokens(), [0]),
    "sum-all": lambda: (A.sum.default, flat()),
    "sum-none": lambda: (A.sum.dim_IntList, flat(), None),
    "mm-right": lambda: (A.mm, last(), torch.randn(7, 3)),
    "bmm-left-sum": lambda: (A.bmm, row_gradient((2, 4, 7), 2), torch.randn(2, 7, 3)),
    "bmm-right-sum": lambda: (A.bmm, torch.randn(2, 3, 7), row_gradient((2, 7, 4), 1)),
    "embedding": lambda: (A.embedding_dense_backward, row_gradient((7, 3, 4)), torch.randint(0, 5, (7, 3)), 5, 2, False),
    "any-nan": lambda: (A._is_any_true, row_gradient((7, 4)).isnan()),
}  # fmt: skip
DENSE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "select-a-sample": lambda: (A.select.int, flat(), 0, 2),
    "slice-samples": lambda: (A.slice.Tensor, flat(), 0, 1, 5),
    "roll-samples": lambda: (A.roll, flat(), [1], [0]),
    "roll-everything": lambda: (A.roll, flat(), [3]),
    "cumsum-samples": lambda: (A.cumsum, flat(), 0),
    "pad-samples": lambda: (A.constant_pad_nd, flat(), [0, 0, 1, 0], 0.0),
    "pad-with-one": lambda: (A.constant_pad_nd, flat(), [1, 0], 1.0),
    "triu-of-samples": lambda: (A.triu, flat()),
    "add-plain": lambda: (A.add.Tensor, flat(), torch.randn(7, 4)),
    "add-in-place-plain": lambda: (A.add_.Tensor, flat(), torch.randn(7, 4)),
    "fill-with-one": lambda: (A.masked_fill.Scalar, flat(), torch.rand(7, 4) > 0.5, 1.0),
    "where-one": lambda: (A.where.self, torch.rand(7, 4) > 0.5, flat(), torch.tensor(1.0)),
    "divided-by": lambda: (A.div.Tensor, torch.ones(7, 4), flat()),
    "softmax-over-samples": lambda: (A._softmax_backward_data, flat(), torch.rand(7, 4), 0, torch.float32),
    "mm-both": lambda: (A.mm, last(), flat()),
    "cat-samples-and-plain": lambda: (A.cat, [flat(), torch.randn(2, 4)]),
    "by-frequency": lambda: (A.embedding_dense_backward, row_gradient((7, 3, 4)), torch.randint(0, 5, (7, 3)), 5, -1, True),
    "mean-loss": lambda: (A.mse_loss_backward, row_gradient((7,)), torch.randn(7), torch.randn(7), 1),
    "slice-with-step": lambda: (A.slice_backward, flat(), [14, 4], 0, 0, 14, 2),
}  # fmt: skip


def run(make: Callable[[], tuple[Any, ...]]) -> tuple[list[Any], Counter[str]]:
    """Results of the op on rows, compared with those on full tensors."""
    torch.manual_seed(0)
    op, *args = make()
    first = next(a for a in tree_leaves(args) if isinstance(a, RowGradient))
    full = tree_map_only(RowGradient, lambda g: densify(g).clone(), args)
    want, got = tree_leaves(op(*full)), tree_leaves(op(*args))
    assert len(want) == len(got)
    for a, b in zip(want, got):
        torch.testing.assert_close(densify(b), a, rtol=1e-4, atol=1e-5)
    return got, first.rows.dense_ops


@pytest.mark.parametrize("name", KEEPS)
def test_ops_that_keep_rows(name: str) -> None:
    got, dense = run(KEEPS[name])
    assert all(type(g) is RowGradient and g.place is not None for g in got if g is not None and g.dim())
    assert not dense


@pytest.mark.parametrize("name", SUMS)
def test_ops_that_sum_over_rows(name: str) -> None:
    got, dense = run(SUMS[name])
    assert all(type(g) is Tensor for g in got)
    assert not dense


@pytest.mark.parametrize("name", DENSE)
def test_ops_that_need_every_row(name: str) -> None:
    got, dense = run(DENSE[name])
    assert not any(type(g) is RowGradient and g.place is not None for g in got)
    assert dense


def test_a_write_into_a_view_is_seen_by_what_it_is_a_view_of() -> None:
    def by_select(g: Tensor) -> None:
        g[:, 2] = 1.0

    def by_transpose(g: Tensor) -> None:
        g.t()[1:3].add_(torch.ones(2, 7))

    def by_sample(g: Tensor) -> None:
        g[3] = 2.0

    def by_flat_view(g: Tensor) -> None:
        g.view(-1)[3:9] = 4.0

    def by_part(g: Tensor) -> None:
        g.unbind(1)[1].fill_(3.0)

    def on_rows(g: Tensor) -> None:
        g[:, 1:3].mul_(2)
        g.t().neg_()

    for write in (by_select, by_transpose, by_sample, by_flat_view, by_part, on_rows):
        gradient = flat()
        full = densify(gradient).clone()
        write(gradient)
        write(full)
        torch.testing.assert_close(densify(gradient), full, msg=write.__name__)


class TestGather:
    """What is gathered equals plain indexing, whatever the memory looks like."""

    def rows(self) -> Rows:
        return Rows(torch.tensor([1, 3, 3, 6]), B, batchnorm="selected", dense_ops=Counter())

    @pytest.mark.parametrize(
        "full",
        [
            torch.randn(7, 4),
            torch.randn(4, 7).t(),
            torch.randn(7, 3, 4).transpose(1, 2),
            torch.randn(7, 12)[:, 4:8],
            torch.randn(7, 12)[:, ::3],
            torch.randn(7 * 12 + 5)[5:].view(7, 12)[:, 3:9],
            torch.randn(7 * 12 + 9)[9 : 9 + 82].as_strided((7, 10), (12, 1)),
            torch.randn(30).as_strided((7, 4), (3, 1)),
            torch.randn(30).as_strided((7, 4), (1, 7)),
            torch.randn(1, 4).expand(7, 4),
            torch.randn(7, 1).expand(7, 4),
            torch.randn(7, 3, 2, 2).contiguous(memory_format=torch.channels_last),
            torch.randn(14, 4)[::2],
            torch.randn(7, 0),
        ],
        ids=lambda t: f"{tuple(t.shape)}-{t.stride()}-{t.storage_offset()}",
    )
    def test_layouts(self, full: Tensor) -> None:
        rows = self.rows()
        for _ in range(2):
            torch.testing.assert_close(rows.gather(full, 0), full[rows.indices])

    def test_the_rest_of_a_chunk_may_lie_outside_the_memory(self) -> None:
        memory = torch.randn(6 * 12 + 7)
        full = memory[3:].as_strided((7, 4), (12, 1), 3)
        torch.testing.assert_close(self.rows().gather(full, 0), full[self.rows().indices])

    @pytest.mark.parametrize(("pre", "post"), [(1, 3), (3, 1), (2, 3)])
    @pytest.mark.parametrize("dim", [0, 1])
    def test_folded(self, pre: int, post: int, dim: int) -> None:
        size = pre * B * post
        full = torch.randn(size, 2) if dim == 0 else torch.randn(2, size)
        want = full.unflatten(dim, (pre, B, post)).index_select(dim + 1, self.rows().indices).flatten(dim, dim + 2)
        for layout in (full, full.t().contiguous().t()):
            torch.testing.assert_close(self.rows().gather(layout, dim, pre, post), want)

    def test_parts_of_one_buffer_are_gathered_once(self) -> None:
        rows, packed = self.rows(), torch.randn(7, 5, 12)
        q, k, v = (rows.gather(part, 0) for part in packed.chunk(3, -1))
        torch.testing.assert_close(torch.cat([q, k, v], -1), packed[rows.indices])
        assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()

    def test_what_was_written_in_between_is_seen(self) -> None:
        rows, full = self.rows(), torch.randn(7, 4)
        rows.gather(full, 0)
        full.mul_(2)
        torch.testing.assert_close(rows.gather(full, 0), full[rows.indices])

    def test_two_types_in_one_memory(self) -> None:
        rows, full = self.rows(), torch.randn(7, 4)
        torch.testing.assert_close(rows.gather(full, 0), full[rows.indices])
        whole = full.view(torch.int32)
        assert torch.equal(rows.gather(whole, 0), whole[rows.indices])

    def test_memory_is_let_go(self) -> None:
        rows, memory = self.rows(), []
        for _ in range(2):  # a gradient that outlives its backward holds nothing either
            full = torch.randn(7, 4)
            memory.append(StorageWeakRef(full.untyped_storage()))
            rows.gather(full, 0)
            rows.forget() if len(memory) == 1 else None
            del full
        assert all(each.expired() for each in memory)
