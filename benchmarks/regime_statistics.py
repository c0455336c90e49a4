"""Compare the runs of a place on the regime map: means over seeds, and paired differences to dense training."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LEAST_SEEDS", "NO_LOSS", "Paired", "Setting", "by_setting", "load_regimes", "paired"]

LEAST_SEEDS = 3
"""Nothing is claimed from fewer runs: a single one scatters by 0.2 to 0.4 points."""

NO_LOSS = 0.1
"""The points of accuracy that count as no loss."""

Record = dict[str, Any]


def load_regimes(folder: Path) -> list[Record]:
    """Read all records of the regime map, in the order of their names, those of GPUs (in ``<folder>-gpu``) last."""
    folders = (folder, folder.with_name(f"{folder.name}-gpu"))
    return [json.loads(path.read_text()) for each in folders for path in sorted(each.glob("*.json"))]


def _on_cpu(record: Record) -> bool:
    return str(record["hardware"]).startswith("CPU")


@dataclass(frozen=True)
class Paired:
    """The difference of two settings over the same seeds, in points of accuracy.

    Attributes:
        mean: The mean difference.
        standard_error: The standard error of the mean.
        p_value: The two-sided p-value of Student's paired test.
        seeds: The number of seeds.
    """

    mean: float
    standard_error: float
    p_value: float
    seeds: int

    @property
    def is_no_loss(self) -> bool:
        """Tell whether the mean is no worse than what counts as no loss."""
        return round(self.mean, 3) >= -NO_LOSS


def paired(differences: Sequence[float]) -> Paired | None:
    """Summarise paired differences; None for fewer than three, from which nothing is claimed.

    Example:
        >>> found = paired([-0.1, -0.3, -0.2])
        >>> round(found.mean, 3), round(found.standard_error, 3), round(found.p_value, 3)
        (-0.2, 0.058, 0.074)
    """
    if len(differences) < LEAST_SEEDS:
        return None
    from scipy.stats import t

    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return Paired(mean, 0.0, 1.0 if mean == 0 else 0.0, len(differences))
    return Paired(mean, error, float(2 * t.sf(abs(mean) / error, len(differences) - 1)), len(differences))


@dataclass(frozen=True)
class Setting:
    """The runs of one policy with one group of settings, at one place of the map.

    Attributes:
        runs: The records by seed.
        dense: The records of the dense runs of that place by seed.
        timed: The records whose seconds mean something: of runs on a CPU, or that had a GPU for themselves.
    """

    runs: dict[int, Record]
    dense: dict[int, Record]
    timed: Sequence[Record] = ()

    @property
    def first(self) -> Record:
        """Return one of the records, for what all have in common."""
        return next(iter(self.runs.values()))

    @property
    def accuracies(self) -> list[float]:
        """Return the final accuracies in percent, by seed."""
        return [100 * run["accuracy"] for run in self.runs.values()]

    @property
    def difference(self) -> Paired | None:
        """Compare the final accuracy with that of dense runs of the same seeds."""
        shared = [seed for seed in self.runs if seed in self.dense]
        return paired([100 * (self.runs[seed]["accuracy"] - self.dense[seed]["accuracy"]) for seed in shared])

    @property
    def work_share(self) -> float | None:
        """Return the work as a share of the dense runs'; None where there are none."""
        if not self.dense:
            return None
        return self.mean("work_epochs") / statistics.mean(run["work_epochs"] for run in self.dense.values())

    @property
    def seconds(self) -> float | None:
        """Return the mean time of training: of its GPU, or that one CPU thread computed; None where none was timed."""
        on_gpu = [float(run["seconds"]) for run in self.timed if not _on_cpu(run)]
        on_cpu = [float(run["cpu_seconds"]) for run in self.timed if _on_cpu(run)]
        return statistics.mean(on_gpu or on_cpu) if self.timed else None

    def mean(self, name: str) -> float:
        """Return the mean of a number of the records."""
        return statistics.mean(run[name] for run in self.runs.values())

    def pruned_rates(self) -> list[float]:
        """Return the mean rate of each epoch that was not trained on whole."""
        by_epoch = zip(*(run["rate_by_epoch"] for run in self.runs.values()), strict=True)
        means = [statistics.mean(rates) for rates in by_epoch]
        return [rate for rate in means if rate < 1]


def by_setting(records: Sequence[Record]) -> dict[str, Setting]:
    """Group the records of one place by their setting, seeds in ascending order.

    The runs of a seed are compared on one machine: where two have recorded it, the one with more runs counts, of equals
    the last.
    """
    machine: dict[int, str] = {}
    for seed in sorted({int(record["seed"]) for record in records}):
        names = [str(record["hardware"]) for record in records if record["seed"] == seed]
        machine[seed] = max(dict.fromkeys(reversed(names)), key=names.count)
    groups: dict[str, dict[int, Record]] = {}
    timed: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: int(record["seed"])):
        if record["hardware"] == machine[record["seed"]]:
            groups.setdefault(record["setting"], {})[record["seed"]] = record
        if _on_cpu(record) or record["runs_at_once"] == 1:
            timed.setdefault(record["setting"], []).append(record)
    dense = groups.get("dense", {})
    return {name: Setting(runs, dense, timed.get(name, [])) for name, runs in groups.items()}
