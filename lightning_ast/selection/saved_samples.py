"""Parts of a ``SparseSelectionCallback``'s state: the record of the samples, and a target that a function gives."""

from __future__ import annotations

from typing import Any

import torch

from lightning_ast.core import state as check
from lightning_ast.core.state import Faults

__all__ = ["SAMPLES", "TARGET"]


def _samples_fit(state: dict[str, Any]) -> Faults:
    size = len(state["times"])
    for name, values in (("labels", state["labels"]), *((f"epochs.{e}", v) for e, v in state["epochs"].items())):
        if values is not None and len(values) != size:
            yield name, f"as many as times, {size}", values


SAMPLES = check.record(
    {
        "times": check.tensor(torch.int32, shape=(None,), values="counts >= 0", allowed=lambda v: v >= 0),
        "labels": check.maybe(
            check.tensor(torch.int32, shape=(None,), values="classes >= -1", allowed=lambda v: v >= -1)
        ),
        "epochs": check.mapping(
            check.whole(),
            check.tensor(
                torch.bfloat16,
                shape=(None,),
                values="a significance >= 0, or -1",
                allowed=lambda v: (v >= 0) | (v == -1),
            ),
        ),
        "epoch": check.whole(),
        "keeps_epochs": check.whole(),
    },
    None,
    _samples_fit,
)

TARGET = check.record(
    {
        "epoch": check.maybe(check.whole()),
        "value": check.number(1e-12, 1),
        "metrics": check.mapping(check.text(), check.number(nan=True, infinite=True)),
    }
)
