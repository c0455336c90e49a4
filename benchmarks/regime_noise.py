"""What wrong labels do to selection, and what leaving out the most significant samples changes."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from regime_plans import plan
from regime_statistics import Setting, by_setting
from regime_tables import FOLDER, accuracy_cell, difference_cell, place_name, records_by_place, setting_name

__all__ = ["noise_table"]


def noise_table(folder: Path = FOLDER) -> str:
    """Make the table of all settings at the places with wrong labels that have been recorded."""
    places = records_by_place((run for run in plan("ideas") if run.regime.noise > 0), folder)
    networks = {place_name(replace(place, noise=0.0)) for place, records in places.items() if records}
    if not networks:
        return "Not recorded yet."
    lines = [
        f"{'; '.join(sorted(networks))}. Points of test accuracy (with right labels) against dense runs of the same "
        "seeds ± standard error; a dash: fewer than 3 seeds. Work as a share of dense. Wrong among trained: the share "
        "of wrong labels among the samples of the pruned epochs.",
        "",
        "| data, wrong labels | run | seeds | test accuracy % | points | work | wrong among trained |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, records in places.items():
        settings = by_setting(records)
        for name, setting in sorted(settings.items(), key=lambda item: -statistics.mean(item[1].accuracies)):
            cells = [
                f"{place_name(place).split(',')[0]}, {place.noise:.0%}".replace("%", " %"),
                setting_name(setting.first),
                str(setting.seeds),
                accuracy_cell(setting),
                "-" if name == "dense" else difference_cell(setting.difference),
                "-" if setting.work_share is None else f"{setting.work_share:.2f}",
                f"{_wrong_among_trained(setting):.0%}".replace("%", " %"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _wrong_among_trained(setting: Setting) -> float:
    """Return the mean share of wrong labels over the epochs that were pruned, or over all where none was."""
    shares = []
    for run in setting.runs.values():
        wrong = run["wrong_label_share_by_epoch"] or [run["regime"]["noise"]]
        rates = run["rate_by_epoch"]
        pruned = [share for share, rate in zip(wrong, rates, strict=False) if rate < 1]
        shares.append(statistics.mean(pruned or wrong))
    return statistics.mean(shares)
