"""The torchmetrics of a module while a step is run that must leave no trace in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_ast.core.batch.containers import leaves_of
from lightning_ast.lightning_internals.class_patch import put_on

__all__ = ["StillMetrics", "state_of"]

_ANSWERS = ("forward", "compute")
_BESIDE = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced")
"""What torchmetrics keeps beside the states of a metric."""


class StillMetrics:
    """A hold on a module's metrics: those that the loss is computed with are restored, the others are not computed."""

    def __init__(self, module: nn.Module) -> None:
        self._metrics = [child for child in module.modules() if isinstance(child, Metric)]
        self._groups = [child for child in module.modules() if isinstance(child, MetricCollection)]
        self._in_loss: set[int] = set()  # ids: a metric's hash changes with its states
        self._is_first = True
        self._undo = ExitStack()

    def __enter__(self) -> None:
        # The first block finds out which is which: in it all are computed and restored. Later the others answer 0.
        for metric in self._metrics:
            if self._is_first or id(metric) in self._in_loss:
                self._undo.callback(metric.__dict__.update, state_of(metric))
        if self._is_first:
            for metric in self._metrics:
                for name in _ANSWERS:
                    answer = partial(self._watched, metric, getattr(metric, name))
                    self._undo.callback(put_on(metric, name, answer))
            return
        for metric in self._metrics:
            if id(metric) not in self._in_loss:
                self._silence(metric, torch.zeros(()))
        for group in self._groups:
            if not any(id(metric) in self._in_loss for metric in group.modules()):
                self._silence(group, dict.fromkeys(group.keys(), 0.0))

    def __exit__(self, *error: Any) -> None:
        self._undo.close()
        self._is_first = False

    def _watched(self, metric: Metric, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        answer = method(*args, **kwargs)
        # An answer with a graph may be a term of the loss: without it the step would compute something else.
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves_of(answer)):
            self._in_loss |= {id(part) for part in metric.modules()}
        return answer

    def _silence(self, metric: nn.Module, value: Any) -> None:
        for name in _ANSWERS:
            self._undo.callback(put_on(metric, name, lambda *_, **__: value))
        self._undo.callback(put_on(metric, "update", lambda *_, **__: None))


def state_of(metric: Metric) -> dict[str, Any]:
    """Copy the attributes of a metric that an update changes, by name."""
    names = [name for name in (*metric.metric_state, *_BESIDE) if name in metric.__dict__]
    return {name: _copy(metric.__dict__[name]) for name in names}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
