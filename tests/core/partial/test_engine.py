"""What else lives in a backward: scaling, accumulation, clipping, hooks, checkpoints, shared and frozen weights, second derivatives."""

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

from lightning_ast.core import BackwardFlops, RowGradient, densify, keep_rows, select_rows
from lightning_ast.core.partial.memory import GradientMemory
from tests.core.partial.oracle import compare, gradients, mask_rows, relative, squares

B = 12
KEPT = torch.tensor([0, 3, 4, 9])


def mlp(*, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)
    )


def exact_and_partial(run: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``run(keep)`` does a whole step with one of the two and returns gradients."""
    return run(mask_rows), run(keep_rows)


def assert_close(pair: tuple[dict[str, Tensor], dict[str, Tensor]], tolerance: float = 1e-5) -> None:
    assert relative(*pair) < tolerance


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


def test_forward_hooks() -> None:
    """They run once, and may change what passes."""
    calls: list[int] = []

    def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(len(output))
        return 2 * output

    def run(keep: Any) -> dict[str, Tensor]:
        net, x = mlp(), torch.ones(B, 6).cumsum(0) / 7
        net[2].register_forward_hook(double)
        net[3].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
        return gradients(net, keep(squares(net, x), KEPT).sum())

    assert_close(exact_and_partial(run))
    assert calls == [B, B]


def test_shared_and_frozen_weights_and_input_gradients() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.frozen, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(torch.relu(self.frozen(torch.tanh(self.inner(self.inner(x)))))))

    torch.manual_seed(0)
    net, x = Shared(), torch.randn(B, 6, requires_grad=True)
    assert compare(net, x, KEPT)[0] < 1e-5
    for keep in (mask_rows, keep_rows):
        x.grad = None
        keep(squares(net, x), KEPT).sum().backward()
        assert type(x.grad) is Tensor
        assert x.grad[KEPT].abs().sum() > 0
        rest = x.grad.clone()
        rest[KEPT] = 0
        assert not rest.any(), "rows that were not selected get none"
    before = x.grad.clone()
    keep_rows(squares(net, x), KEPT).sum().backward()
    torch.testing.assert_close(x.grad, 2 * before)  # accumulated into what was there


def test_hooks_see_the_full_gradient() -> None:
    seen: dict[str, Any] = {}

    def triple(p: Tensor) -> None:
        p.grad.mul_(3)

    def run(keep: Any) -> dict[str, Tensor]:
        net, x = mlp(), torch.ones(B, 6).cumsum(0) / 7
        handles = [
            net[1].register_full_backward_hook(lambda m, gin, gout: seen.update({f"module-{keep.__name__}": gout[0]})),
            net[3].weight.register_hook(lambda g: 2 * g),
            net[5].bias.register_post_accumulate_grad_hook(triple),
        ]
        hidden = net[:3](x)
        hidden.register_hook(lambda g: g * 0.5)
        hidden.retain_grad()
        losses = net[3:](hidden).square().mean(1)
        found = gradients(net, keep(losses, KEPT).sum())
        for handle in handles:
            handle.remove()
        seen[f"hidden-{keep.__name__}"] = hidden.grad
        return found

    assert_close(exact_and_partial(run))
    for kind in ("module", "hidden"):
        gradient = seen[f"{kind}-keep_rows"]
        assert gradient.shape == (B, 16)
        torch.testing.assert_close(densify(gradient), densify(seen[f"{kind}-mask_rows"]))
    assert "4 of 12 samples" in repr(seen["module-keep_rows"])


def test_densify_as_a_hook_makes_the_rest_ordinary() -> None:
    net, x = mlp(), torch.randn(B, 6)
    hidden = net[:3](x)
    hidden.register_hook(densify)
    loss = select_rows(net[3:](hidden).square().mean(1), KEPT)
    with BackwardFlops() as flops:
        loss.backward()
    first = 2 * B * 6 * 16
    rest = flops.full - first
    assert flops.executed == first + rest * len(KEPT) // B


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


def test_models_that_mix_samples_stay_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def contrastive(module: nn.Module, x: Tensor) -> Tensor:
        z = F.normalize(module(x), dim=1)
        return F.cross_entropy(z @ z.T / 0.1, torch.arange(B).roll(1), reduction="none")

    def across_the_batch(module: nn.Module, x: Tensor) -> Tensor:
        h = module[:2](x)
        return module[2](h + (h @ h.T).softmax(1) @ h).square().mean(1)

    def sorted_by_length(module: nn.Module, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return module(x[order])[order.argsort()].square().mean(1)

    for losses in (contrastive, across_the_batch, sorted_by_length):
        error, dense = compare(net, torch.randn(B, 6), KEPT, losses)
        assert error < 1e-5
        assert dense, "and what went dense is named"


def test_two_views_concatenated_along_the_batch_keep_their_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def chunked(module: nn.Module, x: Tensor) -> Tensor:
        a, b = module(torch.cat([x, x.flip(1)])).chunk(2)
        return (a - b.detach()).square().mean(1) + (b * a).mean(1)

    def sliced(module: nn.Module, x: Tensor) -> Tensor:
        z = module(torch.cat([x, x.flip(1), 2 * x]))
        return z[:B].square().mean(1) + z[2 * B :].tanh().mean(1)

    def concatenated(module: nn.Module, x: Tensor) -> Tensor:
        h = module[0](x)
        a, b = module[2](torch.cat([h, h * 2]).tanh()).split(B)
        return (a * b).mean(1)

    for losses in (chunked, sliced, concatenated):
        error, dense = compare(net, torch.randn(B, 6), KEPT, losses)
        assert error < 1e-5
        assert not dense, dict(dense)


def test_a_dense_auxiliary_loss_and_two_selections() -> None:
    def run(keep: Any) -> dict[str, Tensor]:
        net, x = mlp(), torch.linspace(-1, 1, 6 * B).view(B, 6)
        hidden = net[:3](x)
        losses = net[3:](hidden)
        first, second = keep(losses.square().mean(1), KEPT).sum(), keep(losses.tanh().mean(1), KEPT + 1).sum()
        return gradients(net, first + 2 * second + hidden.square().mean())

    assert_close(exact_and_partial(run))


def test_in_place_layers_and_writes() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            h = F.relu_(h + 0) + 0
            h[:, 2] = 0.5
            h[:, 4:6] *= 2
            h[::2] += 1
            h.clamp_(max=1.5)
            return self.head(h)

    torch.manual_seed(0)
    assert compare(Writes(), torch.randn(B, 6), KEPT)[0] < 1e-5


WRITES: dict[str, Any] = {
    "scaled-part": lambda h: h[:, 4:6].mul_(2),
    "set-column": lambda h: h[:, 1].fill_(0.5),
    "tanh-part": lambda h: h[:, 1:].tanh_(),
    "every-other": lambda h: h[..., 1::2].mul_(-1),
    "first-part": lambda h: h[:, :4].mul_(2),
    "samples": lambda h: h[1:3].mul_(2),
    "last-sample": lambda h: h[-1].zero_(),
    "viewed": lambda h: h.view(-1, 2, 4)[:, 1].clamp_(min=0),
    "shifted": lambda h: h[:, 1:].copy_(h[:, :-1].clone()),
    "whole": lambda h: h.view(-1, 2, 4).mul_(3),
    "transposed": lambda h: h.t().add_(1),
    "masked": lambda h: h.masked_fill_(h > 0.2, 0.0),
    "indexed": lambda h: h.index_fill_(1, torch.tensor([2, 5]), 0.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_as_the_last_thing_a_layer_does(name: str) -> None:
    class Writes(nn.Module):
        def __init__(self, *, head: bool) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3) if head else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x) * 1
            WRITES[name](h)
            return self.head(h)

    torch.manual_seed(0)
    for head in (False, True):
        for indices in (KEPT, torch.tensor([2])):
            assert compare(Writes(head=head), torch.randn(B, 6), indices)[0] < 1e-5


def write_column(g: Tensor) -> Tensor:
    g = g.clone()
    g[:, 2] = 0
    return g


def write_sample(g: Tensor) -> Tensor:
    g = g.clone()
    g[4] = 0
    return g


def add_to_part(g: Tensor) -> Tensor:
    g = g.clone()
    g[:, :2] += 1
    return g


def into_zeros(g: Tensor) -> Tensor:
    out = torch.zeros_like(g)
    out[:, 4:] = g[:, :-4]
    return out


def into_new(g: Tensor) -> Tensor:
    out = g.new_zeros(g.shape)
    out.copy_(g)
    out[:, :4].mul_(3)
    return out + g


def joined(g: Tensor) -> Tensor:
    return torch.cat([g.new_zeros(len(g), 2), g[:, 2:]], 1)


def clipped(g: Tensor) -> Tensor:
    return g / (g.norm() + 1e-3) + g.clamp(-0.01, 0.01) * g.sign().abs()


@pytest.mark.parametrize("change", [write_column, write_sample, add_to_part, into_zeros, into_new, joined, clipped])
def test_hooks_and_custom_backwards_that_write(change: Any) -> None:
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor, change: Any = change) -> Tensor:
            return change(g)

    def hooked(module: nn.Module, x: Tensor, change: Any = change) -> Tensor:
        hidden = module[:3](x)
        hidden.register_hook(change)
        return module[3:](hidden).square().mean(1)

    def custom(module: nn.Module, x: Tensor, changed: Any = Changed) -> Tensor:
        return module[3:](changed.apply(module[:3](x))).square().mean(1)

    for losses in (hooked, custom):
        assert compare(mlp(), torch.randn(B, 6), KEPT, losses)[0] < 1e-5, change.__name__


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


def test_embeddings_scaled_by_frequency_and_sparse_ones() -> None:
    for options in ({"scale_grad_by_freq": True}, {"sparse": True}):
        torch.manual_seed(0)
        net, x = nn.Embedding(5, 4, **options), torch.randint(0, 5, (B, 3))
        want, got = (
            gradients(net, loss)["weight"] for loss in (squares(net, x)[KEPT].sum(), select_rows(squares(net, x), KEPT))
        )
        torch.testing.assert_close(got.to_dense(), want.to_dense())


def test_data_dependent_control_flow_and_routing() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out = x.new_zeros(len(x), 4)
            for i, expert in enumerate(self.experts):
                taken = (x[:, 0] * 10).long() % 3 == i
                out[taken] = expert(x[taken])
            return out

    torch.manual_seed(0)
    error, dense = compare(Experts(), torch.rand(B, 6), KEPT)
    assert error < 1e-5
    assert dense


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_regions_are_exact_and_named(backend: str) -> None:
    net = mlp()
    compiled = nn.Sequential(net[0], torch.compile(net[1:4], backend=backend), net[4:])
    error, dense = compare(compiled, torch.randn(B, 6), KEPT)
    assert error < 1e-5
    assert set(dense) == ({"a torch.compile'd region"} if backend == "aot_eager" else set())


def test_custom_functions_get_rows_they_can_work_with() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * g

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(self.layer(x))

    torch.manual_seed(0)
    error, dense = compare(Net(), torch.randn(B, 6), KEPT)
    assert error < 1e-5
    assert not dense


def test_dense_ops_are_counted_once_per_call() -> None:
    torch.manual_seed(0)
    counter: Counter[str] = Counter()
    rnn, head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)
    for _ in range(3):
        losses = head(rnn(torch.randn(B, 5, 6))[0][:, -1]).square().mean(1)
        select_rows(losses, KEPT, dense_ops=counter).backward()
    assert list(counter.values()) == [3]
