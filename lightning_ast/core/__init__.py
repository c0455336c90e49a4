"""Adaptive Sparse Training in plain PyTorch, as steps that a batch takes in this order.

1. ``batch``: count the samples, take some, put others in the place of those that hold NaN.
2. ``dependence``: in the first forward, follow a sample and see which rows of which tensors it changes.
3. ``entries``: find where the gradient of the loss enters the network, and which of its rows are whose.
4. ``gradient_gate``: in the backward, score each sample by the norm of its rows there. Scores that are made of losses
   come before the backward instead: ``losses`` watches torch's loss functions, ``significance`` scores.
5. ``selector``: choose samples by their scores, with the ``gate`` and the ``controller`` of its threshold.
6. ``partial``: run the rest of the backward, over all rows or over those of the selected samples.
7. ``ledger``: count what was spent and saved.

``plain_loop`` is all of it for a loop of one's own. Beside it stand ``history`` (in ``prune`` it plans an epoch before
its first batch, by ``plan_rules``; ``plan_sampler`` does so in a loop of one's own), ``traceless_forward`` (in
``subset`` it scores before the step) and ``state`` (what a checkpoint may hold). Imports point from later steps to
earlier ones, except that ``partial``, which knows of no other step, is read by ``entries`` and the gate.
"""

from lightning_ast.core.batch.samples import batch_size_of, select_batch
from lightning_ast.core.controller import PIController
from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import EntryFinder
from lightning_ast.core.gate import Selection, keep_probability, select
from lightning_ast.core.gradient_gate import BatchGate, Kept
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.ledger import FlopsPerSample, Ledger, estimated_energy_savings
from lightning_ast.core.losses.capture import LossCapture, LossRecord
from lightning_ast.core.partial.flops import BackwardFlops, RowOps
from lightning_ast.core.partial.gradient import RowGradient
from lightning_ast.core.partial.memory import densify
from lightning_ast.core.partial.selection import keep_rows, select_rows
from lightning_ast.core.plain_loop import GradientGate
from lightning_ast.core.plan_rules import PlanRules, even_count, planned_count
from lightning_ast.core.plan_sampler import SignificanceSampler
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import compute_significance
from lightning_ast.core.threshold import rate_at_coverage, solve_threshold
from lightning_ast.core.traceless_forward import TracelessForward
from lightning_ast.errors import BatchError, EntryError, LossCaptureError
from lightning_ast.mode_facts import cost_share

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
    "PlanRules",
    "RowGradient",
    "RowOps",
    "SampleSelector",
    "SampleTrace",
    "Selection",
    "SignificanceHistory",
    "SignificanceSampler",
    "TracelessForward",
    "batch_size_of",
    "compute_significance",
    "cost_share",
    "densify",
    "estimated_energy_savings",
    "even_count",
    "keep_probability",
    "keep_rows",
    "plan_epoch",
    "planned_count",
    "rate_at_coverage",
    "select",
    "select_batch",
    "select_rows",
    "solve_threshold",
]
