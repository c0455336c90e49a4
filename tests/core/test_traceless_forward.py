"""Scoring leaves no trace: buffers, flags and random state are as before, whatever the layers do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_ast.core.traceless_forward import TracelessForward


class Stateful(nn.Module):
    """Changes one buffer in place and replaces another on every training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x + self.mean


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = spectral_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.rnn = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.stateful = Stateful()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.linear(x)))
        x = F.dropout(x, 0.5, self.training)
        sequence = self.instance(x.unsqueeze(2).expand(-1, -1, 3)).transpose(1, 2)
        sequence = self.rnn(self.attention(sequence, sequence, sequence)[0])[0]
        sequence = F.scaled_dot_product_attention(sequence, sequence, sequence, dropout_p=0.5)
        return self.stateful(sequence.mean(1)) + torch.rand(1)


@pytest.mark.parametrize("uses", [1, 3])
def test_nothing_changes(uses: int) -> None:
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(8, 4)
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    flags = {
        name: (m.training, getattr(m, "dropout", None), getattr(m, "track_running_stats", None))
        for name, m in model.named_modules()
    }
    rng = torch.get_rng_state()
    traceless = TracelessForward(model)
    for _ in range(uses):
        with traceless():
            out = model(x)
    assert not out.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0], f"{name} was replaced"
        assert torch.equal(buffer, buffers[name][1]), f"{name} was changed"
    for name, m in model.named_modules():
        assert flags[name] == (m.training, getattr(m, "dropout", None), getattr(m, "track_running_stats", None)), name


class Late(nn.Module):
    """Begins to change its buffer at the third call; one more element than are always copied."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            self.mean += 1
        return x


def test_buffers_that_change_late() -> None:
    small, large = Late(4), Late(2**16 + 1)
    traceless = TracelessForward(small)
    for _ in range(5):
        with traceless():
            small(torch.zeros(1))
    assert small.mean.tolist() == [0.0] * 4
    traceless = TracelessForward(large)
    for call in range(5):
        if call == 2:
            with pytest.warns(UserWarning, match="'mean' once; it is restored from now on"), traceless():
                large(torch.zeros(1))
        else:
            with traceless():
                large(torch.zeros(1))
    assert large.mean.max() == 1, "once, and it was said"


def test_the_control_does_change() -> None:
    """The same forward without the context changes buffers and random state: the test above can fail."""
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(8, 4)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    rng = torch.get_rng_state()
    model(x)
    changed = [name for name, b in model.named_buffers() if not torch.equal(b, buffers[name])]
    assert {"norm.running_mean", "stateful.calls", "stateful.mean"} <= set(changed)
    assert any("parametrizations" in name for name in changed)
    assert not torch.equal(torch.get_rng_state(), rng)


def test_flags_are_restored_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    with pytest.raises(RuntimeError), TracelessForward(model)():
        assert not model[1].training
        raise RuntimeError
    assert model[0].track_running_stats
    assert model[1].training


def test_batch_statistics_are_used_as_in_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(16, 4) * 5 + 3
    with TracelessForward(model)():
        scored = model(x)
    assert torch.equal(scored, model(x).detach()), "equal to the training forward, which then moves the statistics"
    model.eval()
    assert not torch.allclose(scored, model(x), atol=0.1)


def test_dropout_is_off_and_draws_repeat() -> None:
    model = nn.Dropout(0.5)
    with TracelessForward(model)():
        assert torch.equal(F.dropout(torch.ones(100), 0.5, True), torch.ones(100))
        assert torch.equal(model(torch.ones(100)), torch.ones(100))
        inside = torch.rand(3)
    assert torch.equal(inside, torch.rand(3)), "the draws inside are those the training forward will make"


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        self.running_mean += 1
        return x


def test_a_norm_with_its_own_forward_is_restored() -> None:
    model = OwnNorm(4)
    traceless = TracelessForward(model)
    for _ in range(3):
        with traceless():
            model(torch.zeros(2, 4))
    assert model.running_mean.tolist() == [0.0] * 4
