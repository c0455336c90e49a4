"""Rules of ops that only a GPU has a kernel for: a slow one for the CPU is registered, then the op runs as autograd would run it.

What this cannot show is that CUDA's kernels take the rows' memory layout; `make test` on a GPU machine does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core import RowGradient, densify, select_rows
from tests.core.partial.oracle import mask_rows, relative, row_gradient

A = torch.ops.aten
B = 7
ATTENTION = [
    A._scaled_dot_product_flash_attention_backward.default,
    A._scaled_dot_product_efficient_attention_backward.default,
    A._scaled_dot_product_cudnn_attention_backward.default,
    A._scaled_dot_product_fused_attention_overrideable_backward.default,
]


def attention_backward(op: Any) -> Callable[..., Any]:
    """The textbook backward, with the op's own arguments."""
    names = [argument.name.rstrip("_") for argument in op._schema.arguments]

    def backward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        gradient, q, k, v = (given[name] for name in ("grad_out", "query", "key", "value"))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        bias = given.get("attn_bias")
        p = (scores + bias if bias is not None and bias.numel() else scores).sub(given["logsumexp"][..., None]).exp()
        d = p * (gradient @ v.mT - (gradient * given["out"]).sum(-1, keepdim=True))
        outs = d @ k * q.shape[-1] ** -0.5, d.mT @ q * q.shape[-1] ** -0.5, p.mT @ gradient
        if len(op._schema.returns) == 3:
            return outs
        return (*outs, d.sum_to_size(bias.shape) if bias.numel() else bias)

    return backward


def rms_norm_backward(g: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor, mask: list[bool]) -> Any:
    normal, scaled = x * rstd, g * weight
    return rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True)), (g * normal).sum(0)


def cudnn_batch_norm_backward(x: Tensor, g: Tensor, *rest: Any) -> Any:
    return A.native_batch_norm_backward(g, x, *rest[:5], True, rest[5], [True] * 3)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        for op in ATTENTION:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, "CPU"):
                library.impl(op._schema.name, attention_backward(op), "CPU")
        if hasattr(A, "_fused_rms_norm_backward"):
            library.impl("_fused_rms_norm_backward", rms_norm_backward, "CPU")
        library.impl("cudnn_batch_norm_backward", cudnn_batch_norm_backward, "CPU")
        library.impl("miopen_batch_norm_backward", cudnn_batch_norm_backward, "CPU")
        yield


def assert_rows(want: Any, got: Any, gradient: RowGradient) -> None:
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(densify(b), a, rtol=1e-4, atol=1e-5)
    assert not gradient.rows.dense_ops


def arguments(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments if not argument.kwarg_only]


BIASED = [op for op in ATTENTION if "attn_bias" in arguments(op)]


@pytest.mark.parametrize(
    ("op", "bias", "heads_first"),
    [
        *((op, None, heads_first) for op in ATTENTION for heads_first in (False, True)),
        *((op, bias, False) for op in BIASED for bias in ((B, 2, 5, 5), (2, 5, 5))),
    ],
    ids=lambda value: value._schema.name.split("product_")[1] if value in ATTENTION else str(value),
)
def test_attention(op: Any, bias: tuple[int, ...] | None, heads_first: bool) -> None:
    torch.manual_seed(0)
    names = arguments(op)
    dim, shape = int(heads_first), (2, B, 5, 4) if heads_first else (B, 2, 5, 4)
    q, k, v = torch.randn(3, *shape)
    mask = torch.empty(0) if bias is None else torch.randn(bias)
    scores = q @ k.mT / 2 + (0 if bias is None else mask)
    empty = torch.empty(0)
    given = {"query": q, "key": k, "value": v, "out": scores.softmax(-1) @ v, "logsumexp": scores.logsumexp(-1)}
    given |= {
        "attn_bias": mask,
        "dropout_p": 0.0,
        "is_causal": False,
        "max_q": 5,
        "max_k": 5,
        "grad_input_mask": [True] * 4,
    }
    gradient = row_gradient(shape, dim)
    got = op(gradient, *(given.get(name, empty) for name in names[1:]))
    want = op(densify(gradient), *(given.get(name, empty) for name in names[1:]))
    assert all(type(g) is RowGradient for g in got[:3])
    assert_rows(want, got, gradient)


def test_attention_dropout_goes_dense() -> None:
    """Its mask is drawn again, by position in the batch."""
    op, gradient, x = ATTENTION[0], row_gradient((B, 2, 5, 4)), torch.randn(B, 2, 5, 4)
    op(gradient, x, x, x, x, torch.randn(B, 2, 5), *([torch.empty(0)] * 2), 5, 5, 0.1, False, *([torch.empty(0)] * 2))
    assert dict(gradient.rows.dense_ops) == {str(op): 1}


@pytest.mark.skipif(not hasattr(A, "_fused_rms_norm_backward"), reason="this torch runs RMSNorm by its parts")
def test_rms_norm() -> None:
    gradient, x, weight = row_gradient((B, 4)), torch.randn(B, 4), torch.randn(4)
    saved = x, [4], x.square().mean(-1, keepdim=True).rsqrt(), weight, [True, True]
    got = A._fused_rms_norm_backward(gradient, *saved)
    assert type(got[0]) is RowGradient
    assert_rows(A._fused_rms_norm_backward(densify(gradient), *saved), got, gradient)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [0, *range(2, x.dim())]
    return x.mean(dims), (x.var(dims, correction=0) + 1e-5).rsqrt()


@pytest.mark.parametrize("op", [A.cudnn_batch_norm_backward, A.miopen_batch_norm_backward], ids=str)
def test_batch_norm_is_that_of_the_native_kernel(op: Any) -> None:
    gradient, x, weight = row_gradient((B, 3, 4, 4)), torch.randn(B, 3, 4, 4), torch.rand(3)
    reserve = [torch.empty(0)] if op is A.cudnn_batch_norm_backward else []
    got = op(x, gradient, weight, None, None, *statistics(x), 1e-5, *reserve)
    want = A.native_batch_norm_backward(gradient, x, weight, None, None, *statistics(x), True, 1e-5, [True] * 3)
    assert_rows([densify(w) for w in want], got, gradient)
    assert type(got[0]) is RowGradient


def test_instance_norm_as_cudnn_runs_it() -> None:
    """Over (1, B * C, ...): every channel of every sample alone, so exact."""
    gradient, x, weight = row_gradient((1, 2 * B, 4, 4), 1, post=2), torch.randn(1, 2 * B, 4, 4), torch.rand(2 * B)
    saved = weight, None, None, *statistics(x), 1e-5, torch.empty(0)
    got = A.cudnn_batch_norm_backward(x, gradient, *saved)
    assert_rows(A.cudnn_batch_norm_backward(x, densify(gradient), *saved), got, gradient)


def test_batch_norm_with_update() -> None:
    gradient, x, weight = row_gradient((B, 3, 4, 4)), torch.randn(B, 3, 4, 4), torch.rand(3)
    rest = weight, None, None, *statistics(x), True, 1e-5, [True] * 3
    got = A.batch_norm_backward(gradient, x, *rest, torch.empty(0))
    want = A.native_batch_norm_backward(gradient, x, *rest)
    assert_rows([densify(w) for w in want], got, gradient)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_whole_networks_on_a_gpu(precision: torch.dtype) -> None:
    """Attention, RMSNorm and convolutions in channels_last on the device's own kernels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm = nn.Conv2d(3, 64, 4, 4), nn.RMSNorm(64)
            self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(self.patches(x).flatten(2).mT)
            q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = Net().cuda().to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    indices, found, dense = torch.tensor([0, 3, 9], device="cuda"), [], Counter()
    for pick in (mask_rows, lambda losses, i: select_rows(losses, i, dense_ops=dense)):
        net.zero_grad()
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            losses = net(x).float().square().mean((1, 2))
        pick(losses, indices).sum().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert relative(*found) < (1e-3 if precision == torch.float32 else 2e-2)
    assert not dense
