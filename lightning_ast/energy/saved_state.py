"""The format of the energy monitor's state in a checkpoint, field by field; checked before any of it is used."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

from lightning_ast.core.state import Check, Faults, StateFormat
from lightning_ast.core.state_checks import (
    JOULES,
    LONGEST_SECONDS,
    SECONDS,
    choice,
    listing,
    mapping,
    maybe,
    number,
    positional,
    record,
    text,
    whole,
)
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


_joules = maybe(JOULES)
_running = record(
    {
        "epoch": whole(),
        "book": record(
            {
                "joules": mapping(text(), number(0, 1e15, nan=True)),
                "offered": mapping(choice(*get_args(Activity)), whole()),
                "meters": listing(text()),
            }
        ),
        "sections": mapping(text(), SECONDS),
        "seconds": positional(SECONDS, SECONDS),
    }
)
ENERGY_STATE = StateFormat(
    1,
    record(
        {
            "epochs": listing(
                record(
                    {
                        "epoch": whole(),
                        **dict.fromkeys(
                            [
                                "epoch_seconds",
                                "loading_seconds",
                                "scoring_seconds",
                                "forward_backward_seconds",
                                "validation_seconds",
                            ],
                            SECONDS,
                        ),
                        "other_seconds": number(-LONGEST_SECONDS, LONGEST_SECONDS),  # a difference of clocks
                        "gpu_joules": _joules,
                        "cpu_joules": _joules,
                    }
                )
            ),
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
