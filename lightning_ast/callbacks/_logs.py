"""What the selection callback writes: scalars for the loggers and the progress bar, notes for the person."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ast.callbacks._measure import DenseOps
from lightning_ast.callbacks.two_stage import STAGE_CODES, Stage
from lightning_ast.core.execution import Mode
from lightning_ast.core.gate import Selection
from lightning_ast.core.ledger import FlopsPerSample, saves_too_little, step_cost
from lightning_ast.core.losses import LossRecord
from lightning_ast.core.selector import SampleSelector
from lightning_ast.mixin import SparseLossMixin

if TYPE_CHECKING:
    from lightning_ast.callbacks._fit import SparseFit

__all__ = [
    "log_step",
    "note_compiled",
    "note_dense_ops",
    "note_first_selection",
    "note_poor_savings",
    "note_score",
    "note_unused_methods",
    "wants_log",
]


def wants_log(trainer: pl.Trainer, batch_idx: int, stage: Stage) -> bool:
    """Whether a step is logged: where the loggers write, at the start of each epoch, and where a sparse one ends."""
    first_or_last = batch_idx == 0 or (stage == "sparse" and trainer.is_last_batch)
    return first_or_last or trainer._logger_connector.should_update_logs


def log_step(module: pl.LightningModule, fit: SparseFit) -> None:
    """Log the step under the ``ast/`` names, activation and savings in the progress bar; leave out what is unknown.

    Host tensors for what the host knows: a number would be copied to the device, and waited for. The values are those
    of this process.

    Args:
        module: its ``log_dict`` is called.
        fit: what it did so far.
    """
    savings, selector, activation_rate = fit.ledger.savings(), fit.selector, fit.activation_rate
    values: dict[str, float | None] = {
        "ast/activation_rate": activation_rate,
        "ast/activation_rate_ema": selector.controller.activation_rate_ema,
        "ast/target_activation_rate": selector.target_activation_rate if fit.stage == "sparse" else 1.0,
        "ast/stage": float(STAGE_CODES[fit.stage]),
        "ast/quarantined": float(fit.quarantine.count) if fit.quarantine.samples else None,
        **{f"ast/savings_{name}": savings[name] for name in ("samples", "flops", "seconds")},  # joules: EnergyMonitor
    }
    logged = {name: torch.tensor(value) for name, value in values.items() if value is not None}
    if fit.stage == "sparse" and selector.last_threshold is not None:
        logged["ast/threshold"] = selector.last_threshold.float()
    module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)
    bar = {"act": activation_rate, "save": savings["samples"] if savings["flops"] is None else savings["flops"]}
    shown = {name: torch.tensor(value) for name, value in bar.items() if value is not None}
    module.log_dict(shown, on_step=True, on_epoch=False, batch_size=1, prog_bar=True, logger=False)


def note_score(record: LossRecord | None, *, el2n: bool) -> None:
    """Say where the loss stands in for EL2N.

    Args:
        record: what the first loss was computed from, where that is known.
        el2n: whether EL2N is the score.
    """
    if el2n and (record is None or record.kind == "regression"):
        name = "an explicit per_sample_loss" if record is None else record.name
        rank_zero_info(f"lightning-ast: EL2N is not defined for {name}: the loss itself is the significance.")


def note_first_selection(selector: SampleSelector, *, batch_size: int, selection: Selection) -> None:
    """Say that the fewest samples allowed are more than the target.

    Args:
        selector: the rule.
        batch_size: of the first sparse batch.
        selection: of the first sparse batch.
    """
    target, least = selector.target_activation_rate, selector.least(batch_size)
    if least > target * batch_size and selection.indices.numel() == least:
        rank_zero_warn(
            f"lightning-ast: min_selected keeps {least} of {batch_size} samples, so the activation rate cannot fall to "
            f"its target of {target:g}: use larger batches or a smaller min_selected."
        )


def note_dense_ops(dense_ops: DenseOps, told: set[str]) -> None:
    """Say once of each backward op of ``partial`` that it ran over the whole batch, and what that cost.

    Args:
        dense_ops: of a sparse batch.
        told: names that were said; new ones are added.
    """
    if not dense_ops.settled or dense_ops.calls.keys() <= told:
        return
    told.update(dense_ops.calls)
    names = ", ".join(f"{name} (x{calls})" for name, calls in dense_ops.calls.most_common())
    cost = "their cost was not counted"
    if dense_ops.share is not None:
        cost = f"{dense_ops.share:.0%} of the backward's FLOPs are spent on every sample"
    rank_zero_warn(
        "lightning-ast: in mode='partial' these backward operations ran over the whole batch, and so did all that "
        f"lies before them: {names}; {cost}. Gradients are exact; if the share is large, mode='subset' saves more."
    )


def note_poor_savings(mode: Mode, flops: FlopsPerSample, *, rate: float) -> None:
    """Warn where this mode saves next to nothing with this module, and say which would.

    Args:
        mode: How selections are executed.
        flops: The counted cost of a sample.
        rate: The target activation rate.
    """
    forward = flops.forward / flops.dense
    if not saves_too_little(mode, rate, forward=forward):
        return
    cost = functools.partial(step_cost, rate=rate, forward=forward)
    others: list[Mode] = ["prune", "partial"] if mode == "subset" and cost("partial") < 0.95 else ["prune"]
    alternatives = " and ".join(f"mode={other!r} would cost {cost(other):.0%}" for other in others)
    promised = step_cost(mode, rate)
    reason = "scoring all samples takes more than it spares at so high a rate"
    if promised <= 1:
        reason = f"the forward is {forward:.0%} of a dense step, as with frozen layers or a teacher"
    rank_zero_warn(
        f"lightning-ast: mode={mode!r} at an activation rate of {rate:.0%} costs {cost(mode):.1%} of the FLOPs of "
        f"dense training, as counted in this run ({promised:.0%} where all parameters are trained): {reason}. "
        f"{alternatives}."
    )


def note_unused_methods(module: pl.LightningModule) -> None:
    """Say that methods of the mixin's names are not called on a module without the mixin."""
    names = [name for name in ("count_samples", "sample_indices", "select_batch") if hasattr(type(module), name)]
    if names and not isinstance(module, SparseLossMixin):
        rank_zero_warn(
            f"lightning-ast: {type(module).__name__} defines {', '.join(names)}, which SparseSelectionCallback calls "
            "on a SparseLossMixin alone: list it before LightningModule, if they are meant for it."
        )


def note_compiled() -> None:
    """Say before the first batch that compiled regions gain nothing from ``partial``."""
    rank_zero_warn(
        "lightning-ast: a part of the module is compiled with torch.compile. mode='partial' is exact there, but runs "
        "the compiled region's whole backward: use mode='subset', or leave the network uncompiled."
    )
