"""Every layer of the supported list, between two layers with parameters, against exact masking. Nothing goes dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.core.partial.oracle import compare

B = 7


class Fn(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Attend(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.qkv, self.options = nn.Linear(8, 24), options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


class WrittenOut(Attend):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        a = (q @ k.transpose(-2, -1) / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
        return (a @ v).transpose(1, 2).reshape(len(x), 5, 8)


class MHA(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.options)[0]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class OwnRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Sigmoid(), nn.Tanh(),
    nn.ELU(), nn.CELU(0.7), nn.SELU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.PReLU(8), nn.RReLU(), nn.Hardtanh(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Hardshrink(0.1), nn.Softshrink(0.1), nn.Tanhshrink(), nn.Softplus(),
    nn.Softsign(), nn.LogSigmoid(), nn.Threshold(0.1, 0.2), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Softmin(-1),
    nn.GLU(), nn.Dropout(0.3), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3),
]  # fmt: skip
VECTORS: dict[str, nn.Module] = {f"{i}-{m}": m for i, m in enumerate(ACTIVATIONS)} | {
    "linear": nn.Linear(8, 8),
    "no-bias": nn.Linear(8, 8, bias=False),
    "layer-norm": nn.LayerNorm(8),
    "rms-norm": nn.RMSNorm(8),
    "own-rms-norm": OwnRMSNorm(),
    "residual": Fn(lambda x: x + torch.tanh(x) - x.abs()),
    "cat": Fn(lambda x: torch.cat([x, x.exp(), x[:, 2:5]], 1)[:, :8]),
    "stack": Fn(lambda x: torch.stack([x, x * 2, -x], 1).sum(1)),
    "stack-first": Fn(lambda x: torch.stack([x, x * 2]).mean(0)),
    "split": Fn(lambda x: torch.cat(x.split([2, 6], 1)[::-1], 1)),
    "unbind": Fn(lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    "index": Fn(lambda x: x[:, torch.tensor([3, 1, 1, 0, 7])]),
    "index-each": Fn(lambda x: x.unflatten(1, (4, 2))[torch.arange(len(x)), x.detach().argmax(1) % 4]),
    "gather": Fn(lambda x: x.gather(1, torch.arange(21).view(7, 3) % 8)),
    "select": Fn(lambda x: x[:, 3:4] * x[:, 2].unsqueeze(1)),
    "max": Fn(lambda x: x.max(1, keepdim=True).values + x.unflatten(1, (2, 4)).amax(2)),
    "sort": Fn(lambda x: x.sort(1).values),
    "topk": Fn(lambda x: x.topk(3, 1).values),
    "statistics": Fn(lambda x: torch.stack([x.mean(1), x.var(1), x.std(1), x.logsumexp(1), x.norm(dim=1)], 1)),
    "normalize": Fn(lambda x: F.normalize(x, dim=1)),
    "where": Fn(lambda x: torch.where(x > 0, x * 2, x - 1)),
    "masked-fill": Fn(lambda x: x.masked_fill(x > 0.2, 0.0)),
    "clamp": Fn(lambda x: x.clamp(-0.1, 0.4) + x.clamp_min(0.2)),
    "cumsum": Fn(lambda x: x.cumsum(1)),
    "flip": Fn(lambda x: x.flip(1).roll(2, 1)),
    "repeat": Fn(lambda x: x.repeat(1, 2)),
    "expand": Fn(lambda x: x.unsqueeze(1).expand(-1, 3, -1).flatten(1)),
    "unfold": Fn(lambda x: x.unfold(1, 3, 2).flatten(1)),
    "outer": Fn(lambda x: (x.unsqueeze(2) @ x.unsqueeze(1)).flatten(1)),
    "einsum": Fn(lambda x: torch.einsum("bi,bj->bij", x, x).diagonal(dim1=1, dim2=2)),
    "matvec": Fn(lambda x: (x @ torch.arange(8.0)).unsqueeze(1)),
    "tril": Fn(lambda x: x.unflatten(1, (2, 4)).tril().flatten(1)),
    "view-then-in-place": Fn(lambda x: x.mul(1).view(-1, 2, 4).mul_(3).add_(1).flatten(1)),
    "slice-in-place": Fn(lambda x: F.dropout(torch.flatten(x.mul(1).unflatten(1, (8, 1, 1)), 1), 0.5, inplace=True)),
    "to-double-and-back": Fn(lambda x: (x.double() * 2).float()),
    "division": Fn(lambda x: x / (1 + x.square()) + 2 / (2 + x.abs())),
    "pow": Fn(lambda x: x.pow(3) + x.abs().sqrt() + torch.pow(2.0, x)),
    "minmax": Fn(lambda x: torch.maximum(x, x.roll(1, 1)) - torch.minimum(x, -x)),
    "spectral-norm": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
    "weight-norm": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "eval-batchnorm": nn.BatchNorm1d(8).eval(),
}  # fmt: skip
SEQUENCES: dict[str, nn.Module] = {
    "attention": Attend(),
    "causal": Attend(is_causal=True),
    "mask": Attend(attn_mask=torch.ones(5, 5).tril().bool()),
    "mask-by-sample": Attend(attn_mask=torch.randn(B, 1, 5, 5)),
    "attention-dropout": Attend(dropout_p=0.2),
    "attention-written-out": WrittenOut(),
    "heads-first": Fn(lambda x: F.scaled_dot_product_attention(*3 * (x.unflatten(2, (2, 4)).permute(2, 0, 1, 3),)).permute(1, 2, 0, 3)),
    "mha": MHA(),
    "mha-weights": MHA(need_weights=False),
    "mha-padding": MHA(key_padding_mask=torch.arange(5).expand(B, 5) > 3),
    "encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "encoder-norm-first": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
    "conv1d": nn.Sequential(Fn(lambda x: x.transpose(1, 2)), nn.Conv1d(8, 8, 3, padding=1, groups=2), Fn(lambda x: x.mT)),
    "cls": Fn(lambda x: torch.cat([x[:, :1].mean(2, keepdim=True).expand(-1, 1, 8), x], 1)[:, 0]),
    "mean": Fn(lambda x: x.mean(1)),
    "roll": Fn(lambda x: torch.roll(x, 2, 1)),
    "pad": Fn(lambda x: F.pad(x, (1, 2, 0, 3))),
    "time-major": nn.Sequential(Fn(lambda x: x.transpose(0, 1)), nn.TransformerEncoderLayer(8, 2, 16), Fn(lambda x: x.transpose(0, 1))),
    "folded": nn.Sequential(Fn(lambda x: x.reshape(-1, 8)), nn.Linear(8, 8), nn.Tanh(), Fn(lambda x: x.view(B, 5, 8))),
    "folded-norm": nn.Sequential(Fn(lambda x: x.reshape(-1, 8)), nn.LayerNorm(8), Fn(lambda x: x.view(B, 5, 8))),
    "group-norm-1d": nn.Sequential(Fn(lambda x: x.transpose(1, 2)), nn.GroupNorm(4, 8), Fn(lambda x: x.transpose(1, 2))),
}  # fmt: skip
IMAGES: dict[str, nn.Module] = {
    "conv": nn.Conv2d(4, 4, 3, padding=1),
    "strided": nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=2),
    "grouped": nn.Conv2d(4, 8, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1),
    "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
    "group-norm": nn.GroupNorm(2, 4),
    "instance-norm": nn.InstanceNorm2d(4, affine=True),
    "instance-norm-plain": nn.InstanceNorm2d(4),
    "instance-norm-frozen": nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
    "group-norm-permuted": nn.Sequential(nn.GroupNorm(2, 4), Fn(lambda x: x.permute(0, 2, 3, 1).flatten(1, 2))),
    "eval-batchnorm": nn.BatchNorm2d(4).eval(),
    "local-response": nn.LocalResponseNorm(2),
    "max": nn.MaxPool2d(2),
    "max-overlap": nn.MaxPool2d(3, 2, 1),
    "avg": nn.AvgPool2d(2),
    "adaptive-avg": nn.AdaptiveAvgPool2d(2),
    "adaptive-avg-1": nn.AdaptiveAvgPool2d(1),
    "adaptive-max": nn.AdaptiveMaxPool2d(2),
    "fractional": nn.FractionalMaxPool2d(2, output_size=3),
    "lp": nn.LPPool2d(2, 2),
    "nearest": nn.Upsample(scale_factor=2),
    "nearest-exact": nn.Upsample(scale_factor=2, mode="nearest-exact"),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": nn.Upsample(size=5, mode="bicubic"),
    "antialias": Fn(lambda x: F.interpolate(x, size=4, mode="bilinear", antialias=True)),
    "dropout2d": nn.Dropout2d(0.3),
    "prelu": nn.PReLU(4),
    "squeeze-excite": SqueezeExcite(),
    "pixel-shuffle": nn.PixelShuffle(2),
    "pixel-unshuffle": nn.PixelUnshuffle(2),
    "channel-shuffle": nn.ChannelShuffle(2),
    "grid": Fn(lambda x: F.grid_sample(x, F.affine_grid(torch.eye(2, 3).expand(B, 2, 3), [B, 4, 5, 5], False), align_corners=False)),
    "unfold": nn.Unfold(2),
    "fold": nn.Sequential(nn.Unfold(2), nn.Fold((6, 6), 2)),
    "zero-pad": nn.ZeroPad2d(1),
    "reflection-pad": nn.ReflectionPad2d(1),
    "windows": nn.Sequential(
        Fn(lambda x: x.view(B, 4, 3, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(B * 9, 4, 2, 2)),
        nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.AvgPool2d(1), nn.Tanh(),
        Fn(lambda x: x.view(B, 3, 3, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, 4, 6, 6)),
    ),
    "permute-norm": nn.Sequential(Fn(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(4), Fn(lambda x: x.permute(0, 3, 1, 2))),
    "cat-skip": Fn(lambda x: torch.cat([x, F.interpolate(F.max_pool2d(x, 2), scale_factor=2)], 1)[:, 2:6]),
}  # fmt: skip
VOLUMES: dict[str, nn.Module] = {
    "conv3d": nn.Conv3d(4, 4, 3, padding=1),
    "transposed3d": nn.ConvTranspose3d(4, 4, 2, 2),
    "max3d": nn.MaxPool3d(2),
    "avg3d": nn.AvgPool3d(2),
    "adaptive3d": nn.AdaptiveAvgPool3d(2),
    "adaptive-max3d": nn.AdaptiveMaxPool3d(2),
    "trilinear": nn.Upsample(scale_factor=2, mode="trilinear"),
    "instance3d": nn.InstanceNorm3d(4, affine=True),
    "pad3d": nn.ReplicationPad3d(1),
}
SERIES: dict[str, nn.Module] = {
    "conv1d": nn.Conv1d(4, 4, 3, padding=1),
    "transposed1d": nn.ConvTranspose1d(4, 4, 2, 2),
    "max1d": nn.MaxPool1d(2),
    "avg1d": nn.AvgPool1d(2),
    "adaptive1d": nn.AdaptiveAvgPool1d(3),
    "adaptive-max1d": nn.AdaptiveMaxPool1d(3),
    "linear1d": nn.Upsample(scale_factor=2, mode="linear"),
    "nearest1d": nn.Upsample(scale_factor=2),
    "instance1d": nn.InstanceNorm1d(4, affine=True),
    "reflection1d": nn.ReflectionPad1d(1),
}


def check(before: nn.Module, layer: nn.Module, x: Tensor, last: nn.Module | None = None) -> None:
    torch.manual_seed(0)
    for module in (before, layer):
        for p in module.parameters():
            nn.init.normal_(p, std=0.4)
    net = nn.Sequential(before, layer, last or nn.Identity())
    for indices in (torch.tensor([4]), torch.tensor([0, 2, 5]), torch.tensor([1, 1, 3]), torch.arange(B)):
        error, dense = compare(net, x, indices, weights=torch.linspace(0.5, 2, len(indices)))
        assert error < 1e-5, indices
        assert not dense, dict(dense)


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name: str) -> None:
    check(nn.Linear(6, 8), VECTORS[name], torch.randn(B, 6))


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str) -> None:
    check(nn.Linear(6, 8), SEQUENCES[name], torch.randn(B, 5, 6))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, channels_last: bool) -> None:
    x, before, layer = torch.randn(B, 3, 6, 6), nn.Conv2d(3, 4, 3, padding=1), IMAGES[name]
    if channels_last:
        x, before, layer = (t.to(memory_format=torch.channels_last) for t in (x, before, layer))
    check(before, layer, x)


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes(name: str) -> None:
    check(nn.Conv3d(2, 4, 1), VOLUMES[name], torch.randn(B, 2, 4, 4, 4))


@pytest.mark.parametrize("name", SERIES)
def test_series(name: str) -> None:
    check(nn.Conv1d(2, 4, 1), SERIES[name], torch.randn(B, 2, 6))


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("time_major", [False, True])
def test_embedding(padding_idx: int | None, time_major: bool) -> None:
    table, tokens = nn.Embedding(11, 8, padding_idx=padding_idx), torch.randint(0, 11, (B, 5))
    layer = nn.Sequential(Fn(lambda t: t.T), table, Fn(lambda x: x.transpose(0, 1))) if time_major else table
    error, dense = compare(nn.Sequential(layer, nn.LayerNorm(8)), tokens, torch.tensor([0, 2, 5]))
    assert error < 1e-5
    assert not dense


TARGETS = torch.tensor([0, 3, 2, 1, 4, 4, 0])
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda o: F.cross_entropy(o, TARGETS, reduction="none"),
    "weighted": lambda o: F.cross_entropy(o, TARGETS, weight=torch.rand(5), reduction="none"),
    "smoothed": lambda o: F.cross_entropy(o, TARGETS, label_smoothing=0.1, reduction="none"),
    "ignored": lambda o: F.cross_entropy(o, TARGETS, ignore_index=0, reduction="none"),
    "soft": lambda o: F.cross_entropy(o, o.detach().flip(0).softmax(1), reduction="none"),
    "nll": lambda o: F.nll_loss(o.log_softmax(1), TARGETS, reduction="none"),
    "pixels": lambda o: F.cross_entropy(o.view(B, 5, 1, 1).expand(B, 5, 2, 3), TARGETS.view(B, 1, 1).expand(B, 2, 3), reduction="none").mean((1, 2)),
    "tokens": lambda o: F.cross_entropy(o.unsqueeze(1).expand(B, 4, 5).reshape(-1, 5), TARGETS.repeat_interleave(4), reduction="none").view(B, 4).mean(1),
    "mse": lambda o: F.mse_loss(o, o.detach().flip(0), reduction="none").mean(1),
    "l1": lambda o: F.l1_loss(o, o.detach().flip(0), reduction="none").mean(1),
    "smooth_l1": lambda o: F.smooth_l1_loss(o, o.detach().flip(0), reduction="none").mean(1),
    "huber": lambda o: F.huber_loss(o, o.detach().flip(0), reduction="none").mean(1),
    "bce": lambda o: F.binary_cross_entropy(o.sigmoid(), o.detach().flip(0).sigmoid(), reduction="none").mean(1),
    "bce_with_logits": lambda o: F.binary_cross_entropy_with_logits(o, o.detach().flip(0).sigmoid(), pos_weight=torch.rand(5), reduction="none").mean(1),
    "kl_div": lambda o: F.kl_div(o.log_softmax(1), o.detach().flip(0).softmax(1), reduction="none").sum(1),
    "gaussian": lambda o: F.gaussian_nll_loss(o[:, :2], torch.zeros(B, 2), F.softplus(o[:, 2:4]), reduction="none").sum(1),
    "poisson": lambda o: F.poisson_nll_loss(o, torch.ones(B, 5), reduction="none").sum(1),
    "soft_margin": lambda o: F.soft_margin_loss(o, o.detach().flip(0).sign(), reduction="none").sum(1),
    "multi_margin": lambda o: F.multi_margin_loss(o, TARGETS, reduction="none"),
    "multilabel_margin": lambda o: F.multilabel_margin_loss(o, torch.tensor([3, 0, -1, 1, 1]).repeat(B, 1), reduction="none"),
    "multilabel_soft_margin": lambda o: F.multilabel_soft_margin_loss(o, torch.ones(B, 5), reduction="none"),
    "hinge_embedding": lambda o: F.hinge_embedding_loss(o, o.detach().sign(), reduction="none").sum(1),
    "margin_ranking": lambda o: F.margin_ranking_loss(o[:, 0], o[:, 1], torch.ones(B), reduction="none"),
    "cosine_embedding": lambda o: F.cosine_embedding_loss(o, o.detach().flip(1), torch.ones(B), reduction="none"),
    "triplet": lambda o: F.triplet_margin_loss(o, o.detach().flip(1), o.detach().roll(1, 1), reduction="none"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    def losses(module: nn.Module, x: Tensor) -> Tensor:
        return LOSSES[name](module(x))

    for indices in (torch.tensor([4]), torch.tensor([0, 2, 5]), torch.arange(B)):
        error, dense = compare(net, torch.randn(B, 6), indices, losses)
        assert error < 1e-5
        assert not dense, dict(dense)
