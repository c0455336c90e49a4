"""A small GPT and a small ViT over one block, with torch's scaled dot product attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "Block", "ViT"]


class Block(nn.Module):
    """Attention and a two-layer network, with LayerNorm before each and a residual around each.

    Args:
        width: The features of a token.
        heads: The attention heads; they divide ``width``.
        causal: Whether a token sees only the tokens before it.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, width)`` to ``(B, T, width)``."""
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm_attention(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class GPT(nn.Module):
    """A decoder-only language model: from tokens ``(B, T)`` to the scores of the next tokens ``(B, T, vocabulary)``.

    Args:
        vocabulary: The number of tokens; 256 for bytes.
        context: The largest length T.
        width: The features of a token.
        layers: The number of blocks.
        heads: The attention heads of a block.
    """

    def __init__(
        self, *, vocabulary: int = 256, context: int = 64, width: int = 64, layers: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next token at each place."""
        x = self.token(tokens) + self.place[: tokens.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


class ViT(nn.Module):
    """A vision transformer with the mean over the patches: from ``(B, C, size, size)`` to ``(B, classes)``.

    Args:
        size: The height and width of an image in pixels.
        patch: The height and width of a patch in pixels; it divides ``size``.
        channels: The channels of an image.
        width: The features of a patch.
        layers: The number of blocks.
        heads: The attention heads of a block.
        classes: The number of classes.
    """

    def __init__(
        self,
        *,
        size: int = 32,
        patch: int = 4,
        channels: int = 3,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.place = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.place
        out: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return out
