"""Scaled-dot-product attention on every backend; its written-out form is made of matrix products and a softmax."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows
from lightning_ast.core.partial.registry import rule

__all__ = []

_SAVED = ("query", "key", "value", "out", "logsumexp")
_MASKS = ("attn_bias", "attn_mask")


@rule(
    "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_fused_attention_overrideable_backward", on_rows=True,
)  # fmt: skip
def _attention(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    gradient: HeldRows = args[0]
    # The backends give their arguments in different orders, and some have arguments that others lack.
    names = [argument.name for argument in func._schema.arguments if not argument.kwarg_only]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    # Heads lie behind the samples or before them. Dropout draws its mask anew, by the row's position in the batch.
    at = gradient.place.dim
    if at > 1 or call.get("dropout_p"):
        return NotImplemented
    size = gradient.place.size
    mask_has_rows = False
    for name in (*_SAVED, *_MASKS):
        saved = call.get(name)
        if not isinstance(saved, Tensor) or saved.numel() == 0:
            continue
        if saved.dim() > at and saved.shape[at] == size and (name in _SAVED or saved.dim() == 4):
            call[name] = gradient.rows_of(saved, at)
            mask_has_rows |= name in _MASKS  # a mask that is broadcast over the batch is the same for all rows
        elif name in _SAVED:
            return NotImplemented
    call[names[0]] = gradient.packed()
    positional = [call.pop(name) for name in names if name in call]
    outs = func(*positional, **call)
    rows = 3 + mask_has_rows  # gradients of query, key, value and, of a mask with a row for each sample, its own
    return tuple(gradient.moved(o, at) if isinstance(o, Tensor) and i < rows else o for i, o in enumerate(outs))
