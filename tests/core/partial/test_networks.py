"""Networks with shared and frozen weights, mixed samples, routing and compiled regions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core import keep_rows, select_rows
from tests.core.partial.oracle import compare, gradients, mask_rows, squares
from tests.core.partial.pairs import KEPT, B, mlp


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
