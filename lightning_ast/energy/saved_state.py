"""The format of the energy monitor's state in a checkpoint, field by field; checked before any of it is used."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

from lightning_ast.core import state as check
from lightning_ast.core.state import Check, Faults, StateFormat
from lightning_ast.energy.energy_ledger import Activity

__all__ = ["ENERGY_STATE"]


def _epochs_follow(state: dict[str, Any]) -> Faults:
    numbers = [costs["epoch"] for costs in state["epochs"]]
    if state["running"]:
        numbers.append(state["running"]["epoch"])
    for position, (before, number_) in enumerate(pairwise(numbers), start=1):
        if number_ <= before:
            name = f"epochs[{position}].epoch" if position < len(state["epochs"]) else "running.epoch"
            yield name, f"an epoch after {before}", number_


_joules = check.maybe(check.JOULES)
_running = check.record(
    {
        "epoch": check.whole(),
        "book": check.record(
            {
                "joules": check.mapping(check.text(), check.number(0, 1e15, nan=True)),
                "offered": check.mapping(check.choice(*get_args(Activity)), check.whole()),
                "meters": check.listing(check.text()),
            }
        ),
        "sections": check.mapping(check.text(), check.SECONDS),
        "seconds": check.positional(check.SECONDS, check.SECONDS),
    }
)
_parts = ("epoch", "loading", "scoring", "forward_backward", "validation")
_costs = check.record(
    {
        "epoch": check.whole(),
        **{f"{part}_seconds": check.SECONDS for part in _parts},
        "other_seconds": check.number(-check.LONGEST_SECONDS, check.LONGEST_SECONDS),  # a difference of clocks
        "gpu_joules": _joules,
        "cpu_joules": _joules,
    }
)
ENERGY_STATE = StateFormat(
    1,
    check.record(
        {
            "epochs": check.listing(_costs),
            "running": Check(
                "a dict",
                lambda value: isinstance(value, dict),
                lambda value, path: _running.inner(value, path) if value else [],  # nothing runs
            ),
        },
        None,
        _epochs_follow,
    ),
)
