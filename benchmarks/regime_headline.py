"""The headline in short: one table of both data sets, and one picture of accuracy against seconds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from regime_plans import plan
from regime_run import Regime
from regime_statistics import Record, Setting, by_setting, load_regimes
from regime_tables import FOLDER, difference_cell, place_name, setting_name

__all__ = ["draw", "drawn_points", "headline_settings", "points", "short_table"]

LEAST_SEEDS = 5
"""No headline is written from fewer seeds."""

_METHODS = {
    "shortened": "dense, shortened, its learning rate tuned for that",
    "random": "a random share of the size of ours",
    "infobatch": "InfoBatch's rule",
    "seta": "SeTa's rule",
    "orderdp": "OrderDP's rule",
    "selective-backprop": "Selective Backprop (Composer's)",
    "original": "the original's package as it is",
    "ours": "**ours**",
}


def headline_settings(records: Sequence[Record]) -> dict[str, Setting]:
    """Pick a setting for each row of the short table, from the records of one place.

    Of the shortened dense runs it is the one with the best learning rate; ours is the pruned run with a coverage.
    """
    settings = by_setting(records)
    rows: dict[str, Setting] = {}
    for setting in settings.values():
        options = setting.first["options"]
        policy = setting.first["policy"]
        row = policy
        if policy == "dense" and options:
            row = "shortened"
            if row in rows and statistics.mean(rows[row].accuracies) >= statistics.mean(setting.accuracies):
                continue
        elif policy == "prune":
            row = "ours" if "coverage" in options else "ours, fixed"
        rows[row] = setting
    return rows


def _places(folder: Path) -> dict[Regime, dict[str, Setting]]:
    """Return the settings of each place of the plan that has dense runs."""
    names = {run.name for run in plan("headline")}
    records = [record for record in load_regimes(folder) if record["name"] in names]
    found = {}
    for place in dict.fromkeys(run.regime for run in plan("headline")):
        rows = headline_settings([record for record in records if Regime(**record["regime"]) == place])
        if "dense" in rows:
            found[place] = rows
    return found


def short_table(folder: Path = FOLDER) -> str:
    """Make the table of at most eight rows."""
    places = _places(folder)
    complete = {place: rows for place, rows in places.items() if len(rows["dense"].runs) >= LEAST_SEEDS}
    if not complete:
        return "Not recorded yet."
    references = [
        f"{place_name(place)}: dense {statistics.mean(dense.accuracies):.2f} % ({len(dense.runs)} seeds)"
        for place, rows in complete.items()
        for dense in [rows["dense"]]
    ]
    heads = [f"{place_name(place).split(',')[0]}, points | work" for place in complete]
    lines = [
        f"{'; '.join(references)}. Points of test accuracy against dense runs of the same seeds ± standard error; "
        "work as a share of dense, scoring included.",
        "",
        f"| method | {' | '.join(heads)} |",
        "|---|" + "---|---|" * len(complete),
    ]
    for row, name in _METHODS.items():
        cells = [_cells(rows.get(row)) for rows in complete.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(setting: Setting | None) -> str:
    if setting is None or len(setting.runs) < LEAST_SEEDS:
        return "- | -"
    return f"{difference_cell(setting.difference)} | {setting.work_share:.2f}"


def points(folder: Path = FOLDER) -> dict[str, list[dict[str, Any]]]:
    """Return what the picture shows: of each place, the seconds and the accuracy of each method with five seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for place, rows in _places(folder).items():
        here = [_point(setting) for setting in rows.values() if len(setting.runs) >= LEAST_SEEDS]
        if here:
            found[place_name(place)] = here
    return found


def _point(setting: Setting) -> dict[str, Any]:
    on_cpu = setting.first["hardware"].startswith("CPU")
    return {
        "method": setting_name(setting.first).replace("`", ""),
        "ours": setting.first["policy"] in ("prune", "partial"),
        "seconds": round(setting.mean("cpu_seconds" if on_cpu else "seconds"), 1),
        "accuracy": round(statistics.mean(setting.accuracies), 3),
        "deviation": round(statistics.stdev(setting.accuracies), 3),
    }


def draw(shown: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw accuracy against seconds with standard deviations, a panel for each place; the file holds its numbers."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "headline", "font.size": 8}):
        figure, panels = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4), squeeze=False, layout="constrained")
        for panel, (place, methods) in zip(panels[0], shown.items(), strict=True):
            for each in methods:
                color = "tab:red" if each["ours"] else "black" if each["method"] == "dense" else "tab:blue"
                panel.errorbar(
                    each["seconds"], each["accuracy"], yerr=each["deviation"], fmt="o", color=color, capsize=2
                )
                panel.annotate(
                    each["method"],
                    (each["seconds"], each["accuracy"]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    color=color,
                )
            panel.set(title=place, xlabel="seconds of training", ylabel="test accuracy, %")
            panel.margins(x=0.25)
        metadata = {"Date": None, "Description": json.dumps(shown)}
        figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


def drawn_points(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Read the numbers that a picture was drawn from; None where there is no picture."""
    if not path.is_file():
        return None
    for element in ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description"):
        found: dict[str, list[dict[str, Any]]] = json.loads(element.text or "{}")
        return found
    return None
