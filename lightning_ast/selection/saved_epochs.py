"""The epochs of mode ``prune`` in a checkpoint, field by field."""

from __future__ import annotations

from typing import Any, get_args

import torch

from lightning_ast.core import state as check
from lightning_ast.core.gate import Weighting
from lightning_ast.core.state import Faults
from lightning_ast.lightning_internals.random_state import GENERATOR_STATE, RANDOM_STATES, one_for_each
from lightning_ast.mode_facts import PruneSteps
from lightning_ast.schedule import Stage
from lightning_ast.selection.saved_samples import SAMPLES

__all__ = ["EPOCHS", "PARTS", "RELOADS", "part_faults"]

_flag = check.choice(0, 1)
RELOADS = {"validation_reloaded": check.maybe(check.whole())}


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
    # Each part is planned by one process alone.
    processes = 1 if state["split"].get("own_parts") else state["split"]["processes"]
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
    # A stream ends with a short batch of each worker: how many there will be is not known.
    if "trained" not in state and (batches > most or (sparse and batches < most and not state.get("spread"))):
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


# Where each process has a part of the data set of its own, these fields are of one part.
_OF_PART = {
    "history": check.maybe(check.record({"scores": _scores, "recent": _scores}, {"is_foreign": _flag}, _history_fits)),
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
    "lengths": check.positional(check.whole(), check.whole()),
    "drained": check.listing(GENERATOR_STATE),
    "generators": check.listing(GENERATOR_STATE),
}
_LATER_OF_PART = {
    "sizes": check.maybe(_sizes),
    "trained": check.tensor(torch.bool, shape=(None,)),
    "samples": check.maybe(SAMPLES),
}

EPOCHS = check.record(
    {
        **_OF_PART,
        "stage": check.choice(*get_args(Stage)),
        "sparse": _flag,
        "split": check.maybe(
            check.record(
                {
                    "batch_size": check.whole(1),
                    "drop_last": _flag,
                    "processes": check.whole(1),
                    "weighting": check.maybe(check.choice(*get_args(Weighting))),
                },
                {"sample_filter": _flag, "own_parts": check.whole()},
            )
        ),
        "reloaded": check.maybe(check.whole()),
        "random": RANDOM_STATES,
    },
    {
        **RELOADS,
        **_LATER_OF_PART,
        "spread": _flag,
        "steps": check.choice(*get_args(PruneSteps)),
    },
    _epoch_fits,
    _record_fits,
)

PARTS = check.listing(check.maybe(check.record(_OF_PART, _LATER_OF_PART)))


def part_faults(epochs: dict[str, Any] | None, part: dict[str, Any] | None) -> Faults:
    """Find what does not fit together in the part of a process; the others' are None where a process kept its own."""
    if epochs is not None and part is not None:
        yield from _epoch_fits({**epochs, **part})
        yield from _record_fits({**epochs, **part})
