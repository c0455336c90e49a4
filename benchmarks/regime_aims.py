"""What was aimed at beside what was reached, and ours beside each other method at no more work, for `summarize.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regime_plans import plan
from regime_run import Regime
from regime_statistics import NO_LOSS, Paired, Record, Setting, by_setting, load_regimes, paired
from regime_tables import FOLDER, difference_cell, p_cell, place_name, setting_name

__all__ = ["aims_table", "equal_work_table", "no_more_work"]

LEAST_SEEDS = 5
"""Nothing is compared here that has fewer."""

RECOMMENDED = "prune-coverage0.97-gatesoft-stepskeep"
"""The setting that README recommends."""

LARGEST_LOSS = 0.2
"""The points of accuracy that the recommended setting may lose anywhere."""

AIMS = {"fashion_mnist": 0.45, "cifar10": 0.65}
"""The work, as a share of dense, at which nothing was to be lost."""

_ROUNDING = 0.005
"""The share of the work that does not count: tables show two digits."""


def _places(folder: Path) -> dict[Regime, dict[str, Setting]]:
    """Return all settings of the headline's places that have enough seeds."""
    names = {run.name for run in plan("headline")}
    records = [record for record in load_regimes(folder) if record["name"] in names]
    found = {}
    for place in dict.fromkeys(run.regime for run in plan("headline")):
        settings = by_setting([record for record in records if Regime(**record["regime"]) == place])
        found[place] = {name: one for name, one in settings.items() if len(one.runs) >= LEAST_SEEDS}
    return {place: settings for place, settings in found.items() if "dense" in settings}


def no_more_work(settings: Sequence[Setting], share: float) -> Setting | None:
    """Return the most accurate of our settings whose work is at most a share of dense; None where there is none."""
    ours = [one for one in settings if one.first["policy"] in ("prune", "partial")]
    cheap = [one for one in ours if (one.work_share or 1.0) <= share + _ROUNDING]
    return max(cheap, key=lambda one: one.difference.mean if one.difference else -1e9, default=None)


def aims_table(folder: Path = FOLDER) -> str:
    """Make the table of what was aimed at and what was reached."""
    lines = ["| aim | reached | |", "|---|---|---|"]
    for place, settings in _places(folder).items():
        share = AIMS[place.data]
        best = no_more_work(list(settings.values()), share)
        name = place_name(place).split(",")[0]
        aim = f"{name}: at most {NO_LOSS} points below dense at {share:.2f} of its work"
        lines.append(f"| {aim} | {_reached(best, -NO_LOSS)} |")
    lines.append(_everywhere(folder))
    return "\n".join(lines)


def _reached(setting: Setting | None, least: float) -> str:
    if setting is None or setting.difference is None:
        return "- | not recorded"
    verdict = "yes" if round(setting.difference.mean, 3) >= least else "no"
    found = f"{difference_cell(setting.difference)} at {setting.work_share:.2f}, {setting_name(setting.first)}"
    return f"{verdict} | {found}"


def _everywhere(folder: Path) -> str:
    """Compare the recommended setting with dense at every place that it was recorded at."""
    records: dict[Regime, list[Record]] = {}
    for record in load_regimes(folder):
        records.setdefault(Regime(**record["regime"]), []).append(record)
    found = {}
    for place, here in records.items():
        setting = by_setting(here).get(RECOMMENDED)
        if setting is not None and setting.difference is not None:
            found[place] = setting.difference
    aim = f"At most {LARGEST_LOSS} points below dense anywhere, with the recommended coverage of 0.97"
    if not found:
        return f"| {aim} | - | not recorded |"
    worst = min(found, key=lambda place: found[place].mean)
    verdict = "yes" if found[worst].mean >= -LARGEST_LOSS else "no"
    return f"| {aim} | {verdict} | worst of {len(found)} places: {difference_cell(found[worst])}, {place_name(worst)} |"


def equal_work_table(folder: Path = FOLDER) -> str:
    """Make the table of ours beside each other method, with the most accurate of our settings of no more work."""
    lines = [
        "Ours minus the other, in points of test accuracy over the same seeds ± standard error, with the p-value of "
        "the paired t-test. Ours is the most accurate setting of `prune` or `partial` that took no more work.",
        "",
        "| data | other method | its work | ours | its work | ours minus the other | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, settings in _places(folder).items():
        data = place_name(place).split(",")[0]
        others = [one for one in settings.values() if one.first["policy"] not in ("prune", "partial")]
        for other in sorted(others, key=lambda one: -(one.work_share or 0.0)):
            share = other.work_share or 1.0
            ours = no_more_work(list(settings.values()), share)
            if ours is None or other.first["setting"] == "dense":
                continue
            found = _between(ours, other)
            cells = [data, setting_name(other.first), f"{share:.2f}", setting_name(ours.first)]
            cells += [f"{ours.work_share:.2f}", difference_cell(found), p_cell(found)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 4 else "Not recorded yet."


def _between(ours: Setting, other: Setting) -> Paired | None:
    shared = [seed for seed in ours.runs if seed in other.runs]
    return paired([100 * (ours.runs[seed]["accuracy"] - other.runs[seed]["accuracy"]) for seed in shared])
