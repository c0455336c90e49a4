"""Compare the runs of a place on the regime map: means over seeds, and paired differences to dense training."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regime_run import Regime

__all__ = [
    "LEAST_SEEDS",
    "NO_LOSS",
    "Paired",
    "Setting",
    "by_place",
    "by_setting",
    "compared",
    "load_regimes",
    "paired",
]

LEAST_SEEDS = 3
"""Nothing is claimed from fewer runs: a single one scatters by 0.2 to 0.4 points."""

NO_LOSS = 0.1
"""The points of accuracy that count as no loss."""

Record = dict[str, Any]

Key = tuple[int, str]
"""The seed of a run, and the hardware that it ran on, with a mark where the run had a GPU for itself."""


def load_regimes(folder: Path) -> list[Record]:
    """Read all records of the regime map, in the order of their names, those of GPUs (in ``<folder>-gpu...``) last.

    A run that another card made too, or that was made once more alone on its GPU, has a folder of its own for that.
    """
    folders = (folder, *sorted(folder.parent.glob(f"{folder.name}-gpu*")))
    return [json.loads(path.read_text()) for each in folders for path in sorted(each.glob("*.json"))]


def _on_cpu(record: Record) -> bool:
    return str(record["hardware"]).startswith("CPU")


def _alone(record: Record) -> bool:
    """Tell whether a run had a GPU for itself."""
    return not _on_cpu(record) and record["runs_at_once"] == 1


_EVEN_LOAD = "NVIDIA H100"
"""The card on which all runs that shared it were of one kind: on the other one, times depend on who ran beside."""


def _shared(record: Record) -> bool:
    """Tell whether a run shared its GPU with others of its kind."""
    return record["runs_at_once"] > 1 and str(record["hardware"]).startswith(_EVEN_LOAD)


def _hours(record: Record) -> tuple[str, int, str, str]:
    """Tell when and where a run was made: times of the same hours, on the same machine, can be compared."""
    return record["hardware"], record["runs_at_once"], record["date"], record["commit"].removesuffix("+changes")


@dataclass(frozen=True)
class Paired:
    """The difference of two settings over the same seeds, in points of accuracy.

    Attributes:
        mean: The mean difference.
        standard_error: The standard error of the mean.
        p_value: The two-sided p-value of Student's paired test.
        runs: The number of pairs.
    """

    mean: float
    standard_error: float
    p_value: float
    runs: int

    @property
    def is_no_loss(self) -> bool:
        """Tell whether the mean is no worse than what counts as no loss."""
        return round(self.mean, 3) >= -NO_LOSS

    def is_below(self, points: float) -> bool:
        """Tell whether the difference is below some points beyond chance: Student's one-sided test, p < 0.05."""
        if self.mean >= points or self.standard_error == 0:
            return self.mean < points
        return _tail((points - self.mean) / self.standard_error, self.runs) < 0.05


def _tail(errors: float, runs: int) -> float:
    """Return the probability that chance puts the mean of some pairs so many standard errors above the true one."""
    from scipy.stats import t

    return float(t.sf(errors, runs - 1))


def paired(differences: Sequence[float]) -> Paired | None:
    """Summarise paired differences; None for fewer than three, from which nothing is claimed.

    Example:
        >>> found = paired([-0.1, -0.3, -0.2])
        >>> round(found.mean, 3), round(found.standard_error, 3), round(found.p_value, 3)
        (-0.2, 0.058, 0.074)
    """
    if len(differences) < LEAST_SEEDS:
        return None
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return Paired(mean, 0.0, 1.0 if mean == 0 else 0.0, len(differences))
    return Paired(mean, error, 2 * _tail(abs(mean) / error, len(differences)), len(differences))


def compared(ours: Mapping[Key, Record], others: Mapping[Key, Record]) -> Paired | None:
    """Compare the accuracies of runs with the same seeds on the same hardware; None for fewer than three seeds.

    A seed that two machines have run counts once, with the mean of both differences.
    """
    by_seed: dict[int, list[float]] = {}
    for key in ours:
        if key in others:
            by_seed.setdefault(key[0], []).append(100 * (ours[key]["accuracy"] - others[key]["accuracy"]))
    return paired([statistics.mean(differences) for differences in by_seed.values()])


@dataclass(frozen=True)
class Setting:
    """The runs of one policy with one group of settings, at one place of the map.

    Attributes:
        runs: The records by seed and hardware: two machines that have recorded a seed have made two runs.
        dense: The records of the dense runs of that place, likewise.
    """

    runs: dict[Key, Record]
    dense: dict[Key, Record]

    @property
    def first(self) -> Record:
        """Return one of the records, for what all have in common."""
        return next(iter(self.runs.values()))

    @property
    def seeds(self) -> int:
        """Count the seeds."""
        return len({seed for seed, _ in self.runs})

    @property
    def accuracies(self) -> list[float]:
        """Return the final accuracies in percent, by seed."""
        return [100 * run["accuracy"] for run in self.runs.values()]

    @property
    def difference(self) -> Paired | None:
        """Compare the final accuracy with that of the dense runs of the same seeds on the same hardware."""
        return compared(self.runs, self.dense)

    @property
    def work_share(self) -> float | None:
        """Return the work as a share of the dense runs'; None where there are none."""
        if not self.dense:
            return None
        return self.mean("work_epochs") / statistics.mean(run["work_epochs"] for run in self.dense.values())

    @property
    def seconds(self) -> float | None:
        """Return the mean time of training: of runs that had a GPU for themselves, else that one CPU thread computed.

        A CPU thread is quicker on one day than on another. So its time is :attr:`cpu_time`, of which the days cancel
        out, times the mean of the dense runs. None where there is no such run.
        """
        on_gpu = [float(run["seconds"]) for run in self.runs.values() if _alone(run)]
        if on_gpu:
            return statistics.mean(on_gpu)
        share = self.cpu_time
        if share is None:
            return None
        return share * statistics.mean(run["cpu_seconds"] for run in self.dense.values() if _on_cpu(run))

    @property
    def joules(self) -> float | None:
        """Return the mean joules of the GPU in runs that had it for themselves; None where none was metered."""
        found = [float(run["joules"]) for run in self.runs.values() if _alone(run) and run.get("joules")]
        return statistics.mean(found) if found else None

    @property
    def timed_on(self) -> str:
        """Tell where :attr:`seconds` were taken."""
        alone_on_gpu = any(_alone(run) for run in self.runs.values())
        return "alone on the GPU" if alone_on_gpu else "on one CPU thread"

    @property
    def cpu_time(self) -> float | None:
        """Return the time that one CPU thread computed, as a share of that of dense runs of the same hours."""
        return self._time_share("cpu_seconds", _on_cpu)

    @property
    def shared_time(self) -> float | None:
        """Return the time as a share of that of dense runs of the same hours, among runs that shared a GPU."""
        return self._time_share("seconds", _shared)

    def _time_share(self, name: str, counts: Callable[[Record], bool]) -> float | None:
        """Return the mean of the times of runs that count over those of dense runs of the same hours; None without."""
        dense: dict[Any, list[float]] = {}
        for run in filter(counts, self.dense.values()):
            dense.setdefault(_hours(run), []).append(run[name])
        timed = [(run[name], dense.get(_hours(run))) for run in self.runs.values() if counts(run)]
        shares = [seconds / statistics.mean(beside) for seconds, beside in timed if beside]
        return statistics.mean(shares) if shares else None

    def mean(self, name: str) -> float:
        """Return the mean of a number of the records."""
        return statistics.mean(run[name] for run in self.runs.values())

    def pruned_rates(self) -> list[float]:
        """Return the mean rate of each epoch that was not trained on whole."""
        by_epoch = zip(*(run["rate_by_epoch"] for run in self.runs.values()), strict=True)
        means = [statistics.mean(rates) for rates in by_epoch]
        return [rate for rate in means if rate < 1]


def by_place(records: Iterable[Record]) -> dict[Regime, list[Record]]:
    """Group records by the place that they were made at."""
    places: dict[Regime, list[Record]] = {}
    for record in records:
        places.setdefault(Regime(**record["regime"]), []).append(record)
    return places


def by_setting(records: Sequence[Record]) -> dict[str, Setting]:
    """Group the records of one place by their setting, seeds in ascending order."""
    groups: dict[str, dict[Key, Record]] = {}
    for record in sorted(records, key=lambda record: int(record["seed"])):
        key = (int(record["seed"]), record["hardware"] + ", alone" * _alone(record))
        groups.setdefault(record["setting"], {})[key] = record
    return {name: Setting(runs, groups.get("dense", {})) for name, runs in groups.items()}
