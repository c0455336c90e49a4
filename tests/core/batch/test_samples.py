from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_ast.core.batch.inputs import first_input
from lightning_ast.core.batch.samples import batch_size_of, select_batch
from lightning_ast.errors import BatchError

Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Sample:
    image: Tensor
    name: str


def test_select_keeps_structure_and_takes_the_right_samples() -> None:
    x, y = torch.arange(12.0).view(4, 3), torch.tensor([10, 11, 12, 13])
    batch = {
        "pair": Pair(x, y),
        "list": [x, {"deep": (y,)}],
        "names": ["a", "b", "c", "d"],
        "ids": (7, 8, 9, 10),
        "scale": torch.tensor(2.0),
        "other": torch.zeros(5, 4),
        "text": "abcd",
        "data": Sample(x, "fixed"),
        "user": UserDict(y=y),
    }
    taken = select_batch(batch, torch.tensor([3, 1]))
    assert isinstance(taken["pair"], Pair)
    assert torch.equal(taken["pair"].image, x[[3, 1]])
    assert taken["pair"].label.tolist() == [13, 11]
    assert isinstance(taken["list"], list)
    assert taken["list"][1]["deep"][0].tolist() == [13, 11]
    assert taken["names"] == ["d", "b"]
    assert taken["ids"] == (10, 8)
    assert taken["scale"] is batch["scale"]
    assert taken["other"].shape == (5, 4)
    assert taken["text"] == "abcd"
    assert isinstance(taken["data"], Sample)
    assert torch.equal(taken["data"].image, x[[3, 1]])
    assert taken["data"].name == "fixed"
    assert isinstance(taken["user"], UserDict)
    assert taken["user"]["y"].tolist() == [13, 11]
    assert batch["names"] == ["a", "b", "c", "d"], "the given batch is not changed"


tensors = st.integers(0, 3).map(lambda extra: torch.arange(5 * 2**extra).view(5, *[2] * extra))
nested = st.recursive(
    tensors,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, min_size=1, max_size=3),
    ),
    max_leaves=8,
)


def reference(batch: object, rows: list[int]) -> object:
    if isinstance(batch, Tensor):
        return torch.stack([batch[i] for i in rows])
    if isinstance(batch, dict):
        return {key: reference(value, rows) for key, value in batch.items()}
    return type(batch)(reference(value, rows) for value in batch)


def same(left: object, right: object) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if type(left) is not type(right) or len(left) != len(right):
        return False
    pairs = ((left[k], right[k]) for k in left) if isinstance(left, dict) else zip(left, right)
    return all(same(a, b) for a, b in pairs)


@given(nested, st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_select_against_a_loop_over_rows(batch: object, rows: list[int]) -> None:
    assert same(select_batch(batch, torch.tensor(rows)), reference(batch, rows))


def test_columns_of_one_entry_a_sample() -> None:
    """Detection targets, ragged lists, arrays, paths: entry i belongs to sample i, whatever it holds."""
    import numpy as np

    boxes = [{"boxes": torch.zeros(n, 4), "id": n} for n in (1, 2, 6, 4, 5, 3)]
    ragged = [[1], [2, 2], [3, 3, 3], [4], [5], [6] * 6]
    batch = (torch.arange(6), boxes, ragged, [Path(str(i)) for i in range(6)], np.arange(6), np.arange(4))
    rows = torch.tensor([2, 5])
    x, targets, lists, paths, array, other = select_batch(batch, rows)
    assert x.tolist() == [2, 5]
    assert [t["id"] for t in targets] == [6, 3]
    assert targets[0]["boxes"].shape == (6, 4), "a sample's own six rows are not the batch's"
    assert lists == [[3, 3, 3], [6] * 6]
    assert paths == [Path("2"), Path("5")]
    assert array.tolist() == [2, 5]
    assert other.tolist() == [0, 1, 2, 3]


def test_a_pair_of_two_samples_is_a_pair() -> None:
    x, y = select_batch((torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])), torch.tensor([1]))
    assert x.tolist() == [[2.0]]
    assert y.tolist() == [1]


def test_batch_size_is_the_most_common_leading_dimension() -> None:
    assert batch_size_of({"weights": torch.zeros(10), "x": torch.zeros(4, 2), "y": torch.zeros(4)}) == 4
    assert batch_size_of([torch.zeros(3, 7)]) == 3


@pytest.mark.parametrize("batch", [{"a": 1}, torch.tensor(1.0), [], "text"])
def test_batch_without_a_batch_dimension(batch: object) -> None:
    with pytest.raises(BatchError, match="override `count_samples"):
        batch_size_of(batch)


def test_empty_batch_and_packed_sequence() -> None:
    with pytest.raises(BatchError, match="at least one sample"):
        batch_size_of(torch.zeros(0, 3))
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(BatchError, match="PackedSequence"):
        select_batch((torch.zeros(2), packed), torch.tensor([0]))


def test_first_input_is_floating_and_batched() -> None:
    x = torch.zeros(4, 3)
    assert first_input({"ids": torch.zeros(4, dtype=torch.int64), "scale": torch.zeros(2), "x": x}, 4) is x
    assert first_input(torch.zeros(4, dtype=torch.int64), 4) is None


def test_mappings_of_other_kinds() -> None:
    """Attribute dicts, proxies and mappings around a dict: sliced, and the given one is not changed."""
    from collections import defaultdict
    from collections.abc import MutableMapping
    from types import MappingProxyType

    class AttrDict(dict):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.__dict__ = self

    class Wrapped(MutableMapping):
        def __init__(self, inner: dict) -> None:
            self._d = dict(inner)

        def __getitem__(self, key: str) -> Tensor:
            return self._d[key]

        def __setitem__(self, key: str, value: Tensor) -> None:
            self._d[key] = value

        def __delitem__(self, key: str) -> None:
            del self._d[key]

        def __iter__(self) -> object:
            return iter(self._d)

        def __len__(self) -> int:
            return len(self._d)

    class Stubborn(Wrapped):
        def __init__(self, inner: dict, more: int) -> None:
            super().__init__(inner)

    items = {"x": torch.arange(4), "y": torch.arange(4) * 2}
    default = defaultdict(list, items)
    for batch in (AttrDict(items), Wrapped(items), MappingProxyType(items), default, UserDict(items)):
        taken = select_batch(batch, torch.tensor([3, 1]))
        assert type(taken) is type(batch)
        assert taken["y"].tolist() == [6, 2]
        assert batch["y"].tolist() == [0, 2, 4, 6]
    assert select_batch(AttrDict(items), torch.tensor([3])).x.tolist() == [3]
    assert select_batch(default, torch.tensor([3])).default_factory is list
    with pytest.raises(BatchError, match="cannot be made from a dict"):
        select_batch(Stubborn(items, 1), torch.tensor([3]))


def test_a_list_of_samples() -> None:
    batch = [{"x": torch.full((8,), float(i)), "y": torch.tensor(i)} for i in range(8)]
    assert batch_size_of(batch) == 8
    taken = select_batch(batch, torch.tensor([5, 2]))
    assert [int(sample["y"]) for sample in taken] == [5, 2]
    assert taken[0]["x"].shape == (8,)
    two = [{"x": torch.zeros(4, 3)}, {"y": torch.zeros(4)}]
    assert batch_size_of(two) == 4, "inputs and targets"
