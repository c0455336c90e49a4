"""The format of the training monitor's state in a checkpoint, field by field; checked before any of it is used."""

from __future__ import annotations

from typing import Any, get_args

import torch

from lightning_ast.core.state import Check, Faults, StateFormat
from lightning_ast.core.state_checks import (
    SECONDS,
    choice,
    listing,
    mapping,
    maybe,
    number,
    positional,
    record,
    tensor,
    whole,
)
from lightning_ast.monitoring.samples import BINS
from lightning_ast.schedule import Stage

__all__ = ["MONITOR_STATE"]

_stage = choice(*get_args(Stage))
_flag = choice(0, 1)


def _losses_fit(state: dict[str, Any]) -> Faults:
    if (state["loss_sum"] is None) != (state["steps"] == 0):
        yield "steps", "the losses in loss_sum, 0 where it is None", state["steps"]
    if state["before"][1] > state["before"][0]:
        yield "before[1]", f"at most the {state['before'][0]} samples offered", state["before"][1]


def _rows_fit(state: dict[str, Any]) -> Faults:
    for name in ("selected", "worth"):
        if len(state[name]) != len(state["offered"]):
            yield name, f"as many as offered, {len(state['offered'])}", state[name]
            return
    if bool((state["selected"] > state["offered"]).any()):
        yield "selected", "no sample selected more often than offered", state["selected"]


_counts = tensor(torch.int32, shape=(None,), values="counts >= 0", allowed=lambda v: v >= 0)
MONITOR_STATE = StateFormat(
    1,
    record(
        {
            "progress": record(
                {
                    "loss_sum": maybe(Check("a float", lambda value: isinstance(value, float))),
                    "steps": whole(),
                    "before": positional(*[number(0, 2.0**62)] * 2, *[number(0, 1e29)] * 2),
                    "accuracies": mapping(whole(), number()),
                    "seconds": mapping(_stage, listing(SECONDS)),
                    "running": SECONDS,
                    "monitoring": SECONDS,
                    "stage": _stage,
                    "validated": _flag,
                },
                None,
                _losses_fit,
            ),
            "history": record(
                {
                    "classes": mapping(
                        whole(),
                        tensor(
                            shape=(None,),
                            values="shares in [0, 1], or NaN",
                            allowed=lambda v: v.isnan() | ((v >= 0) & (v <= 1)),
                        ),
                    ),
                    "thresholds": mapping(
                        whole(),
                        tensor(shape=(BINS,), values="thresholds >= 0, or NaN", allowed=lambda v: v.isnan() | (v >= 0)),
                    ),
                    "offered": _counts,
                    "selected": _counts,
                    "worth": tensor(torch.float32, shape=(None,), values="sums >= 0", allowed=lambda v: v >= 0),
                },
                None,
                _rows_fit,
            ),
        }
    ),
)
