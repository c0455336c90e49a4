"""What was aimed at beside what was reached, and ours beside each other method, for `summarize.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from regime_headline import LEAST_SEEDS
from regime_plans import headline_runs
from regime_run import Regime
from regime_statistics import NO_LOSS, Paired, Record, Setting, by_setting, compared, load_regimes
from regime_tables import FOLDER, difference_cell, p_cell, place_name, records_by_place, setting_name, short_name

__all__ = ["aims_table", "best_at", "equal_work_table"]

OURS = (
    "prune-coverage0.97-gatesoft-stepskeep",
    "prune-coverage0.95-gatetopk-stepsfollow",
    "prune-coverage0.95-gatetopk-stepskeep",
    "prune-coverage0.97-gatesoft-stepsfollow",
    "prune-coverage0.97-gatesoft-stepskeep-cooldown[0-9]",
    "prune-coverage0.97-gatesoft-stepsfollow-cooldown[0-9]",
)
"""The recommended setting, one that saves more, both with schedules that follow, and a longer dense end: patterns."""

_RECOMMENDED = (OURS[0], OURS[3])
"""The recommended coverage, with either way to count steps."""

LARGEST_LOSS = 0.2
"""The points of accuracy that the recommended setting may lose anywhere."""

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
    lines += [_everywhere(folder), _everywhere(folder, cooldown=8), _ahead(places)]
    return "\n".join(lines)


def _reached(setting: Setting | None) -> str:
    if setting is None or setting.difference is None:
        return f"- | not recorded with {LEAST_SEEDS} seeds"
    verdict = "yes" if setting.difference.is_no_loss else "no"
    found = f"{difference_cell(setting.difference)} at {setting.work_share:.2f}, {setting_name(setting.first)}"
    return f"{verdict} | best of our settings: {found}"


def _everywhere(folder: Path, cooldown: int | None = None) -> str:
    """Compare the recommended coverage with dense at every place that it was recorded at.

    Args:
        folder: The folder of the records.
        cooldown: The part of the run that is dense at its end is 1 / this; None for one or two epochs.
    """
    records: dict[Regime, list[Record]] = {}
    for record in load_regimes(folder):
        records.setdefault(Regime(**record["regime"]), []).append(record)
    found = {}
    for place, here in records.items():
        settings = by_setting(here)
        end = "" if cooldown is None else f"-cooldown{max(1, place.epochs // cooldown)}"
        losses = [settings[name + end].difference for name in _RECOMMENDED if name + end in settings]
        if known := [loss for loss in losses if loss is not None]:
            found[place] = min(known, key=lambda loss: loss.mean)
    aim = f"At most {LARGEST_LOSS} points below dense anywhere, with the recommended coverage of 0.97"
    aim += ", one or two dense epochs at the end" if cooldown is None else f", the last 1/{cooldown} of the run dense"
    if not found:
        return f"| {aim} | - | not recorded |"
    worst = min(found, key=lambda place: found[place].mean)
    verdict = "yes" if found[worst].mean >= -LARGEST_LOSS else "no"
    return f"| {aim} | {verdict} | worst of {len(found)} places: {difference_cell(found[worst])}, {place_name(worst)} |"


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
