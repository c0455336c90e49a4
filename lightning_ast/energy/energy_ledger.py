"""The joules that the meters of all processes counted, by what was done meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ast.energy.meters import EnergyKind, EnergyMeter, find_meters
from lightning_ast.errors import EnergyUnavailableError
from lightning_ast.lightning_internals.distributed import Processes

__all__ = ["Activity", "EnergyBook"]

Activity = Literal["warmup", "sparse", "cooldown", "settling", "validation"]
"""A stage's steps that stand for it; those that do not, and what lies between epochs; validation."""

_ACTIVITIES: tuple[Activity, ...] = get_args(Activity)
_KINDS: tuple[EnergyKind, ...] = get_args(EnergyKind)
_MARGIN = 0.5


class EnergyBook:
    """A book of joules: each activity has what the meters, by default the machine's, counted while it went on."""

    def __init__(self, meters: Sequence[EnergyMeter] | None, device: torch.device, processes: Processes) -> None:
        found, missing = find_meters(device) if meters is None else (list(meters), [])
        if missing and not found:
            rank_zero_info(f"lightning-ast: energy is not measured: {'; '.join(missing)}.")
        # hardware that processes share (a machine's CPUs) is counted by the first of them alone
        earlier = processes.gathered([meter.identity for meter in found])[: processes.rank]
        taken = {identity for identities in earlier for identity in identities}
        self._meters = [meter for meter in found if meter.identity not in taken]
        self._kinds: set[EnergyKind] = {meter.kind for meter in found}
        self._processes = processes
        self.names = [meter.name for meter in self._meters]
        # what all processes measure: a resumed run that measures other hardware cannot go on with the old joules
        self.measured = sorted(name for names in processes.gathered(self.names) for name in names)
        self._longest = min((meter.longest_interval_seconds for meter in found), default=math.inf) * _MARGIN
        self._joules: dict[tuple[EnergyKind, Activity], float] = {}
        self.offered: dict[Activity, int] = {}  # samples in this process since the last close
        self._last: dict[int, float] = {}
        self._last_offered = 0
        self._read_at = -math.inf
        self._running: Activity = "settling"

    @property
    def due(self) -> bool:
        """Tell whether a counter would soon come round to zero."""
        return time.monotonic() - self._read_at > self._longest

    def begin(self, offered: int) -> None:
        """Count from now on; ``offered`` as in :meth:`read`."""
        self._last.clear()  # what the counters showed before is of no interest: the first reading is the start
        self._last_offered = offered
        self.read("settling", offered=offered)

    def read(self, then: Activity | None = None, *, offered: int) -> None:
        """Attribute what was counted to what went on, and begin ``then``; ``offered`` counts the samples so far."""
        self._read_at = time.monotonic()
        for position, meter in enumerate(self._meters):
            key = (meter.kind, self._running)
            try:
                now = float(meter.read_joules())
                if not math.isfinite(now):
                    raise EnergyUnavailableError(f"{meter.name} reads {now} joules")
                if now < self._last.get(position, now):
                    # it began anew: what it had counted until then is not known
                    raise EnergyUnavailableError(f"{meter.name} fell from {self._last[position]} to {now} joules")
            except Exception as error:  # a meter may be anybody's; whatever it does, training goes on
                if meter.kind in self._kinds:
                    expected = isinstance(error, EnergyUnavailableError)
                    reason = str(error) if expected else f"{type(error).__name__}: {error}"
                    rank_zero_warn(f"lightning-ast: energy is no longer measured: {reason}.")
                    self._kinds.discard(meter.kind)
                now = math.nan
            spent = now - self._last.get(position, now)
            self._joules[key] = self._joules.get(key, 0.0) + spent
            self._last[position] = now
        self.offered[self._running] = self.offered.get(self._running, 0) + offered - self._last_offered
        self._last_offered = offered
        self._running = self._running if then is None else then

    def close(self) -> dict[EnergyKind, dict[Activity, float]]:
        """Sum the joules of all processes, by kind and activity, and begin anew; every process must call it."""
        unknown = {kind: 0.0 if kind in self._kinds else math.nan for kind in _KINDS}
        rows = [[unknown[k] + self._joules.get((k, a), 0.0) for a in _ACTIVITIES] for k in _KINDS]
        # NaN marks what one process cannot measure, and stays NaN in the mean: all leave the same kinds out
        total = self._processes.mean(torch.tensor(rows, dtype=torch.float64)) * self._processes.count
        self._joules.clear()
        return {
            kind: dict(zip(_ACTIVITIES, row, strict=True))
            for kind, row in zip(_KINDS, total.tolist(), strict=True)
            if not any(math.isnan(joules) for joules in row)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what all processes counted and did not close; each of them must ask, unless the run fails."""
        own = {f"{kind}/{activity}": joules for (kind, activity), joules in self._joules.items()}
        each = [own] if self._processes.failing else self._processes.gathered(own)
        return {
            "joules": {key: sum(others.get(key, 0.0) for others in each) for others in each for key in others},
            "offered": {str(activity): samples for activity, samples in self.offered.items()},
            "meters": self.measured,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from a state."""
        # the saved joules are those of all processes: each adding them would multiply them
        known = state["joules"] if self._processes.rank == 0 else {}
        keys = [(kind, activity) for kind in _KINDS for activity in _ACTIVITIES]
        self._joules = {key: known["/".join(key)] for key in keys if "/".join(key) in known}
        self.offered = {activity: int(state["offered"].get(activity, 0)) for activity in _ACTIVITIES}
