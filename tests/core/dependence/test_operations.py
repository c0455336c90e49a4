"""Single operations under a trace: writes, choices, own functions, compiled code, and where it has to give up."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_ast.core.dependence.trace import SampleTrace
from tests.core.dependence.tracing import B, known, places, unchanged


def test_a_record_shows_the_values_before_a_write() -> None:
    net = nn.Linear(3, 4)
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace:
        h = net(x).exp()
        node = h.grad_fn
        first = h.select(0, B - 1)
        first.detach().zero_()
        g = h.detach() * net.weight.sum()
    assert trace.dependence(node).profiles[0].nonzero().tolist() == [[B - 1]]
    assert places(trace, g) == []


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x + 0.0).mul(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Unseen(torch.autograd.Function):
    """Write by a kernel that torch does not dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        out = make(x)
        out.numpy()[:] = x.detach().numpy() * 2
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2, None


def test_custom_functions() -> None:
    net = nn.Linear(3, 3)
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace:
        out = _Doubled.apply(net(x))
        torch.zeros_like(out)
        out.detach().mul(0)
        after = out + 1
    assert places(trace, out) == [B - 1]
    assert places(trace, after) == [B - 1]


@pytest.mark.parametrize("make", [torch.empty_like, torch.zeros_like])
def test_an_unseen_kernel_is_not_taken_for_independent(make: Callable[[Tensor], Tensor]) -> None:
    net = nn.Linear(3, 3)
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace:
        before = net(x)
        out = _Unseen.apply(before, make)
        out.sum()
    assert places(trace, before) == [B - 1]
    assert known(trace, out) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 3))

    def run(n: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(n, x.clone().requires_grad_(), use_reentrant=reentrant)

    trace, out = unchanged(net, torch.randn(B, 3), run)
    assert places(trace, out) == [B - 1]


def test_a_leaf_that_the_step_made() -> None:
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace:
        leaf = (x + 1).detach().requires_grad_()
        other = torch.ones(B, 3, requires_grad=True)
        out = leaf * other
    assert trace.depends(leaf)
    assert not trace.depends(other)
    nodes = [edge[0] for edge in out.grad_fn.next_functions]
    assert [trace.dependence(node).independent for node in nodes] == [False, True]


def test_what_cannot_be_followed_is_unknown() -> None:
    net = nn.Linear(1, 2)
    x = torch.arange(float(B))[:, None].flip(0)
    table = torch.randn(4, 2, requires_grad=True)
    with SampleTrace(x, B) as trace:
        picked = x.flatten() == 0  # one row; the shadow has none
        rows = net(x)
        chosen = rows[picked]
        ids = torch.nonzero(x.flatten() > 2).flatten()
        looked_up = F.embedding(ids, table)
        out = rows[ids]
        after = looked_up * 2
        after.sum()
        shape = x.flatten().long() * 4 + 3
        failed = F.embedding(shape - shape, table) + 0
        failed.sum()
    assert places(trace, rows) == [B - 1]
    assert places(trace, chosen) == [0]  # the row that the run itself has picked
    assert places(trace, out) == []
    assert known(trace, looked_up) is None
    assert known(trace, after) is None


def test_an_index_out_of_range_on_the_shadow_alone_is_unknown() -> None:
    ids = torch.tensor([[0], [1], [2], [3], [4]])
    table = torch.randn(5, 2, requires_grad=True)
    with SampleTrace(
        ids, B, take=lambda batch, indices: torch.where(indices == torch.arange(B), 0, 99)[:, None]
    ) as trace:
        out = F.embedding(ids, table)
        after = out * 2
        after.sum()
    assert trace.failure is None
    assert known(trace, out) is None
    assert known(trace, after) is None


def test_sorted_rows_follow_the_order_of_the_run() -> None:
    net = nn.Linear(3, 2)
    x, lengths = torch.randn(B, 4, 3), torch.tensor([1, 4, 2, 3, 4])
    with SampleTrace((x, lengths), B) as trace:
        h = net(x)
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        hardest = h.sum((1, 2)).topk(B).values
    assert places(trace, out) == [B - 1]
    assert len(places(trace, hardest)) == 1


def test_collectives_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    library = torch.library.Library("c10d_functional", "FRAGMENT")
    library.define("lightning_ast_sum(Tensor x) -> Tensor")
    library.impl("lightning_ast_sum", lambda x: calls.append(1) or x.clone(), "CompositeExplicitAutograd")
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace:
        total = torch.ops.c10d_functional.lightning_ast_sum(x)
        out = total * torch.ones(3, requires_grad=True)
    assert calls == [1]
    assert trace.depends(total) is False
    assert known(trace, out).independent
    library._destroy()


def test_a_batch_that_cannot_be_indexed_says_so() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(1, 3)])
    trace = SampleTrace(packed, 2)
    assert trace.parts == 0
    assert "PackedSequence" in (trace.failure or "")
    single = SampleTrace(torch.randn(1, 3), 1)
    assert (single.parts, single.failure) == (0, None)


def test_it_may_be_left_and_entered_again() -> None:
    net = nn.Linear(3, 2)
    x = torch.randn(B, 3)
    trace = SampleTrace(x, B)
    with trace:
        first = net(x)
        first.sum()
    first.sum().backward()
    with trace:
        second = net(x) + first.detach()
        second.sum()
    assert places(trace, second) == [B - 1]


def test_shadows_are_freed_with_their_tensors() -> None:
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace, torch.no_grad():
        for _ in range(200):
            x * 2
        gc.collect()
        assert len(trace._shadows) < 40
        y = x * 2
    trace.release()
    assert len(trace._shadows) == 0
    assert trace.depends(y) is False


def test_random_generators_given_by_hand() -> None:
    x = torch.rand(B, 3)
    states = []
    for traced in (False, True):
        generator = torch.Generator().manual_seed(1)
        trace = SampleTrace(x, B)
        if traced:
            with trace:
                drawn = torch.bernoulli(x, generator=generator)
        else:
            drawn = torch.bernoulli(x, generator=generator)
        states.append((drawn, generator.get_state()))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_out_of_memory_ends_the_trace_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(3, 2)
    x = torch.randn(B, 3)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with SampleTrace(x, B) as trace:
        first = net(x)
        monkeypatch.setattr("lightning_ast.core.dependence.trace.follow", fail)
        second = net(x)
    assert torch.equal(first, second)
    assert "no memory left" in (trace.failure or "")
    assert trace.dependence(first.grad_fn) is None


def test_metadata_changed_in_place() -> None:
    net = nn.GRU(3, 4, batch_first=True)  # it transposes its output in place
    trace, out = unchanged(net, torch.randn(B, 6, 3), lambda n, x: n(x)[0].squeeze_(3 - 1).unsqueeze_(1).squeeze_(1))
    assert places(trace, out) == [B - 1]


def test_out_arguments_and_lists_of_tensors() -> None:
    x = torch.randn(B, 3)
    weight = torch.ones(3, requires_grad=True)
    with SampleTrace(x, B) as trace:
        total = torch.empty(B, 3)
        torch.add(x, 1, out=total)
        lists = torch._foreach_mul([x, torch.ones(2, 3)], 2)
        torch._foreach_add_(lists, 1)
        outs = [part * weight for part in (total, *lists)]
        sum(out.sum() for out in outs)
    assert [places(trace, out) for out in outs] == [[B - 1], [B - 1], []]


def test_experts_that_choose_their_tokens() -> None:
    router, experts = nn.Linear(3, 2), nn.ModuleList(nn.Linear(3, 4) for _ in range(2))
    x = torch.randn(B, 6, 3)
    with SampleTrace(x, B) as trace:
        tokens = x.flatten(0, 1)
        weights, chosen = router(tokens).softmax(-1).topk(1)
        out = torch.zeros(len(tokens), 4)
        for k, expert in enumerate(experts):
            rows, _ = torch.where(chosen == k)
            out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows])
    found = set(places(trace, out))
    assert found
    assert found <= set(range(6 * (B - 1), 6 * B))


def test_codes_that_are_looked_up() -> None:
    encoder, codebook = nn.Linear(3, 2), nn.Embedding(64, 2)
    x = torch.randn(B, 3)
    x[-1] = -x[-2] * 9
    with SampleTrace(x, B) as trace:
        codes = codebook(torch.cdist(encoder(x), codebook.weight).argmin(1))
        codes.sum()
    assert places(trace, codes) == [B - 1]


def test_a_second_tensor_of_labels_does_not_matter() -> None:
    net = nn.Linear(3, 4)
    x, labels = torch.randn(B, 3), torch.tensor([0, 1, 2, 3, 0])
    with SampleTrace((x, labels), B) as trace:
        out = net(x)
        loss = F.cross_entropy(out, labels, reduction="none")
    assert places(trace, out) == [B - 1]
    assert places(trace, loss) == [B - 1]


def test_a_slice_of_a_large_data_set_is_not_copied_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ast.core.dependence.shadows._LARGE_BYTES", 1000)
    data = torch.randn(1000, 3)
    net = nn.Linear(3, 2)
    x = data[501 : 501 + B]
    with SampleTrace(x, B) as trace:
        out = net(x)
        other = net(data[:B])
        flat = x.view(-1).view(torch.int32) * 1.0 * net.weight.sum()
    assert places(trace, out) == [B - 1]
    assert places(trace, other) == []
    assert places(trace, flat) == [*range(3 * (B - 1), 3 * B)]
    assert max(e.shadow.nbytes() for e in trace._shadows._entries.values() if e.shadow is not None) < 1000


def test_modes_of_others_see_one_run_only() -> None:
    net = nn.Linear(3, 2)
    x = torch.randn(B, 3)
    with FlopCounterMode(display=False) as plain:
        net(x)
    with FlopCounterMode(display=False) as counted, SampleTrace(x, B) as trace:
        out = net(x)
        out.sum()
    assert counted.get_total_flops() == plain.get_total_flops()
    assert places(trace, out) == [B - 1]


def test_compiled_functions_run_uncompiled_meanwhile() -> None:
    net = torch.compile(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), fullgraph=True, backend="eager")
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace:
        out = net(x)
        out.sum()
    assert places(trace, out) == [B - 1]


def test_a_limit_on_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ast.core.dependence.records._MAX_ELEMENTS", 40)
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(10))
    x = torch.randn(B, 3)
    outs = [x]
    with SampleTrace(x, B) as trace:
        for layer in layers:
            outs.append(layer(outs[-1]))
        outs[-1].sum()
        assert trace._records._elements <= 40
    assert [places(trace, out) for out in outs[1:]] == [[B - 1]] * 10


def test_numbers_that_are_not_finite() -> None:
    x = torch.randn(B, 3)
    weight = torch.ones(3, requires_grad=True)
    with SampleTrace(x, B) as trace:
        holes = torch.full((B, 3), float("nan"))
        holes[:, 0] = float("inf")
        holes[:, 1] = x[:, 1]
        out = holes * weight
        out.sum()
    assert places(trace, out) == [B - 1]
    assert places(trace, out, 1) == [1]
