"""The table of the regime map, for `summarize.py`: what ours lost at each place, and over all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from regime_plans import map_settings, plan
from regime_run import Regime, Run
from regime_statistics import LEAST_SEEDS, Setting, by_place, by_setting, load_regimes
from regime_tables import FOLDER, NOTHING_YET, difference_cell, machine, place_name

__all__ = ["map_table"]


def map_table(folder: Path = FOLDER) -> str:
    """Make the table of the places of the map: what ours lost with each setting, and what could be skipped."""
    runs = plan("map")
    wanted = {(run.regime, run.setting) for run in runs}
    records = [one for one in load_regimes(folder) if (Regime(**one["regime"]), one["setting"]) in wanted]
    here = by_place(records)
    settings = {place: by_setting(here[place]) for place in dict.fromkeys(run.regime for run in runs) if place in here}
    if not settings:
        return NOTHING_YET
    heads = list(map_settings(runs[0].regime))
    lines = [
        f"{machine(records)}. Dense: test accuracy (accuracy on training images). Others: difference to dense runs of "
        f"the same seeds ± standard error, at what share of their work; a dash: fewer than {LEAST_SEEDS} seeds. "
        f"Rates: of the pruned epochs at {heads[0]}, the first and the last. "
        "Saved: the largest share of the work that one of ours saved with a mean difference of -0.1 or better, "
        "which with this scatter is no proof that nothing is lost. The last row: over the places where every setting "
        "of ours has its seeds, the mean difference and the worst one.",
        "",
        f"| place | dense % | dense, 2/3 of the epochs | {' | '.join(heads)} | rates | saved |",
        "|---|---|---|" + "---|" * len(heads) + "---|---|",
    ]
    rows = [map_row(place, here) for place, here in settings.items()]
    return "\n".join([*lines, *rows, *_everywhere([_ours(place, here) for place, here in settings.items()])])


def _ours(place: Regime, settings: dict[str, Setting]) -> list[Setting | None]:
    """Return the settings of ours at a place, in the order of the columns; None for one that has no record."""
    return [
        settings.get(Run(place, policy, tuple(options.items())).setting)
        for policy, options in map_settings(place).values()
    ]


def _everywhere(places: Sequence[Sequence[Setting | None]]) -> list[str]:
    """Write the row of all places where every setting of ours has its seeds: the mean and the worst difference."""
    found: list[list[float]] = []
    for ours in places:
        differences = [None if one is None else one.difference for one in ours]
        means = [one.mean for one in differences if one is not None]
        if len(means) == len(differences):
            found.append(means)
    if len(found) < 2:
        return []
    cells = [f"{statistics.mean(each):+.2f}, worst {min(each):+.2f}" for each in zip(*found, strict=True)]
    return [f"| **{len(found)} places** | - | - | {' | '.join(cells)} | - | - |"]


def map_row(place: Regime, settings: dict[str, Setting]) -> str:
    """Write the row of one place."""
    dense = settings.get("dense")
    cells = [place_name(place), "-" if dense is None else _dense_cell(dense)]
    shortened = [one for one in settings.values() if one.first["policy"] == "dense" and one.first["options"]]
    cells.append(_compared_cell(shortened[0]) if shortened else "-")
    ours = _ours(place, settings)
    cells += ["-" if one is None else _compared_cell(one) for one in ours]
    first = ours[0]
    rates = [] if first is None else first.pruned_rates()
    cells.append(f"{rates[0]:.2f}-{rates[-1]:.2f}" if rates else "whole" if first is not None else "-")
    cells.append(skipped_cell([one for one in ours if one is not None]))
    return "| " + " | ".join(cells) + " |"


def _dense_cell(dense: Setting) -> str:
    return f"{statistics.mean(dense.accuracies):.1f} ({100 * dense.mean('train_accuracy'):.1f})"


def _compared_cell(setting: Setting) -> str:
    found = setting.difference
    share = setting.work_share
    return "-" if found is None or share is None else f"{difference_cell(found)} at {share:.2f}"


def skipped_cell(covered: Sequence[Setting]) -> str:
    """Write the largest share of the work that was saved at no loss; a dash where seeds are missing."""
    judged = [one for one in covered if one.difference is not None and one.work_share is not None]
    if not judged:
        return "-"
    saved = [1 - (one.work_share or 1) for one in judged if one.difference is not None and one.difference.is_no_loss]
    return f"{max(saved):.0%}" if saved and max(saved) > 0.005 else "nothing"
