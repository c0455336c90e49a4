"""What a ``SparseSelectionCallback`` writes into a checkpoint, field by field; read before any of it is used."""

from __future__ import annotations

from typing import Any, get_args

import torch

from lightning_ast.core import state as check
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.core.significance import SIGNIFICANCE
from lightning_ast.core.state import Faults, StateFormat
from lightning_ast.lightning_internals.random_state import GENERATOR_STATE, RANDOM_STATES, one_for_each
from lightning_ast.mode_facts import MODE_FACTS, Mode, PruneSteps
from lightning_ast.schedule import Stage
from lightning_ast.selection.saved_samples import SAMPLES, TARGET

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


_reloads = {"validation_reloaded": check.maybe(check.whole())}
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
    _reloads,
    _data_fits,
)


def _history_fits(state: dict[str, Any]) -> Faults:
    if len(state["recent"]) != len(state["scores"]):
        yield "recent", f"as many as scores, {len(state['scores'])}", state["recent"]


def _plan_fits(plan: dict[str, Any]) -> Faults:
    if plan["weights"] is not None and len(plan["weights"]) != len(plan["indices"]):
        yield "weights", f"as many as indices, {len(plan['indices'])}", plan["weights"]


def _epoch_fits(state: dict[str, Any]) -> Faults:
    sparse = state["sparse"]
    split = state["split"]
    if sparse and state["stage"] != "sparse":
        yield "stage", "'sparse', as sparse is 1", state["stage"]
    if split is not None:
        if bool(sparse) != (split["weighting"] is not None):
            yield "split.weighting", f"{'a name' if sparse else 'None'}, as sparse is {sparse}", split["weighting"]
        yield from one_for_each(state["random"], split["processes"])
    if "trained" in state and state["history"] is not None and len(state["trained"]) != len(state["history"]["scores"]):
        yield "trained", f"as many as scores, {len(state['history']['scores'])}", state["trained"]
    if state["plan"] is not None:
        for part in ("history", "split"):
            if state[part] is None:
                yield part, "a dict, as there is a plan", None
                return
        yield from _lengths_fit(state)


def _lengths_fit(state: dict[str, Any]) -> Faults:
    """Compare the plan of an epoch with the data set and with the epoch's lengths in one process."""
    plan = state["plan"]
    sparse = state["sparse"]
    processes = state["split"]["processes"]
    samples, batches = state["lengths"]
    remembered = len(state["history"]["scores"])
    planned = len(plan["indices"])
    most = -(-samples // (1 if state.get("spread") else state["split"]["batch_size"]))
    if planned and int(plan["indices"].max()) >= remembered:
        yield "plan.indices", f"indices below {remembered}", int(plan["indices"].max())
    sizes = state.get("sizes")
    if sizes is not None:
        if int(sizes.sum()) != planned or len(sizes) != processes:
            yield "sizes", f"{planned} planned samples in the batches of {processes} process(es)", sizes
        return
    if samples * processes != planned:
        yield "lengths[0]", f"a share of {planned} planned samples for {processes} process(es)", samples
    if batches > most or (sparse and batches < most and not state.get("spread")):
        yield "lengths[1]", f"{'' if sparse else 'at most '}{most} batches of {samples} samples", batches
    if sparse and planned > plan["offered"]:
        yield "plan.offered", f"at least the {planned} that are planned", plan["offered"]


_scores = check.tensor(
    torch.float32, shape=(None,), values="a significance >= 0, or -1", allowed=lambda v: (v >= 0) | (v == -1)
)
_indices = check.tensor(torch.int32, torch.int64, shape=(None,), values="indices >= 0", allowed=lambda v: v >= 0)
_weights = check.tensor(
    torch.float32, shape=(None,), values="finite weights > 0", allowed=lambda v: v.isfinite() & (v > 0)
)
_sizes = check.tensor(torch.int64, shape=(None, None), values="sizes >= 0", allowed=lambda v: v >= 0)


def _record_fits(state: dict[str, Any]) -> Faults:
    history = state["history"]
    samples = state.get("samples")
    if samples is not None and history is not None and len(samples["times"]) != len(history["scores"]):
        yield "samples.times", f"as many as history.scores, {len(history['scores'])}", samples["times"]


_EPOCHS = check.record(
    {
        "history": check.maybe(
            check.record({"scores": _scores, "recent": _scores}, {"is_foreign": _flag}, _history_fits)
        ),
        "plan": check.maybe(
            check.record(
                {
                    "epoch": check.whole(),
                    "indices": _indices,
                    "offered": check.whole(),
                    "weights": check.maybe(_weights),
                },
                None,
                _plan_fits,
            )
        ),
        "stage": _stage,
        "sparse": _flag,
        "lengths": check.positional(check.whole(), check.whole()),
        "drained": check.listing(GENERATOR_STATE),
        "split": check.maybe(
            check.record(
                {
                    "batch_size": check.whole(1),
                    "drop_last": _flag,
                    "processes": check.whole(1),
                    "weighting": check.maybe(check.choice(*get_args(Weighting))),
                },
                {"sample_filter": _flag},
            )
        ),
        "reloaded": check.maybe(check.whole()),
        "random": RANDOM_STATES,
        "generators": check.listing(GENERATOR_STATE),
    },
    {
        **_reloads,
        "spread": _flag,
        "sizes": check.maybe(_sizes),
        "steps": check.choice(*get_args(PruneSteps)),
        "trained": check.tensor(torch.bool, shape=(None,)),
        "samples": check.maybe(SAMPLES),
    },
    _epoch_fits,
    _record_fits,
)


def _parts_fit(state: dict[str, Any]) -> Faults:
    mode = state["rule"]["mode"]
    place = "epochs" if MODE_FACTS[mode].plans_epochs else "resumption"
    if place not in state:
        yield place, f"a dict, as rule.mode is {mode!r}", None
    offered = sum(totals["offered"] for totals in state["ledger"]["stages"].values())
    if state["quarantine"]["offered"] > offered:
        yield "quarantine.offered", f"at most the ledger's {offered}", state["quarantine"]["offered"]


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
        {"resumption": _RESUMPTION, "epochs": _EPOCHS, "target": TARGET},
        _parts_fit,
    ),
)
