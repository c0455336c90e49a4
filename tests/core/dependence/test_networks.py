"""One sample is followed through a network: its rows are named exactly, and the run is not changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core.dependence.trace import SampleTrace
from tests.core.dependence.tracing import B, known, places, unchanged


def test_mlp() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    trace, out = unchanged(net, torch.randn(B, 3), lambda n, x: n(x))
    assert places(trace, out) == [B - 1]
    found = known(trace, out)
    assert found is not None
    assert found.profiles[0].dtype is torch.float64
    assert (found.profiles[1] > 0).all()
    assert not found.independent


def test_convolutions_with_batchnorm_keep_their_buffers() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 2),
        nn.BatchNorm1d(2, affine=False),
    )  # fmt: skip
    trace, out = unchanged(net, torch.randn(B, 3, 8, 8), lambda n, x: n(x))
    assert places(trace, out) == [B - 1]


@pytest.mark.parametrize("batch_first", [True, False])
def test_lstm(batch_first: bool) -> None:
    net = nn.LSTM(B, 4, num_layers=2, batch_first=batch_first, dropout=0.2)  # T == B == the number of features
    x = torch.randn(B, B, B)

    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n(x if batch_first else x.transpose(0, 1))[0]

    trace, out = unchanged(net, x, run)
    assert places(trace, out, 0 if batch_first else 1) == [B - 1]
    assert len(places(trace, out, 1 if batch_first else 0)) == B


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_with_dropout(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=batch_first)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(n: nn.Module, x: Tensor) -> Tensor:
        return n(x if batch_first else x.transpose(0, 1))

    trace, out = unchanged(net, torch.randn(B, B, 8), run)
    assert places(trace, out, 0 if batch_first else 1) == [B - 1]
    assert len(places(trace, out, 1 if batch_first else 0)) == B


def test_attention_with_dropout_and_a_mask_of_padding() -> None:
    net = nn.Linear(4, 4)

    def run(n: nn.Module, x: Tensor) -> Tensor:
        q = n(x).unflatten(-1, (2, 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.4)

    trace, out = unchanged(net, torch.randn(B, 3, 4), run)
    assert places(trace, out) == [B - 1]
    assert len(places(trace, out, 1)) == 2


def test_embedded_ids() -> None:
    net = nn.Embedding(50, 4)
    ids = torch.arange(B * 3).view(B, 3)
    mask = torch.ones(B, 3, dtype=torch.long)
    with SampleTrace({"ids": ids, "mask": mask}, B) as trace:
        out = net(ids) * mask[..., None]
    assert trace.parts == 1
    assert places(trace, out) == [B - 1]


def test_ids_of_users_and_items() -> None:
    users, items = nn.Embedding(50, 4), nn.Embedding(50, 4)
    batch = (torch.tensor([7, 7, 7, 3, 7]), torch.arange(B), torch.rand(B))
    with SampleTrace(batch, B) as trace:
        u, i = users(batch[0]), items(batch[1])
        out = (u * i).sum(1)
    assert [places(trace, part) for part in (u, i, out)] == [[B - 1]] * 3


def test_alike_samples_are_told_apart() -> None:
    batch = torch.ones(B, 3)
    net = nn.Linear(3, 2)
    with SampleTrace(batch, B) as trace:
        out = net(batch)
    assert places(trace, out) == [B - 1]
    assert torch.equal(batch, torch.ones(B, 3))


def test_writes_in_place_through_views() -> None:
    net = nn.Linear(3, 4)

    def run(n: nn.Module, x: Tensor) -> Tensor:
        h = n(x)
        frame = torch.zeros(2, B + 3, 4)
        frame[1, 2:-1] = h
        frame[0].index_put_((torch.tensor([0, 6]),), h[[4, 0]])
        frame[:, :, 0].mul_(3)
        frame[frame > 1e9] = 0
        frame.view(-1)[:2].add_(1)
        return frame.relu_()

    trace, out = unchanged(net, torch.randn(B, 3), run)
    assert places(trace, out, 1) == [0, 2 + B - 1]


def test_a_teacher_without_gradient() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(B, 3)
    with SampleTrace(x, B) as trace:
        with torch.no_grad():
            target = teacher(x).softmax(1)
        out = student(x)
        loss = F.kl_div(out.log_softmax(1), target, reduction="batchmean")
    assert places(trace, out) == [B - 1]
    assert trace.depends(target)
    assert not trace.depends(teacher.weight)
    assert known(trace, loss).independent is False


def test_images_of_several_sizes_padded_into_one_batch() -> None:
    net = nn.Conv2d(3, 2, 3, padding=1)
    images = [torch.rand(3, 4 + k, 8 - k) for k in range(B)]
    targets = [{"boxes": torch.rand(k + 1, 4), "labels": torch.ones(k + 1, dtype=torch.long)} for k in range(B)]
    with SampleTrace((images, targets), B) as trace:
        batched = torch.zeros(B, 3, 8, 8)
        for image, frame in zip(images, batched, strict=True):
            frame[:, : image.shape[1], : image.shape[2]].copy_((image - 0.5) / 0.25)
        stacked = torch.stack([F.pad(i, (0, 8 - i.shape[2], 0, 8 - i.shape[1])) for i in images])
        out, other = net(batched), net(stacked)
    assert places(trace, out) == [B - 1]
    assert places(trace, other) == [B - 1]


def test_a_shared_tensor_of_as_many_rows_as_samples() -> None:
    net, prompt = nn.Linear(3, 4), nn.Linear(2, 4)
    batch = {"x": torch.randn(B, 3), "prompts": torch.randn(B, 2)}
    for only, expected in [(0, [B - 1]), (1, [])]:
        with SampleTrace(batch, B, only=only) as trace:
            out = net(batch["x"])
            shared = prompt(batch["prompts"])
        assert trace.parts == 2
        assert places(trace, out) == expected
        assert places(trace, shared) == ([] if expected else [B - 1])
    smaller = {"x": torch.randn(B, 3), "prompts": torch.randn(9, 2)}
    with SampleTrace(smaller, B) as trace:
        shared = prompt(smaller["prompts"])
        shared.sum()
    assert trace.parts == 1
    assert known(trace, shared).independent


def test_an_own_selection_of_samples() -> None:
    batch = torch.ones(3, B, 2)  # time first
    net = nn.Linear(2, 2)
    with SampleTrace(batch, B, take=lambda batch, indices: batch[:, indices]) as trace:
        out = net(batch)
    assert places(trace, out, 1) == [B - 1]
    assert len(places(trace, out, 0)) == 3


def test_graphs() -> None:
    nodes = torch.tensor([0, 0, 1, 1, 1, 2])
    graphs = SimpleNamespace(
        x=torch.randn(6, 3), z=torch.arange(6), batch=nodes, num_graphs=3, edge_index=torch.tensor([[0, 5], [1, 5]])
    )
    net, embedding = nn.Linear(3, 2), nn.Embedding(6, 2)
    with SampleTrace(graphs, 3) as trace:
        h = net(graphs.x)
        e = embedding(graphs.z)
        pooled = torch.zeros(3, 2).index_add(0, nodes, h)
    assert [places(trace, part) for part in (h, e, pooled)] == [[5], [5], [2]]


def test_jagged_tensors() -> None:
    net = nn.Linear(3, 2)
    parts = [torch.randn(k + 4, 3) for k in range(3)]
    with SampleTrace(parts, 3) as trace:
        jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
        h = net(jagged).tanh()
        out = h.to_padded_tensor(0.0).sum(1)
        out.sum()
    assert places(trace, out) == [2]
    assert trace.dependence(h.grad_fn).profiles[0].nonzero().flatten().tolist() == [*range(9, 15)]

    batch = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with SampleTrace(batch, 3) as trace:
        out = net(batch).values().exp()
    assert places(trace, out) == [*range(9, 15)]


def test_autocast() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    def run(n: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return n(x)

    trace, out = unchanged(net, torch.randn(B, 3), run)
    assert out.dtype is torch.bfloat16
    assert places(trace, out) == [B - 1]


def test_complex_numbers() -> None:
    net = nn.Linear(8, 8)

    def run(n: nn.Module, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(n(x)) * torch.view_as_complex(torch.ones(8, 2))
        return torch.fft.irfft(spectrum.conj()[:, :5].imag + spectrum[:, :5])

    trace, out = unchanged(net, torch.randn(B, 8), run)
    assert places(trace, out) == [B - 1]


def test_gradients_inside_the_step() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def run(n: nn.Module, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(n(x).sum(), x, create_graph=True)
        return grad

    trace, out = unchanged(net, torch.randn(B, 3), run)
    assert places(trace, out) == [B - 1]


def test_expanded_tensors_of_a_batch() -> None:
    net = nn.Linear(4, 2)
    gray = torch.rand(B, 1, 4).expand(B, 3, 4)  # one channel shown as three
    shared = torch.rand(1, 4).expand(B, 4)
    with SampleTrace((gray, shared), B) as trace:
        out = net(gray.mean(1) + shared)
        out.sum()
    assert trace.failure is None
    assert places(trace, out) == [B - 1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_of_a_batch() -> None:
    net = nn.Linear(4, 2)
    rows = [torch.rand(2 + k, 4) for k in range(B)]
    nested = torch.nested.nested_tensor(rows)
    with SampleTrace(nested, B) as trace:
        out = net(torch.stack([row.mean(0) for row in nested.unbind()]))
        out.sum()
    assert trace.failure is None
    assert places(trace, out) == [B - 1]
