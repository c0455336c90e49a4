"""Checks of a saved state: the words of each fault, and what changed settings make of a state."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightning_ast.core import PIController
from lightning_ast.core.state import (
    StateFormat,
    choice,
    known_fields,
    listing,
    mapping,
    maybe,
    number,
    record,
    tensor,
    text,
    whole,
)

FORMAT = StateFormat(
    2,
    record(
        {
            "count": whole(),
            "share": maybe(number(0, 1)),
            "name": text(),
            "rows": tensor(torch.int32, torch.int64, shape=(None, 2), values="rows >= 0", allowed=lambda v: v >= 0),
            "parts": listing(mapping(text(), choice(0, 1)), least=1),
        },
        {"added": number(nan=True)},
        lambda state: iter([("count", "less than 10", state["count"])] if state["count"] >= 10 else []),
    ),
)
GOOD = {"count": 3, "share": None, "name": "a", "rows": torch.ones(4, 2, dtype=torch.long), "parts": [{"x": 1}]}


def test_a_good_state_has_no_faults() -> None:
    assert FORMAT.faults(GOOD) == FORMAT.faults(FORMAT.stamped(GOOD)) == []
    assert FORMAT.stamped(GOOD)["version"] == 2
    assert FORMAT.faults({**GOOD, "version": 1, "added": float("nan"), "unknown": object()}) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"count": True}, "count: expected an int >= 0, got True."),
        ({"count": 10**6000}, "count: expected an int >= 0, got a huge int."),
        ({"count": 12}, "count: expected less than 10, got 12."),
        ({"share": 1.5}, "share: expected a finite number in [0, 1] or None, got 1.5."),
        ({"share": float("nan")}, "share: expected a finite number in [0, 1] or None, got nan."),
        ({"name": 3}, "name: expected text, got 3."),
        (
            {"rows": torch.ones(4)},
            "rows: expected a int32 or int64 tensor of shape (n, 2), got a float32 tensor of shape (4,).",
        ),
        ({"rows": torch.full((4, 2), -7)}, "rows: expected rows >= 0, got -7."),
        ({"parts": []}, "parts: expected a list of at least 1, got a list of 0."),
        ({"parts": [{"x": 1}, {"y": 2}]}, "parts[1].y: expected one of 0, 1, got 2."),
        ({"parts": [{1: 1}]}, "parts[0]: expected keys that are text, got 1."),
        ({"added": "x"}, "added: expected a number or NaN, got 'x' (str)."),
        ({"version": 0}, "version: expected an int >= 1, got 0."),
        (
            {"version": 3},
            "version: expected at most 2, got 3; a later release of lightning-ast wrote it: update lightning-ast.",
        ),
    ],
)
def test_a_fault_names_field_expected_and_found(change: dict[str, object], fault: str) -> None:
    assert FORMAT.faults({**GOOD, **change}) == [fault]


def test_a_missing_key() -> None:
    state = dict(GOOD)
    del state["share"]
    assert FORMAT.faults(state) == ["share: expected a finite number in [0, 1] or None, but the key is missing."]


def test_fields_of_a_later_release_are_left_out() -> None:
    @dataclass
    class Costs:
        seconds: float
        joules: float = 0.0

    assert known_fields(Costs, {"seconds": 2.0, "watts": 3.0}) == Costs(2.0)


def trained(controller: PIController) -> PIController:
    for _ in range(60):
        if controller.uses_feedforward:
            controller.threshold(torch.tensor(0.5), target=0.3)
        controller.update(0.9, target=0.3)
    return controller


def test_a_controller_of_another_kind_begins_anew() -> None:
    """A logarithm is no threshold: only the running rate means the same."""
    for one, other in [
        (PIController(), PIController(preset="original")),
        (PIController(preset="original"), PIController()),
    ]:
        state = trained(one).state_dict()
        other.load_state_dict(state)
        fresh = type(other)(preset="default" if other.uses_feedforward else "original").state_dict()
        assert {**other.state_dict(), "activation_rate_ema": None, "held_ema": None} == fresh
        assert other.activation_rate_ema == state["activation_rate_ema"]


def test_a_smaller_limit_of_the_integral_holds_at_once() -> None:
    other = PIController(integral_limit=5.0)
    other.load_state_dict(trained(PIController()).state_dict())
    assert other.state_dict()["integral"] == 5.0


def test_a_controllers_first_state_can_be_loaded() -> None:
    """That of the first release: neither its kind nor its limit was written."""
    state = trained(PIController()).state_dict()
    for name in ("feedforward", "integral_limit"):
        del state[name]
    other = PIController()
    other.load_state_dict(state)
    assert torch.equal(
        other.threshold(torch.tensor(0.5), target=0.3), trained(PIController()).threshold(torch.tensor(0.5), target=0.3)
    )
