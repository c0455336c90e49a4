"""Reading a saved state: what is refused, in which words, and what is passed over."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest

from lightning_ast.core.state import known_fields, reading, stamped
from lightning_ast.errors import CheckpointError, ConfigurationError


def read(state: Any) -> Any:
    with reading(state, owner="Mine"):
        return [float(share) for share in state["shares"]]


@pytest.mark.parametrize("state", [stamped({"shares": [1]}), {"shares": [1]}, {"shares": [1], "added": object()}])
def test_a_state_with_and_without_a_version_is_read(state: Any) -> None:
    assert read(state) == [1.0]


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({"share": [1]}, r"\(KeyError: 'shares'\)"),
        ({"shares": None}, r"\(TypeError: 'NoneType' .*\)"),
        ({"shares": ["x"]}, r"\(ValueError: could not .*\)"),
        ({"shares": [1], "version": "x"}, r"\(TypeError: '>' not .*\)"),
        ([1], r"\(AttributeError: 'list' .*\)"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_cause(state: Any, cause: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"state of Mine .* damaged, or not one of lightning-ast's {cause}"
    ) as found:
        read(state)
    assert found.value.owner == "Mine"
    assert "remove 'Mine' from the checkpoint's 'callbacks'" in str(found.value)
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)


def test_a_state_of_a_later_release_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a later release of lightning-ast wrote it: update lightning-ast"):
        read({**stamped({"shares": [1]}), "version": 2})


def test_a_mistake_of_the_user_keeps_its_own_words() -> None:
    with pytest.raises(ConfigurationError, match="another data set"), reading({}, owner="Mine"):
        raise ConfigurationError(["another data set"])


def test_fields_of_a_later_release_are_left_out() -> None:
    @dataclass
    class Costs:
        seconds: float
        joules: float = 0.0

    assert known_fields(Costs, {"seconds": 2.0, "watts": 3.0}) == Costs(2.0)
