"""The words of the monitor: the line of an epoch, the time that is left, the closing summary. Numbers in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_ast.core.ledger import Ledger
from lightning_ast.mode_facts import MODE_FACTS, Mode
from lightning_ast.schedule import Stage
from lightning_ast.words import counted

__all__ = [
    "RunSummary",
    "best_flops_savings",
    "format_epoch",
    "format_seconds",
    "format_summary",
    "milestones",
    "seconds_left",
]

_SHARES = (0.9, 0.95, 0.99)


def format_seconds(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, the two largest that are not zero: ``2h 03m``."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def format_epoch(
    epoch: int,
    max_epochs: int | None,
    *,
    loss: float | None,
    accuracy: float | None,
    activation_rate: float,
    flops_savings: float | None = None,
    joules: float | None = None,
    eta_seconds: float | None = None,
    details: Sequence[str] = (),
) -> str:
    """Format one line for a finished epoch; what is not known is left out."""
    fields = [f"Epoch {epoch}" if max_epochs is None else f"Epoch {epoch}/{max_epochs - 1}"]
    if loss is not None:
        fields.append(f"Loss: {loss:.4f}")
    if accuracy is not None:
        fields.append(f"Val Acc: {accuracy:.2%}")
    fields += [f"Act: {activation_rate:.1%}", f"Skipped: {1 - activation_rate:.1%}"]
    if flops_savings is not None:
        fields.append(f"FLOPs saved: {flops_savings:.1%}")
    if joules is not None:
        fields.append(f"Energy: {_format_joules(joules)}")
    fields += details
    if eta_seconds is not None:
        fields.append(f"ETA: {format_seconds(eta_seconds)}")
    return " | ".join(fields)


def seconds_left(taken: Mapping[Stage, Sequence[float]], stages_left: Sequence[Stage]) -> float | None:
    """Estimate the seconds until the end of the run: an epoch takes the mean of its stage's epochs so far."""
    means = {stage: sum(each) / len(each) for stage, each in taken.items() if each}
    if not means:
        return None
    latest = list(means.values())[-1]
    return sum(means.get(stage, latest) for stage in stages_left)


def best_flops_savings(ledger: Ledger, mode: Mode) -> float | None:
    """Return the share of FLOPs that the mode could have saved at the run's rates, if counted, with no dense op."""
    if ledger.flops is None or not ledger.offered:
        return None
    spares = MODE_FACTS[mode].spares_backward
    spent = 0.0
    for stage, totals in ledger.stages.items():
        forwards = totals.forwarded if stage == "sparse" else totals.offered
        backwards = totals.selected if stage == "sparse" and spares else totals.offered
        spent += forwards * ledger.flops.forward + backwards * ledger.flops.backward
    return 1 - spent / (ledger.offered * ledger.flops.dense)


@dataclass(frozen=True)
class RunSummary:
    """The facts of a finished run; None is what is not known. Shares are in [0, 1]."""

    epochs: int
    seconds: float  # wall time, validation included
    accuracies: Mapping[int, float] = field(default_factory=dict)  # of the epochs that had a validation
    converges: bool = False  # whether to show how soon the best accuracy was near
    last_details: Sequence[str] = ()  # what the last epoch's line had beyond the usual
    mode: Mode | None = None  # None in a plain run
    activation_rate: float | None = None
    sparse_rate: float | None = None  # the same of the sparse stage alone
    target: float | None = None
    holds: Literal["rate", "coverage"] = "rate"  # what the target is one of
    savings: Mapping[str, float | None] = field(default_factory=dict)  # by what was saved
    best_savings: float | None = None  # the share of FLOPs that the mode could have saved
    sections: Mapping[str, float] = field(default_factory=dict)  # seconds, of all epochs
    joules: float | None = None
    measured: Sequence[str] = ()  # the hardware that the joules are of
    quarantined: int = 0
    monitoring_seconds: float = 0.0
    closing_seconds: float = 0.0  # for pictures at the end


def format_summary(run: RunSummary) -> str:
    """Format the closing summary, several lines; what is not known is left out."""
    head = f"lightning-ast: {counted(run.epochs, 'epoch')} in {format_seconds(run.seconds)}"
    accuracies = run.accuracies
    if accuracies:
        top = max(accuracies, key=lambda epoch: accuracies[epoch])
        head += f" | Val Acc: {list(accuracies.values())[-1]:.2%}, best {accuracies[top]:.2%} in epoch {top}"
    lines = [head]
    if run.converges and accuracies:
        reached = [f"{share:.0%} of the best in epoch {epoch}" for share, epoch in milestones(accuracies).items()]
        lines.append(_row("convergence", " | ".join(reached)))
    if run.last_details:
        lines.append(_row("last epoch", " | ".join(run.last_details)))
    if run.mode is not None and run.activation_rate is not None:
        rate = f"{run.activation_rate:.1%} of all samples"
        if run.sparse_rate is not None:
            target = f"{'target coverage' if run.holds == 'coverage' else 'target'} {run.target:.1%}"
            rate += f", {run.sparse_rate:.1%} in the sparse stage ({target})"
        lines.append(_row("activation", rate))
        names = {"flops": "FLOPs", "seconds": "seconds", "joules": "joules"}
        saved = [f"{names[name]} {_share(share)}" for name, share in run.savings.items() if name in names]
        best = "" if run.best_savings is None else f" (mode={run.mode!r} at best: FLOPs {run.best_savings:.1%})"
        lines.append(_row("saved", " | ".join(saved) + best))
        lines.append(_row("skipped", f"samples {_share(run.savings.get('samples'))}"))
    parts = [f"{name.replace('_', ' ')} {each / run.seconds:.0%}" for name, each in run.sections.items() if run.seconds]
    share = run.monitoring_seconds / run.seconds if run.seconds else 0.0
    parts.append(f"monitoring {share:.2%}")
    if run.closing_seconds >= 0.05:
        parts.append(f"pictures at the end {format_seconds(run.closing_seconds)}")
    lines.append(_row("time", " | ".join(parts)))
    if run.joules is not None:
        lines.append(_row("energy", f"{_format_joules(run.joules)} ({', '.join(run.measured)})"))
    if run.quarantined:
        verb = "is" if run.quarantined == 1 else "are"
        lines.append(_row("quarantined", f"{counted(run.quarantined, 'sample')} that {verb} not finite"))
    return "\n".join(lines)


def milestones(accuracies: Mapping[int, float]) -> dict[float, int]:
    """Return the first epochs in which 90, 95 and 99 % of the best accuracy were reached."""
    best = max(accuracies.values())
    return {share: min(e for e, reached in accuracies.items() if reached >= share * best) for share in _SHARES}


def _row(name: str, text: str) -> str:
    return f"  {name:<12} {text}"


def _share(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"


def _format_joules(joules: float) -> str:
    for factor, unit in ((1e6, "MJ"), (1e3, "kJ")):
        if joules >= factor:
            return f"{joules / factor:.3g} {unit}"
    return f"{joules:.3g} J"
