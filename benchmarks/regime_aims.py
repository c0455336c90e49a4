"""What was aimed at beside what was reached, and ours beside each other method, for `summarize.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from regime_headline import LEAST_SEEDS
from regime_plans import headline_runs
from regime_run import Regime
from regime_statistics import NO_LOSS, Paired, Setting, by_place, by_setting, compared, load_regimes
from regime_tables import FOLDER, difference_cell, p_cell, place_name, records_by_place, setting_name, short_name

__all__ = ["aims_table", "best_at", "equal_work_table"]

OURS = (
    "prune-coverage0.97-gatesoft-stepskeep",
    "prune-coverage0.95-gatetopk-stepsfollow",
    "prune-coverage0.95-gatetopk-stepskeep",
    "prune-coverage0.97-gatesoft-stepsfollow",
    "prune-coverage0.97-gatesoft-stepskeep-cooldown[0-9]",
    "prune-coverage0.97-gatesoft-stepsfollow-cooldown[0-9]",
    "prune-coverage0.95-gatetopk-stepsfollow-cooldown[0-9]",
    "prune-coverage0.99-gatesoft-stepskeep-cooldown[0-9]",
)
"""Coverages with steps kept and with schedules that follow, and those with a longer dense end: patterns of names."""

_EVERYWHERE = {
    "a coverage of 0.97, the last 1/8 of the run dense": ("prune-coverage0.97-gatesoft-stepskeep", 8),
    "0.97, one or two dense epochs at the end": ("prune-coverage0.97-gatesoft-stepskeep", None),
    "0.97, the last 1/8 dense, schedules follow": ("prune-coverage0.97-gatesoft-stepsfollow", 8),
    "0.99, the last 1/8 dense": ("prune-coverage0.99-gatesoft-stepskeep", 8),
}
"""The settings that are judged at every place, and what part of the run is dense at its end: 1 / this."""

LARGEST_LOSS = 0.2
"""The points of accuracy that may be lost anywhere."""

AIMS = {"fashion_mnist": (0.45,), "cifar10": (0.65, 0.40)}
"""The shares of dense work at which nothing was to be lost."""

_ROUNDING = 0.005
"""The share of the work that does not count: tables show two digits."""


def _places(folder: Path) -> dict[Regime, dict[str, Setting]]:
    """Return the settings with enough seeds of each place of the headline, of larger networks where there are any."""
    found = {}
    for place, records in records_by_place(headline_runs(), folder).items():
        settings = by_setting(records)
        found[place] = {name: one for name, one in settings.items() if one.seeds >= LEAST_SEEDS}
    return {place: settings for place, settings in found.items() if settings or place.network == "resnet"}


def best_at(settings: Iterable[Setting], share: float) -> Setting | None:
    """Return the most accurate of our settings whose work is at most a share of dense; None where there is none."""
    ours = [one for one in settings if one.first["policy"] in ("prune", "partial") and one.difference is not None]
    cheap = [one for one in ours if (one.work_share or 1.0) <= share + _ROUNDING]
    return max(cheap, key=lambda one: one.difference.mean if one.difference else 0.0, default=None)


def aims_table(folder: Path = FOLDER) -> str:
    """Make the table of what was aimed at and what was reached."""
    lines = ["| aim | reached | |", "|---|---|---|"]
    places = _places(folder)
    for place, settings in places.items():
        for share in AIMS[place.data]:
            aim = f"{short_name(place)}: at most {NO_LOSS} points below dense at {share:.2f} of its work"
            lines.append(f"| {aim} | {_reached(best_at(settings.values(), share))} |")
    lines += [*_everywhere(folder), _ahead(places)]
    return "\n".join(lines)


def _reached(setting: Setting | None) -> str:
    if setting is None or setting.difference is None:
        return f"- | not recorded with {LEAST_SEEDS} seeds"
    verdict = "yes" if setting.difference.is_no_loss else "no"
    found = f"{difference_cell(setting.difference)} at {setting.work_share:.2f}, {setting_name(setting.first)}"
    return f"{verdict} | best of our settings: {found}"


def _everywhere(folder: Path) -> list[str]:
    """Compare each setting of :data:`_EVERYWHERE` with dense training at every place that it was recorded at."""
    places = {place: by_setting(here) for place, here in by_place(load_regimes(folder)).items()}
    return [_at_all(places, *each) for each in _EVERYWHERE.items()]


def _at_all(places: Mapping[Regime, Mapping[str, Setting]], described: str, asked: tuple[str, int | None]) -> str:
    name, part = asked
    found: dict[Regime, Paired] = {}
    for place, settings in places.items():
        end = "" if part is None else f"-cooldown{max(1, place.epochs // part)}"
        setting = settings.get(name + end)
        if setting is not None and setting.difference is not None:
            found[place] = setting.difference
    aim = f"At most {LARGEST_LOSS} points below dense anywhere, {described}"
    if not found:
        return f"| {aim} | - | not recorded |"
    worst = min(found, key=lambda place: found[place].mean)
    verdict = "yes" if found[worst].mean >= -LARGEST_LOSS else "no"
    below = sum(one.mean < -LARGEST_LOSS for one in found.values())
    sure = sum(one.is_below(-LARGEST_LOSS) for one in found.values())
    return (
        f"| {aim} | {verdict} | {statistics.mean(one.mean for one in found.values()):+.2f} on the mean of {len(found)} "
        f"places; more is lost at {below}, beyond chance at {sure}; worst: {difference_cell(found[worst])}, "
        f"{place_name(worst)} |"
    )


def _ahead(places: Mapping[Regime, Mapping[str, Setting]]) -> str:
    """Count the methods that ours of no more work is ahead of beyond chance."""
    pairs = [pair for settings in places.values() for pair in _pairs(settings)]
    found = [
        difference for ours, other, difference in pairs if (ours.work_share or 1) <= (other.work_share or 1) + _ROUNDING
    ]
    sure = sum(one.mean > 0 and one.p_value < 0.05 for one in found)
    aim = "At equal work ahead of every other method"
    if not found:
        return f"| {aim} | - | not recorded |"
    verdict = "yes" if sure == len(found) else "no"
    return f"| {aim} | {verdict} | in {sure} of {len(found)} comparisons with p < 0.05; see above |"


def _pairs(settings: Mapping[str, Setting]) -> list[tuple[Setting, Setting, Paired]]:
    """Compare our settings with the other methods where runs can be paired, but not with dense runs of full length."""
    others = [one for one in settings.values() if one.first["policy"] not in ("prune", "partial")]
    others = sorted((one for one in others if one.first["setting"] != "dense"), key=lambda one: -(one.work_share or 0))
    ours = [settings[name] for pattern in OURS for name in settings if fnmatchcase(name, pattern)]
    compared_pairs = [(mine, other, compared(mine.runs, other.runs)) for other in others for mine in ours]
    return [(mine, other, found) for mine, other, found in compared_pairs if found is not None]


def equal_work_table(folder: Path = FOLDER) -> str:
    """Make the table of ours beside each other method."""
    lines = [
        "Ours minus the other method, in points of test accuracy over the same seeds on the same hardware ± standard "
        "error, with the p-value of the paired t-test, not corrected for the rows. Work: as a share of dense. Methods "
        "whose runs do not share three seeds on one kind of hardware are not compared.",
        "",
        "| data | other method | its work | ours | its work | ours minus the other | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, settings in _places(folder).items():
        for ours, other, found in _pairs(settings):
            cells = [short_name(place), setting_name(other.first), f"{other.work_share:.2f}", setting_name(ours.first)]
            cells += [f"{ours.work_share:.2f}", difference_cell(found), p_cell(found)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 4 else "Not recorded yet."
