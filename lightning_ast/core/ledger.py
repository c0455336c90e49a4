"""Step 7 of a batch: add up what was spent, and what a dense run would have spent.

Samples are counted, FLOPs are counted once with torch's formulas and scaled, seconds and joules are measured
against the warmup stage of the same run. What cannot be known is None, never 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_ast.core.state import known_fields
from lightning_ast.mode_facts import MODE_FACTS, Mode, cost_share

__all__ = ["FlopsPerSample", "Ledger", "StageTotals", "estimated_energy_savings", "saves_too_little"]


@dataclass(frozen=True)
class FlopsPerSample:
    """Counted cost of one sample in a dense training step.

    Attributes:
        forward: The FLOPs of the forward (a multiply-add counts as 2), as torch.utils.flop_counter counts them.
        backward: The FLOPs of the backward.
    """

    forward: float
    backward: float

    @property
    def dense(self) -> float:
        """Return the FLOPs of forward and backward."""
        return self.forward + self.backward

    def of_batch(self, mode: Mode | None, *, offered: int, selected: int, dense_share: float = 0.0) -> float:
        """Return the FLOPs of one training batch, scoring included; arguments as for :meth:`Ledger.record`."""
        forwarded, backwarded = _passes(mode, offered, selected, dense_share)
        return forwarded * self.forward + backwarded * self.backward


def _passes(mode: Mode | None, offered: int, selected: int, dense_share: float) -> tuple[int, float]:
    if mode is None:
        return offered, offered
    forwards, backwards = MODE_FACTS[mode].passes(offered, selected, dense_share=dense_share)
    return int(forwards), backwards


def saves_too_little(mode: Mode, rate: float, *, forward: float, dense_share: float = 0.0) -> bool:
    """Decide whether a mode costs more than dense training, or saves less than a tenth of what its formula promises.

    Arguments are those of :func:`lightning_ast.core.cost_share`.
    """
    cost = cost_share(mode, rate, forward=forward, dense_share=dense_share)
    # `mask` saves nothing by design, and is never blamed for it.
    return mode != "mask" and (cost > 1 + 1e-9 or 1 - cost < 0.1 * (1 - cost_share(mode, rate)))


@dataclass
class StageTotals:
    """Counts of one stage.

    Forwards and backwards are those of one sample, scoring included. Joules are those of all processes,
    ``joules_offered`` the samples of this one meanwhile. ``dense_steps`` are batches that were trained on whole because
    a selection would have cost more than it saved.
    """

    steps: int = 0
    offered: int = 0
    selected: int = 0
    forwarded: int = 0
    backwarded: float = 0
    timed_seconds: float = 0.0
    timed_offered: int = 0
    joules: float = 0.0
    joules_offered: int = 0
    dense_steps: int = 0


@dataclass
class Ledger:
    """Samples, FLOPs, seconds and joules of a run, by stage.

    Attributes:
        flops: The counted cost of one sample, or None while it is not known.
        stages: The counts of each stage.

    Example:
        >>> ledger = Ledger(flops=FlopsPerSample(forward=1.0, backward=2.0))
        >>> ledger.record("sparse", mode="subset", offered=100, selected=40)
        >>> ledger.savings()["samples"], round(ledger.savings()["flops"], 3)
        (0.6, 0.267)
    """

    flops: FlopsPerSample | None = None
    stages: dict[str, StageTotals] = field(default_factory=dict)

    def record(
        self,
        stage: str,
        *,
        mode: Mode | None,
        offered: int,
        selected: int,
        dense_share: float = 0.0,
        whole: bool = False,
    ) -> None:
        """Count one training batch.

        Args:
            stage: ``"warmup"``, ``"sparse"`` or ``"cooldown"``.
            mode: How the selection was executed (:data:`lightning_ast.mode_facts.MODE_FACTS`); None for a dense step.
            offered: The number of samples of the batch; in ``prune`` those that it stands for in a dense epoch.
            selected: The number of samples trained on.
            dense_share: The share of the backward's FLOPs that a partial backward spent on every row, in [0, 1]: ops
                without a row rule and all that lies before them.
            whole: Whether the batch was trained on whole because a selection would have cost more than it saved.

        Raises:
            ValueError: The cost of this mode is not known to the ledger.
        """
        if mode is not None and mode not in MODE_FACTS:
            raise ValueError(f"expected mode None or one of {', '.join(map(repr, MODE_FACTS))}, got {mode!r}.")
        # Forwards and backwards, not FLOPs: what a sample costs becomes known later than the first batches.
        forwarded, backwarded = _passes(mode, offered, selected, dense_share)
        totals = self.stages.setdefault(stage, StageTotals())
        totals.steps += 1
        totals.offered += offered
        totals.selected += selected
        totals.forwarded += forwarded
        totals.backwarded += backwarded
        totals.dense_steps += whole

    def record_seconds(self, stage: str, *, seconds: float, offered: int) -> None:
        """Add the wall time of a step that stands for its stage (no validation, no start-up)."""
        totals = self.stages.setdefault(stage, StageTotals())
        totals.timed_seconds += seconds
        totals.timed_offered += offered

    def record_joules(self, stage: str, *, joules: float, offered: int) -> None:
        """Add the energy of steps that stand for their stage (no validation, no start-up)."""
        totals = self.stages.setdefault(stage, StageTotals())
        totals.joules += joules
        totals.joules_offered += offered

    def forget_joules(self) -> bool:
        """Leave energy out from now on; return whether any was measured."""
        # Not what is to come alone: energy of a part of a run cannot be compared with the samples of all of it.
        known = any(totals.joules_offered for totals in self.stages.values())
        for totals in self.stages.values():
            totals.joules = 0.0
            totals.joules_offered = 0
        return known

    @property
    def offered(self) -> int:
        """Count the samples offered in the whole run."""
        return sum(totals.offered for totals in self.stages.values())

    @property
    def selected(self) -> int:
        """Count the samples trained on in the whole run."""
        return sum(totals.selected for totals in self.stages.values())

    @property
    def activation_rate(self) -> float | None:
        """Return the share selected / offered over the whole run, in [0, 1]; None before the first batch."""
        return self.selected / self.offered if self.offered else None

    def spent_flops(self) -> float | None:
        """Return the FLOPs spent on forwards (scoring included) and backwards; None where no sample's cost is known."""
        if self.flops is None:
            return None
        return sum(
            totals.forwarded * self.flops.forward + totals.backwarded * self.flops.backward
            for totals in self.stages.values()
        )

    def dense_flops(self) -> float | None:
        """Return the FLOPs of the same batches trained densely; None where a sample's cost is unknown."""
        return None if self.flops is None else self.offered * self.flops.dense

    def savings(self) -> dict[str, float | None]:
        """Return the shares saved against dense training of the same batches, over the whole run so far.

        ``samples``, ``flops``, ``seconds`` and ``joules`` are at most 1, negative where the run costs more than dense,
        and None where unknown: before the first batch; FLOPs not counted; no warmup steps to compare seconds and joules
        with, or no sparse ones measured yet; joules not measured by :class:`~lightning_ast.EnergyMonitor`.
        """
        spent = self.spent_flops()
        dense = self.dense_flops()
        rate = self.activation_rate
        return {
            "samples": None if rate is None else 1 - rate,
            "flops": None if spent is None or not dense else 1 - spent / dense,
            "seconds": self._measured({s: (t.timed_seconds, t.timed_offered) for s, t in self.stages.items()}),
            "joules": self._measured({s: (t.joules, t.joules_offered) for s, t in self.stages.items()}),
        }

    def _measured(self, costs: dict[str, tuple[float, int]]) -> float | None:
        """Compare a measured cost, ``(sum, samples)`` by stage, with that of a run which is all warmup."""
        total, samples = costs.get("warmup", (0.0, 0))
        sparse = self.stages.get("sparse", StageTotals())
        # Without a warmup there is nothing to compare with; before the first timed sparse step nothing was saved yet.
        if not total or not samples or not self.offered or (sparse.offered and not costs["sparse"][1]):
            return None
        dense = total / samples  # what a sample cost in the warmup; a cooldown without a measurement is dense too
        spent = sum(
            totals.offered * (costs[stage][0] / costs[stage][1] if costs[stage][1] else dense)
            for stage, totals in self.stages.items()
        )
        return 1 - spent / (dense * self.offered)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: primitives alone."""
        return {
            "flops": None if self.flops is None else asdict(self.flops),
            "stages": {stage: asdict(totals) for stage, totals in self.stages.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        # A later release may have added fields, which this one leaves out.
        self.flops = None if state["flops"] is None else known_fields(FlopsPerSample, state["flops"])
        self.stages = {stage: known_fields(StageTotals, totals) for stage, totals in state["stages"].items()}


def estimated_energy_savings(
    *, offered: int, selected: int, energy_per_activation: float = 1.0, energy_per_skip: float = 0.01
) -> float:
    """Estimate the share of energy saved by the original package's model: **estimated**, not measured.

    It prices a skipped sample at ``energy_per_skip``, although scoring it costs at least a forward (a third of a dense
    sample): treat the result as a share of skipped samples under another name. Source: adaptive-sparse-training 1.0,
    ``SundewAlgorithm.select_samples``.

    Args:
        offered: The number of samples offered, at least 1.
        selected: The number of samples trained on.
        energy_per_activation: The energy of a trained sample, in any unit.
        energy_per_skip: The energy of a skipped sample, in the same unit.

    Raises:
        ValueError: No sample was offered.

    Example:
        >>> round(estimated_energy_savings(offered=100, selected=40), 3)
        0.594
    """
    if offered < 1:
        raise ValueError(f"expected at least one sample offered, got {offered}.")
    actual = selected * energy_per_activation + (offered - selected) * energy_per_skip
    return 1 - actual / (offered * energy_per_activation)
