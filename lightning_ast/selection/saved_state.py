"""What a ``SparseSelectionCallback`` writes into a checkpoint, field by field; read before any of it is used."""

from __future__ import annotations

from typing import Any, get_args

import torch

from lightning_ast.core import state as check
from lightning_ast.core.gate import GateName
from lightning_ast.core.significance import SIGNIFICANCE
from lightning_ast.core.state import Faults, StateFormat
from lightning_ast.lightning_internals.random_state import RANDOM_STATES, one_for_each
from lightning_ast.mode_facts import MODE_FACTS, Mode
from lightning_ast.schedule import Stage
from lightning_ast.selection.saved_epochs import EPOCHS, PARTS, RELOADS, part_faults
from lightning_ast.selection.saved_samples import TARGET

__all__ = ["SELECTION_STATE"]

_MOST_FLOPS = 1e24
_LARGEST_BATCH = 2**31
_ROUNDING = 1e-6

_stage = check.choice(*get_args(Stage))
_flag = check.choice(0, 1)
_scalar = check.tensor(shape=(), values="a number that is finite", allowed=torch.isfinite)
_positive_scalar = check.tensor(shape=(), values="a finite number >= 0", allowed=lambda v: v.isfinite() & (v >= 0))


def _rate_is_known(state: dict[str, Any]) -> Faults:
    if state["steps"] > 0 and state["activation_rate"] is None:
        yield "activation_rate", f"a rate, as there were {state['steps']} steps", None


def _has_a_threshold(state: dict[str, Any]) -> Faults:
    level = state["level"]
    limit = state.get("integral_limit", float("inf"))
    if abs(state["integral"]) > limit:
        yield "integral", f"a number in [-{limit:g}, {limit:g}]", state["integral"]
    if state.get("feedforward") is False and (level is None or float(level) < 0):
        yield "level", "a threshold >= 0, as there is no feed-forward", None if level is None else float(level)


_SELECTOR = check.record(
    {
        "steps": check.whole(),
        "activation_rate": check.maybe(check.SHARE),
        "threshold": check.maybe(_positive_scalar),
        "controller": check.record(
            {
                "activation_rate_ema": check.maybe(check.SHARE),
                "integral": check.number(),
                "level": check.maybe(_scalar),
            },
            {
                "feedforward": check.choice(True, False),
                "integral_limit": check.number(0, infinite=True),
                "held_ema": check.maybe(check.SHARE),
            },
            _has_a_threshold,
        ),
    },
    {"coverage": check.maybe(check.SHARE), "expected_rate": check.maybe(check.SHARE)},
    _rate_is_known,
)


def _counts_fit(totals: dict[str, Any]) -> Faults:
    offered = totals["offered"]
    selected = totals["selected"]
    bounds = {
        "offered": (0, totals["steps"] * _LARGEST_BATCH, "2**31 samples a step"),
        "selected": (0, offered, f"offered = {offered}"),
        "forwarded": (selected, offered + selected, f"offered + selected = {offered + selected}"),
        "backwarded": (selected * (1 - _ROUNDING), offered * (1 + _ROUNDING), f"offered = {offered}"),
        "timed_offered": (0, offered, f"offered = {offered}"),
        "joules_offered": (0, offered, f"offered = {offered}"),
        "dense_steps": (0, totals["steps"], f"steps = {totals['steps']}"),
    }
    for name, (low, high, words) in bounds.items():
        if name not in totals:
            continue
        if totals[name] < low:
            yield name, f"at least selected = {selected}", totals[name]
        if totals[name] > high:
            yield name, f"at most {words}", totals[name]


_LEDGER = check.record(
    {
        "flops": check.maybe(
            check.record({"forward": check.number(0, _MOST_FLOPS), "backward": check.number(0, _MOST_FLOPS)})
        ),
        "stages": check.mapping(
            _stage,
            check.record(
                {
                    **dict.fromkeys(["steps", "offered", "selected", "forwarded"], check.whole()),
                    "backwarded": check.number(0),
                    "timed_seconds": check.SECONDS,
                    "timed_offered": check.whole(),
                    "joules": check.JOULES,
                    "joules_offered": check.whole(),
                },
                {"dense_steps": check.whole()},
                _counts_fit,
            ),
        ),
    }
)


def _quarantine_fits(state: dict[str, Any]) -> Faults:
    epochs = state["samples"][:, 0]
    if state["count"] > state["offered"]:
        yield "count", f"at most offered = {state['offered']}", state["count"]
    if state["count"] > 0 and not len(epochs):
        yield "count", "0 where no sample is named", state["count"]
    if len(epochs) and int(epochs.max()) > state["epoch"]:
        yield "epoch", f"at least that of its samples, {int(epochs.max())}", state["epoch"]


_QUARANTINE = check.record(
    {
        "samples": check.tensor(
            torch.int64,
            shape=(None, 4),
            values="an epoch and a batch >= 0, a position and an index >= -1",
            allowed=lambda v: v >= v.new_tensor([0, 0, -1, -1]),
        ),
        "epoch": check.whole(),
        "count": check.whole(),
        "offered": check.whole(),
    },
    None,
    _quarantine_fits,
)


def _data_fits(state: dict[str, Any]) -> Faults:
    data = state["data"]
    sizes = data["batch size"]
    lengths = data["data set length"]
    if len(sizes) != len(lengths):
        yield "data.data set length", f"a length for each of {len(sizes)} loaders", lengths
    yield from one_for_each(state["random"], data["number of processes"])


_RESUMPTION = check.record(
    {
        "data": check.record(
            {
                "batch size": check.listing(check.maybe(check.whole(1))),
                "data set length": check.listing(check.maybe(check.whole())),
                "number of processes": check.whole(1),
            }
        ),
        "reloaded": check.maybe(check.whole()),
        "random": RANDOM_STATES,
    },
    RELOADS,
    _data_fits,
)


def _parts_fit(state: dict[str, Any]) -> Faults:
    mode = state["rule"]["mode"]
    place = "epochs" if MODE_FACTS[mode].plans_epochs else "resumption"
    if place not in state:
        yield place, f"a dict, as rule.mode is {mode!r}", None
    offered = sum(totals["offered"] for totals in state["ledger"]["stages"].values())
    if state["quarantine"]["offered"] > offered:
        yield "quarantine.offered", f"at most the ledger's {offered}", state["quarantine"]["offered"]
    for number, part in enumerate(state.get("parts", ())):
        for name, expected, got in part_faults(state.get("epochs"), part):
            yield f"parts[{number}].{name}", expected, got


SELECTION_STATE = StateFormat(
    1,
    check.record(
        {
            "fit": check.text(),
            "rule": check.record(
                {
                    "mode": check.choice(*get_args(Mode)),
                    "gate": check.choice(*get_args(GateName)),
                    "significance": check.choice("gradient", *SIGNIFICANCE, "callable"),
                },
                {"target": check.choice("activation rate", "coverage")},
            ),
            "selector": _SELECTOR,
            "ledger": _LEDGER,
            "quarantine": _QUARANTINE,
        },
        {"resumption": _RESUMPTION, "epochs": EPOCHS, "parts": PARTS, "target": TARGET},
        _parts_fit,
    ),
)
