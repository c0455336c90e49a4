"""Adaptive Sparse Training in plain PyTorch: one file per step that a batch takes, in this order.

``batch`` (``rows``, ``containers``, ``listing``; ``quarantine``, ``replacement``)
-> ``dependence`` (``perturbed``, ``shadows``, ``shadow_ops``, ``shadow_run``, ``records``, ``profiles``)
-> ``layout`` -> ``entries`` -> ``gradient_gate`` (``plain_loop``) -> ``gate`` and ``controller`` (``selector``)
-> ``partial`` -> ``ledger``. Scores that are made of losses: ``losses`` (``loss_calls``, ``loss_sum``) ->
``significance``. In ``prune`` the epoch comes first: ``history`` decides what is loaded.
"""

from lightning_ast.core.batch.samples import batch_size_of, select_batch
from lightning_ast.core.controller import PIController
from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import EntryFinder
from lightning_ast.core.execution import cost_share
from lightning_ast.core.gate import Selection, keep_probability, select, solve_threshold
from lightning_ast.core.gradient_gate import BatchGate, Kept
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch, planned_count
from lightning_ast.core.ledger import FlopsPerSample, Ledger, estimated_energy_savings
from lightning_ast.core.losses.capture import LossCapture, LossRecord
from lightning_ast.core.partial import BackwardFlops, RowGradient, RowOps, densify, keep_rows, select_rows
from lightning_ast.core.plain_loop import GradientGate
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import compute_significance
from lightning_ast.core.traceless_forward import TracelessForward
from lightning_ast.errors import BatchError, EntryError, LossCaptureError

__all__ = [
    "BackwardFlops",
    "BatchError",
    "BatchGate",
    "EntryError",
    "EntryFinder",
    "EpochPlan",
    "FlopsPerSample",
    "GradientGate",
    "Kept",
    "Ledger",
    "LossCapture",
    "LossCaptureError",
    "LossRecord",
    "PIController",
    "RowGradient",
    "RowOps",
    "SampleSelector",
    "SampleTrace",
    "Selection",
    "SignificanceHistory",
    "TracelessForward",
    "batch_size_of",
    "compute_significance",
    "cost_share",
    "densify",
    "estimated_energy_savings",
    "keep_probability",
    "keep_rows",
    "plan_epoch",
    "planned_count",
    "select",
    "select_batch",
    "select_rows",
    "solve_threshold",
]
