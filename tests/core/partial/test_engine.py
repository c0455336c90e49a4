"""What else lives in a backward: scaling, accumulation, clipping, checkpoints, second derivatives."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ast.core import RowGradient, densify, keep_rows, select_rows
from lightning_ast.core.partial.memory import GradientMemory
from tests.core.partial.oracle import compare, gradients, mask_rows, relative, squares
from tests.core.partial.pairs import KEPT, B, assert_close, exact_and_partial, mlp


def test_values_weights_and_duplicates() -> None:
    net, x = mlp(), torch.randn(B, 6)
    losses = squares(net, x)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    torch.testing.assert_close(select_rows(losses, KEPT, weights), (losses[KEPT] * weights).sum())
    torch.testing.assert_close(keep_rows(losses, KEPT, weights), mask_rows(losses, KEPT, weights))
    twice = torch.tensor([2, 2, 5])
    torch.testing.assert_close(select_rows(losses, twice), losses[twice].sum())
    assert compare(net, x, twice)[0] < 1e-5
    assert compare(net, x, KEPT.flip(0), weights=weights)[0] < 1e-5, "any order"


@pytest.mark.parametrize(
    ("losses", "indices", "options", "said"),
    [
        (torch.rand(3, 2), torch.tensor([0]), {}, r"shape \(B,\), got \(3, 2\)"),
        (torch.rand(3), torch.tensor([], dtype=torch.int64), {}, r"k >= 1"),
        (torch.rand(3), torch.tensor([True, False, True]), {}, "bool"),
        (torch.rand(3), torch.tensor([[0]]), {}, r"shape \(k,\)"),
        (torch.rand(3), torch.tensor([0]), {"weights": torch.rand(2)}, r"weights of shape \(1,\), got \(2,\)"),
        (torch.rand(3), torch.tensor([0]), {"batchnorm": "subset"}, "'selected' or 'exact', got 'subset'"),
    ],
)
def test_wrong_arguments_are_named(losses: Tensor, indices: Tensor, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        select_rows(losses, indices, **options)


def test_autocast() -> None:
    net, x = mlp(), torch.randn(B, 6)

    def run(keep: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            losses = squares(net, x)
        return gradients(net, keep(losses, KEPT).sum())

    pair = exact_and_partial(run)
    assert all(g.dtype == torch.float32 for g in pair[1].values())
    assert_close(pair, 2e-2)  # bfloat16 sums in another order


def test_grad_scaler_clipping_and_accumulation() -> None:
    def run(keep: Any) -> dict[str, Tensor]:
        net, scaler = mlp(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(2):
            for part in range(3):  # accumulation: other rows, and another number of them, in each
                torch.manual_seed(part)
                losses = squares(net, torch.randn(B, 6))
                kept = torch.randperm(B)[: 3 + part]
                scaler.scale(keep(losses, kept).sum() / 9).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return {"norm": norm} | {name: p.detach() for name, p in net.named_parameters()}

    assert_close(exact_and_partial(run), 1e-4)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**24], ids=["fits", "overflows"])
def test_float16_with_a_grad_scaler(scale: float) -> None:
    """The steps that overflow are skipped, and the scale halved, as with exact masking."""
    ended: list[float] = []

    def run(keep: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=scale), torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            x = torch.randn(B, 3, 8, 8)
            with torch.autocast("cpu", torch.float16):
                losses = F.cross_entropy(net(x), torch.arange(B) % 5, reduction="none")
            scaler.scale(keep(losses, KEPT).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ended.append(scaler.get_scale())
        return {name: p.detach() for name, p in net.named_parameters()}

    assert_close(exact_and_partial(run), 1e-3)
    assert ended[0] == ended[1]
    assert (ended[0] < scale) == (scale > 2**20)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.last = (
                nn.Linear(6, 16),
                nn.Sequential(nn.GELU(), nn.Linear(16, 16), nn.Dropout(0.3)),
                nn.Linear(16, 5),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.body, self.first(x), use_reentrant=reentrant))

    torch.manual_seed(0)
    error, dense = compare(Checkpointed(), torch.randn(B, 6), KEPT)
    assert error < 1e-5
    assert not dense


@pytest.mark.parametrize("reentrant", [False, True])
def test_parameters_inside_a_checkpoint(reentrant: bool) -> None:
    """One with a row for each sample, which no input of the checkpoint is: its gradient is an ordinary tensor."""
    found = []
    for keep in (mask_rows, keep_rows):
        torch.manual_seed(0)
        first, last, own = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.zeros(B, 6))
        hidden = checkpoint(
            lambda h, last=last, own=own: last((h + own).exp()), first(torch.randn(B, 6)), use_reentrant=reentrant
        )
        keep(hidden.square().mean(1), KEPT).sum().backward()
        assert all(type(p.grad) is Tensor for p in (own, *first.parameters(), *last.parameters()))
        found.append({"own": own.grad, "first": first.weight.grad, "last": last.weight.grad})
    assert relative(*found) < 1e-5


def test_nothing_outlives_the_backward() -> None:
    """Neither gradients of rows nor activations, also where a backward stops in the middle."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise RuntimeError("stop")

    def wrappers() -> int:
        return sum(issubclass(type(o), (RowGradient, GradientMemory)) for o in gc.get_objects())

    def step(middle: Any) -> list[weakref.ref[Tensor]]:
        first, last, own = nn.Linear(6, 16), nn.Linear(16, 5), nn.Parameter(torch.zeros(B, 16))
        hidden = first(torch.randn(B, 6))
        inner = checkpoint(lambda h: torch.tanh(h[:, :8]).repeat(1, 2) + own, middle(hidden), use_reentrant=True)
        kept.append((first, last, own))
        losses = last(inner).square().mean(1)
        with contextlib.suppress(RuntimeError):
            select_rows(losses, KEPT).backward()
        return [weakref.ref(t) for t in (hidden, inner, losses)]

    kept: list[Any] = []
    gc.collect()
    before = wrappers()
    for middle in (torch.sin, Stop.apply):
        alive = step(middle)
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        assert wrappers() == before


def test_second_derivatives_and_grad_of_inputs() -> None:
    net, x = mlp(), torch.randn(B, 6, requires_grad=True)

    def penalty(keep: Any) -> dict[str, Tensor]:
        loss = keep(squares(net, x), KEPT).sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradients(net, loss + g.square().sum())

    assert_close(exact_and_partial(penalty))
    (g,) = torch.autograd.grad(select_rows(squares(net, x), KEPT), x)
    assert isinstance(g, RowGradient)
    (want,) = torch.autograd.grad(squares(net, x)[KEPT].sum(), x)
    torch.testing.assert_close(densify(g), want)
    torch.testing.assert_close(densify(g + 0) * 2, 2 * want)
    assert float(g.sum()) == pytest.approx(float(want.sum()), abs=1e-5)


def test_retained_graph_and_anomaly_mode() -> None:
    net, x = mlp(), torch.randn(B, 6)
    loss = select_rows(squares(net, x), KEPT)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in net.named_parameters()}
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        loss.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])


def test_offloaded_activations() -> None:
    net, x = mlp(), torch.randn(B, 6)

    def offloaded(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return squares(module, x)

    assert compare(net, x, KEPT, offloaded)[0] < 1e-5


def test_a_dense_auxiliary_loss_and_two_selections() -> None:
    def run(keep: Any) -> dict[str, Tensor]:
        net, x = mlp(), torch.linspace(-1, 1, 6 * B).view(B, 6)
        hidden = net[:3](x)
        losses = net[3:](hidden)
        first, second = keep(losses.square().mean(1), KEPT).sum(), keep(losses.tanh().mean(1), KEPT + 1).sum()
        return gradients(net, first + 2 * second + hidden.square().mean())

    assert_close(exact_and_partial(run))


def test_complex_numbers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, dtype=torch.complex64), nn.Linear(8, 4, dtype=torch.complex64))

    def losses(module: nn.Module, x: Tensor) -> Tensor:
        hidden = module[0](x.to(torch.complex64) * (1 + 0.5j))
        hidden = hidden * hidden.conj() + hidden.tanh() * hidden
        spectrum = torch.fft.rfft(module[1](hidden).real, dim=1)
        return spectrum.abs().square().mean(1)

    torch.manual_seed(7)
    want = gradients(net, losses(net, torch.randn(B, 6))[KEPT].sum())
    torch.manual_seed(7)
    got = gradients(net, select_rows(losses(net, torch.randn(B, 6)), KEPT))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_weights_may_be_learned() -> None:
    net, x = mlp(), torch.randn(B, 6)
    found = []
    for keep in (mask_rows, keep_rows):
        weights = torch.tensor([1.0, 2.0, 0.5, 3.0], requires_grad=True)
        keep(squares(net, x), KEPT, weights).sum().backward()
        found.append(weights.grad)
    torch.testing.assert_close(found[0], found[1])


def test_dense_ops_are_counted_once_per_call() -> None:
    torch.manual_seed(0)
    counter: Counter[str] = Counter()
    rnn, head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)
    for _ in range(3):
        losses = head(rnn(torch.randn(B, 5, 6))[0][:, -1]).square().mean(1)
        select_rows(losses, KEPT, dense_ops=counter).backward()
    assert list(counter.values()) == [3]
