"""The format of the training monitor's state in a checkpoint, field by field; checked before any of it is used."""

from __future__ import annotations

from typing import Any, get_args

import torch

from lightning_ast.core import state as check
from lightning_ast.core.state import Check, Faults, StateFormat
from lightning_ast.monitoring.samples import BINS
from lightning_ast.schedule import Stage

__all__ = ["MONITOR_STATE"]

_stage = check.choice(*get_args(Stage))
_flag = check.choice(0, 1)


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


_counts = check.tensor(torch.int32, shape=(None,), values="counts >= 0", allowed=lambda v: v >= 0)
MONITOR_STATE = StateFormat(
    1,
    check.record(
        {
            "progress": check.record(
                {
                    "loss_sum": check.maybe(Check("a float", lambda value: isinstance(value, float))),
                    "steps": check.whole(),
                    "before": check.positional(*[check.number(0, 2.0**62)] * 2, *[check.number(0, 1e29)] * 2),
                    "accuracies": check.mapping(check.whole(), check.number()),
                    "seconds": check.mapping(_stage, check.listing(check.SECONDS)),
                    "running": check.SECONDS,
                    "monitoring": check.SECONDS,
                    "stage": _stage,
                    "validated": _flag,
                },
                None,
                _losses_fit,
            ),
            "history": check.record(
                {
                    "classes": check.mapping(
                        check.whole(),
                        check.tensor(
                            shape=(None,),
                            values="shares in [0, 1], or NaN",
                            allowed=lambda v: v.isnan() | ((v >= 0) & (v <= 1)),
                        ),
                    ),
                    "thresholds": check.mapping(
                        check.whole(),
                        check.tensor(
                            shape=(BINS,), values="thresholds >= 0, or NaN", allowed=lambda v: v.isnan() | (v >= 0)
                        ),
                    ),
                    "offered": _counts,
                    "selected": _counts,
                    "worth": check.tensor(torch.float32, shape=(None,), values="sums >= 0", allowed=lambda v: v >= 0),
                },
                None,
                _rows_fit,
            ),
        }
    ),
)
