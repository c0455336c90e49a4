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
from regime_tables import FOLDER, difference_cell, machine, place_name, seconds_cell

__all__ = ["draw", "drawn_points", "headline_settings", "points", "short_table"]

LEAST_SEEDS = 5
"""No headline is written from fewer seeds."""

_SHORTENED = "dense, shortened, the best of three learning rates"
_METHODS = {
    _SHORTENED: "dense-length",
    "a random share of the size of ours at 0.95": "random-likeprune-coverage0.95",
    "InfoBatch's rule": "infobatch",
    "SeTa's rule": "seta",
    "Selective Backprop, as Composer has it": "selective-backprop",
    "the original's package, as it is": "original",
    "**ours**, coverage 0.97, soft gate": "prune-coverage0.97-gatesoft",
    "**ours**, coverage 0.95, hard cut": "prune-coverage0.95-gatetopk",
}
"""The rows of the short table, each with the beginning of its setting."""


def headline_settings(records: Sequence[Record]) -> dict[str, Setting]:
    """Pick a setting for each row of the short table, and the dense one, from the records of one place.

    Of the shortened dense runs it is the best of those with the length that several learning rates were tried at.
    """
    settings = by_setting(records)
    tuned = {setting.first["epochs"] for setting in settings.values() if "lr" in setting.first["options"]}
    rows: dict[str, Setting] = {}
    if "dense" in settings:
        rows["dense"] = settings["dense"]
    for name, setting in settings.items():
        row = next((row for row, begin in _METHODS.items() if name.startswith(begin)), None)
        if row is None or (row == _SHORTENED and setting.first["epochs"] not in tuned):
            continue
        if row not in rows or statistics.mean(rows[row].accuracies) < statistics.mean(setting.accuracies):
            rows[row] = setting
    return rows


def _places(folder: Path) -> dict[Regime, dict[str, Setting]]:
    """Return the settings of each place of the plan whose dense runs have enough seeds, and of those that have, too."""
    names = {run.name for run in plan("headline")}
    records = [record for record in load_regimes(folder) if record["name"] in names]
    found = {}
    for place in dict.fromkeys(run.regime for run in plan("headline")):
        rows = headline_settings([record for record in records if Regime(**record["regime"]) == place])
        rows = {row: setting for row, setting in rows.items() if len(setting.runs) >= LEAST_SEEDS}
        if "dense" in rows:
            found[place] = rows
    return found


def short_table(folder: Path = FOLDER) -> str:
    """Make the table of at most eight rows."""
    places = _places(folder)
    if not places:
        return "Not recorded yet."
    references = [
        f"{place_name(place)}: dense {statistics.mean(rows['dense'].accuracies):.2f} % "
        f"({len(rows['dense'].runs)} seeds{_timed(rows['dense'])}; {machine(list(rows['dense'].runs.values()))})"
        for place, rows in places.items()
    ]
    heads = [
        f"{place_name(place).split(',')[0]}, points | work{' | seconds' * _is_timed(rows)}"
        for place, rows in places.items()
    ]
    columns = sum(2 + _is_timed(rows) for rows in places.values())
    lines = [
        f"{'; '.join(references)}. Points of test accuracy against dense runs of the same seeds ± standard error; "
        "work: forwards and backwards by their FLOPs, scoring included, as a share of dense.",
        "",
        f"| method | {' | '.join(heads)} |",
        "|---|" + "---|" * columns,
    ]
    for row in _METHODS:
        cells = [_cells(rows.get(row), _is_timed(rows)) for rows in places.values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_timed(rows: dict[str, Setting]) -> bool:
    return rows["dense"].seconds is not None


def _timed(dense: Setting) -> str:
    return "" if dense.seconds is None else f", {dense.seconds:,.0f} s"


def _cells(setting: Setting | None, timed: bool) -> str:
    if setting is None:
        return " | ".join("-" * (2 + timed))
    cells = [difference_cell(setting.difference), f"{setting.work_share:.2f}"]
    return " | ".join(cells + [seconds_cell(setting)] * timed)


def points(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Return what the picture shows: of each place, cost and accuracy of each method that has enough seeds.

    The cost is the time of training where every method was timed, else the work in dense epochs.
    """
    found: dict[str, dict[str, Any]] = {}
    for place, rows in _places(folder).items():
        timed = all(setting.seconds is not None for setting in rows.values())
        found[place_name(place)] = {
            "cost": "seconds of training" if timed else "work, in dense epochs",
            "methods": [_point(row, setting, timed) for row, setting in rows.items()],
        }
    return found


def _point(row: str, setting: Setting, timed: bool) -> dict[str, Any]:
    cost = setting.seconds if timed else setting.mean("work_epochs")
    assert cost is not None
    return {
        "method": row.replace("*", "").split(", as ")[0].replace(", the best of three learning rates", ""),
        "ours": row.startswith("**ours**"),
        "cost": round(cost, 1),
        "accuracy": round(statistics.mean(setting.accuracies), 3),
        "deviation": round(statistics.stdev(setting.accuracies), 3),
    }


def draw(shown: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw accuracy against cost with standard deviations, a panel for each place; the file holds its numbers."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "headline", "font.size": 8}):
        figure, panels = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4), squeeze=False, layout="constrained")
        for panel, (place, drawn) in zip(panels[0], shown.items(), strict=True):
            for each in drawn["methods"]:
                color = "tab:red" if each["ours"] else "black" if each["method"].startswith("dense") else "tab:blue"
                at = (each["cost"], each["accuracy"])
                panel.errorbar(*at, yerr=each["deviation"], fmt="o", color=color, capsize=2)
                panel.annotate(each["method"], at, xytext=(4, 4), textcoords="offset points", color=color)
            panel.set(title=place, xlabel=drawn["cost"], ylabel="test accuracy, %")
            panel.margins(x=0.25)
        metadata = {"Date": None, "Description": json.dumps(shown)}
        figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


def drawn_points(path: Path) -> dict[str, dict[str, Any]] | None:
    """Read the numbers that a picture was drawn from; None where there is no picture."""
    if not path.is_file():
        return None
    for element in ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description"):
        found: dict[str, dict[str, Any]] = json.loads(element.text or "{}")
        return found
    return None
