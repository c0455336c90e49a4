"""Adaptive Sparse Training in plain PyTorch: one file per step that a batch takes, in this order.

``batch`` (``rows``, ``containers``, ``listing``; ``quarantine``, ``replacement``)
-> ``losses`` (``scoring``, ``loss_sum``) -> ``significance`` -> ``gate`` and ``controller`` (``selector``)
-> ``partial``, ``execution`` -> ``ledger``. In ``prune`` the epoch comes first: ``history`` decides what is loaded.
"""

from lightning_ast.core.batch import BatchError, batch_size_of, select_batch
from lightning_ast.core.controller import PIController
from lightning_ast.core.execution import (
    cost_share,
    denominator,
    mask_rows,
    partial_mean,
    report_full_loss,
    selected_loss,
    selected_mean,
)
from lightning_ast.core.gate import Selection, keep_probability, select, solve_threshold
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch, planned_count
from lightning_ast.core.ledger import FlopsPerSample, Ledger, estimated_energy_savings
from lightning_ast.core.losses import LossCapture, LossCaptureError, LossRecord
from lightning_ast.core.partial import BackwardFlops, RowGradient, RowOps, densify, keep_rows, select_rows
from lightning_ast.core.scoring import TracelessForward
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import compute_significance

__all__ = [
    "BackwardFlops",
    "BatchError",
    "EpochPlan",
    "FlopsPerSample",
    "Ledger",
    "LossCapture",
    "LossCaptureError",
    "LossRecord",
    "PIController",
    "RowGradient",
    "RowOps",
    "SampleSelector",
    "Selection",
    "SignificanceHistory",
    "TracelessForward",
    "batch_size_of",
    "compute_significance",
    "cost_share",
    "denominator",
    "densify",
    "estimated_energy_savings",
    "keep_probability",
    "keep_rows",
    "mask_rows",
    "partial_mean",
    "plan_epoch",
    "planned_count",
    "report_full_loss",
    "select",
    "select_batch",
    "select_rows",
    "selected_loss",
    "selected_mean",
    "solve_threshold",
]
