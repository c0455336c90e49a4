"""``partial`` has the gradients of ``mask`` behind each kernel of ``scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ast.testing import check_partial_backward

SIZE, LENGTH, HEADS, WIDTH, CLASSES = 20, 16, 2, 64, 5
MATH, FLASH = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
EFFICIENT, CUDNN = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
HALVES = torch.bfloat16, torch.float16
KERNELS = [
    (MATH, torch.float32),
    (MATH, torch.bfloat16),
    (FLASH, torch.float32),  # on a CPU
    (EFFICIENT, torch.float32),
    *((kernel, dtype) for kernel in (FLASH, EFFICIENT, CUDNN) for dtype in HALVES),
]
OPS = {FLASH: "flash", EFFICIENT: "efficient", CUDNN: "cudnn"}


class Attends(nn.Module):
    """One layer of attention over tokens."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("bias", torch.randn(LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        bias = self.bias.to(q.dtype) if self.form == "bias" else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.form == "causal")
        return self.out(attended.transpose(1, 2).flatten(2).mean(1))


def names_of_backward(value: Tensor) -> set[str]:
    """The names of all nodes in the graph of a loss."""
    found: set[str] = set()
    nodes = [value.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node.name())
            nodes += [after for after, _ in node.next_functions]
    return found


@pytest.mark.parametrize("form", ["plain", "causal", "bias"])
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=lambda value: getattr(value, "name", str(value)))
def test_kernels(kernel: Any, dtype: torch.dtype, form: str, device: str) -> None:
    if device == "cpu" and kernel in (EFFICIENT, CUDNN):
        pytest.skip("a kernel of CUDA alone")
    if device == "cuda" and kernel is FLASH and (dtype is torch.float32 or form == "bias"):
        pytest.skip("flash attention takes 16 bits and no bias")
    torch.manual_seed(0)
    net = Attends(form).to(device)
    batch = torch.randn(SIZE, LENGTH, WIDTH, device=device), torch.randint(0, CLASSES, (SIZE,), device=device)
    used: set[str] = set()

    def loss(net: nn.Module, batch: Any) -> Tensor:
        with sdpa_kernel(kernel), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = F.cross_entropy(net(batch[0]).float(), batch[1]) * 256.0
        used.update(names_of_backward(value))
        return value

    try:
        loss(net, batch).backward()
    except RuntimeError as error:
        pytest.skip(f"this device has no such kernel: {error}")
    net.zero_grad()
    found = check_partial_backward(net, batch, loss=loss)
    print(found)
    if kernel in OPS and device == "cuda":
        assert any(OPS[kernel] in name.lower() for name in used), used
    assert found.relative_error < (1e-4 if dtype is torch.float32 else 3e-2)
    assert found.dense_ops == {}
    assert found.cosine > 0.999
