"""Every container that users load: the samples taken, and other samples in the place of bad ones, by hand."""

from __future__ import annotations

import functools
import math
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_ast.core.batch.inputs import find_finite, replace_in_batch
from lightning_ast.core.batch.samples import batch_size_of, select_batch
from lightning_ast.errors import BatchError, EmptyBatchError

pytestmark = pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
SIZE = 6
X = torch.arange(2.0 * SIZE).reshape(SIZE, 2)
Y = torch.arange(SIZE)
ROWS = torch.tensor([4, 1])


class Named(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any
    kind: str = "fixed"
    size: Tensor = field(default_factory=lambda: torch.tensor(8))


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any


@dataclass
class Derived:
    """Knows more of itself than its fields."""

    x: Any
    y: Any

    def __post_init__(self) -> None:
        self.twice = 2 * self.y

    @functools.cached_property
    def total(self) -> Tensor:
        return self.y.sum()


@attrs.frozen
class Attrs:
    x: Any
    y: Any


class Encoding(UserDict):
    """As the tokenizers of transformers give it: an entry a sample beside the items."""

    def __init__(self, data: dict[str, Any], encodings: list[str]) -> None:
        super().__init__(data)
        self._encodings = encodings


class AttributeDict(dict):
    """Has its items and more as attributes."""


def attribute_dict(x: Tensor) -> AttributeDict:
    made = AttributeDict(x=x, y=Y)
    made.names = [f"sample {i}" for i in range(SIZE)]
    return made


def detection(x: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": x[i].expand(3, i + 1, 2), "boxes": torch.ones(i, 4), "ids": torch.ones(i)} for i in range(SIZE)]


def many_targets(x: Tensor) -> dict[str, Any]:
    targets = [{"id": Y[i : i + 1], "area": torch.ones(2), "box": torch.ones(2)} for i in range(SIZE)]
    return {"x": x, "labels": targets}


def images(x: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return [x[i].expand(3, 4, 2) for i in range(SIZE)], [{"boxes": torch.ones(i, 4)} for i in range(SIZE)]


def ragged(x: Tensor) -> list[Tensor]:
    return [x[i].expand(i + 1, 2) for i in range(SIZE)]


def stacked(batch: Any, x: Any, y: Any) -> tuple[Any, Any]:
    return torch.stack([sample[x] for sample in batch]), [sample[y] for sample in batch]


def first_rows(nested: Tensor) -> Tensor:
    return torch.stack([row[0] for row in nested.unbind()])


NAMES = [str(i) for i in range(SIZE)]
CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "tuple": (lambda x: (x, Y), lambda b: b),
    "named tuple": (lambda x: Named(x, Y), lambda b: (b.x, b.y)),
    "frozen dataclass": (lambda x: Frozen(x, Y), lambda b: (b.x, b.y)),
    "slotted dataclass": (lambda x: Slotted(x, Y), lambda b: (b.x, b.y)),
    "dataclass with more": (lambda x: Derived(x, Y), lambda b: (b.x, b.twice // 2)),
    "attrs": (lambda x: Attrs(x, Y), lambda b: (b.x, b.y)),
    "nested": (lambda x: {"a": [x, {"b": (Y,)}], "name": "n", "none": None}, lambda b: (b["a"][0], b["a"][1]["b"][0])),
    "dict and names": (lambda x: {"x": x, "y": NAMES}, lambda b: (b["x"], b["y"])),
    "deque": (lambda x: {"x": x, "y": deque(range(SIZE))}, lambda b: (b["x"], b["y"])),
    "encodings": (lambda x: Encoding({"x": x, "y": Y}, NAMES), lambda b: (b["x"], b._encodings)),
    "attributes of a dict": (attribute_dict, lambda b: (b["x"], [name[-1] for name in b.names])),
    "arrays": (lambda x: {"x": x.numpy(), "y": Y.numpy()}, lambda b: (b["x"], b["y"])),
    "dicts with an index": (lambda x: [{"x": x[i], "y": i} for i in range(SIZE)], lambda b: stacked(b, "x", "y")),
    "tuples with an index": (lambda x: [(x[i], Y[i]) for i in range(SIZE)], lambda b: stacked(b, 0, 1)),
    "images and targets": (
        images,
        lambda b: (torch.stack([image[0, 0] for image in b[0]]), [len(t["boxes"]) for t in b[1]]),
    ),
    "detection": (detection, lambda b: (torch.stack([s["x"][0, 0] for s in b]), [len(s["boxes"]) for s in b])),
    "pixels and many targets": (many_targets, lambda b: (b["x"], [target["id"] for target in b["labels"]])),
    "ragged beside": (lambda x: {"x": x, "y": ragged(x)}, lambda b: (b["x"], [len(row) - 1 for row in b["y"]])),
    "sparse COO": (lambda x: (x.to_sparse(), Y), lambda b: (b[0].to_dense(), b[1])),
    "sparse CSR": (lambda x: (x.to_sparse_csr(), Y), lambda b: (b[0].to_dense(), b[1])),
    "sparse CSC": (lambda x: (x.to_sparse_csc(), Y), lambda b: (b[0].to_dense(), b[1])),
    "strided nested": (lambda x: (torch.nested.nested_tensor(ragged(x)), Y), lambda b: (first_rows(b[0]), b[1])),
    "jagged": (
        lambda x: (torch.nested.nested_tensor(ragged(x), layout=torch.jagged), Y),
        lambda b: (first_rows(b[0]), b[1]),
    ),
}
ODD = ("sparse", "strided nested", "jagged")


@pytest.mark.parametrize("kind", CONTAINERS)
def test_counted_and_sliced(kind: str) -> None:
    make, read = CONTAINERS[kind]
    batch = make(X)
    assert batch_size_of(batch) == SIZE
    taken = select_batch(batch, ROWS)
    x, y = read(taken)
    assert torch.equal(torch.as_tensor(x), X[ROWS])
    assert list(map(int, y)) == [4, 1]
    assert type(taken) is type(batch)
    assert torch.equal(torch.as_tensor(read(batch)[0]), X), "the given one is not changed"


@pytest.mark.parametrize("bad", [[2], [0, 5], list(range(SIZE))], ids=["one", "two", "all"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_bad_samples_are_found_and_replaced(kind: str, bad: list[int]) -> None:
    make, read = CONTAINERS[kind]
    given = X.index_fill(0, torch.tensor(bad), math.nan)
    batch = make(given)
    finite = find_finite(batch, SIZE)
    assert finite is not None
    assert [i for i in range(SIZE) if not finite[i]] == bad
    replaced = replace_in_batch(batch, finite)
    assert type(replaced) is type(batch)
    assert batch_size_of(replaced) == SIZE
    x = torch.as_tensor(read(replaced)[0])
    if len(bad) == SIZE:
        assert kind.startswith(ODD) or x.isfinite().all(), "torch has no nan_to_num of these"
        return
    first = next(i for i in range(SIZE) if i not in bad)
    assert torch.equal(x, X[torch.tensor([first if i in bad else i for i in range(SIZE)])])
    assert torch.equal(torch.as_tensor(read(batch)[0]).isnan(), given.isnan()), "the given one is not changed"


@pytest.mark.parametrize("kind", CONTAINERS)
def test_finite_batches_are_left_alone(kind: str) -> None:
    assert find_finite(CONTAINERS[kind][0](X), SIZE) is None


def test_what_is_known_of_the_whole_batch_is_asked_for_anew() -> None:
    batch = Derived(X, Y)
    assert int(batch.total) == 15
    assert int(select_batch(batch, ROWS).total) == 5


def test_jagged_tensors_that_share_their_lengths_still_do() -> None:
    x = torch.nested.nested_tensor(ragged(X), layout=torch.jagged)
    y = torch.nested.nested_tensor_from_jagged(torch.ones_like(x.values()), offsets=x.offsets())
    taken_x, taken_y = select_batch((x, y), ROWS)
    assert torch.equal(first_rows(taken_x + taken_y), X[ROWS] + 1)


@pytest.mark.parametrize("size", [[SIZE], []], ids=["with a batch size", "without"])
def test_tensordict(size: list[int]) -> None:
    tensordict = pytest.importorskip("tensordict")
    x = X.clone()
    x[2] = math.nan
    inner = tensordict.TensorDict({"z": Y[:, None]}, batch_size=[SIZE])
    batch = tensordict.TensorDict({"x": x, "y": Y, "inner": inner}, batch_size=size)
    assert batch_size_of(batch) == SIZE
    taken = select_batch(batch, ROWS)
    assert (taken["y"].tolist(), taken["inner"]["z"].flatten().tolist()) == ([4, 1], [4, 1])
    assert taken.batch_size == torch.Size([2] if size else [])
    finite = find_finite(batch, SIZE)
    replaced = replace_in_batch(batch, finite)
    assert replaced.batch_size == torch.Size(size)
    assert torch.equal(replaced["x"], X[torch.tensor([0, 1, 0, 3, 4, 5])])
    every = replace_in_batch(batch, torch.zeros(SIZE, dtype=torch.bool))
    assert every["x"].isfinite().all()


class Graphs:
    """As torch_geometric's batch: it can be moved to a device, and is no container."""

    num_graphs = SIZE

    def to(self, device: Any) -> Graphs:
        return self


class Holder:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.x = X


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "graphs": (Graphs, "type Graphs in the batch"),
    "an object": (Holder, "type Holder in the batch"),
    "a generator": (lambda: (i for i in range(SIZE)), "type generator in the batch"),
    "a set": (lambda: frozenset(range(SIZE)), "type frozenset in the batch"),
    "BSR": (lambda: torch.eye(SIZE).to_sparse_bsr((2, 2)), "the samples of a Tensor of layout torch.sparse_bsr"),
    "MKL-DNN": (lambda: torch.eye(SIZE).to_mkldnn(), "the samples of a Tensor of layout torch._mkldnn"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sliced_is_named(kind: str) -> None:
    make, message = REFUSED[kind]
    part = make()
    assert batch_size_of((Y, part)) == SIZE
    with pytest.raises(BatchError, match=rf"{message}.*override `count_samples\(batch\)` and `select_batch"):
        select_batch((Y, part), ROWS)
    bad = torch.tensor([True] * 5 + [False])
    assert replace_in_batch((X, part), bad)[1] is part, "it is left as it is where nothing is sliced"


@pytest.mark.parametrize("batch", [Graphs(), iter([X]), pack_sequence([X, X])], ids=["graphs", "iterator", "packed"])
def test_what_cannot_be_counted_is_named(batch: Any) -> None:
    with pytest.raises(BatchError, match=rf"{type(batch).__name__}.*override `count_samples"):
        batch_size_of(batch)


def test_a_known_size_tells_a_short_list() -> None:
    """A last batch of one sample, or one whose entries happen to agree."""
    one, alike = [{"x": X, "id": 5}], [{"image": torch.zeros(3, 2), "boxes": torch.zeros(3, 4)}] * 2
    assert [s["id"] for s in select_batch(one, torch.tensor([0]), batch_size=1)] == [5]
    assert len(select_batch(alike, torch.tensor([1]), batch_size=2)) == 1
    spoiled = [{"x": X * math.nan, "id": 5}]
    assert find_finite(spoiled, 1).tolist() == [False]


def test_unclear_lists() -> None:
    with pytest.raises(BatchError, match=r"a list of 3 tensors with leading dimensions 5, 4, 2.*override"):
        batch_size_of([torch.zeros(n, 2) for n in (5, 4, 2)])


@pytest.mark.parametrize("batch", [[], (), {}, X[:0], {"x": X[:0], "y": Y[:0]}], ids=repr)
def test_empty_batches(batch: Any) -> None:
    with pytest.raises(EmptyBatchError):
        batch_size_of(batch)


def test_batches_of_two_loaders_are_rows() -> None:
    two = [{"x": X, "weights": torch.ones(10), "y": Y}, {"x": X, "weights": torch.ones(10), "y": Y}]
    assert batch_size_of(two) == SIZE
    assert [part["x"].shape[0] for part in select_batch(two, ROWS)] == [2, 2]
