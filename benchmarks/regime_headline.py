"""The headline in short: one table of both data sets, and one picture of accuracy against cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from regime_plans import headline_runs
from regime_run import Regime
from regime_statistics import Record, Setting, by_setting
from regime_tables import FOLDER, difference_cell, place_name, records_by_place, seconds_cell

__all__ = ["LEAST_SEEDS", "draw", "drawn_points", "headline_settings", "points", "short_table"]

LEAST_SEEDS = 5
"""No headline is written from fewer seeds."""

_SHORTENED = "dense, shortened, the best of three learning rates"
_METHODS = {
    _SHORTENED: "dense-length*",
    "a random share of the size of ours at 0.95": "random-likeprune-coverage0.95-*",
    "InfoBatch's rule": "infobatch",
    "SeTa's rule": "seta",
    "the original's package, with its own optimizer": "original-*",
    "**ours**, coverage 0.97, steps kept, the last eighth dense": "prune-coverage0.97-gatesoft-stepskeep-cooldown*",
    "**ours**, coverage 0.97, fewer steps, the last eighth dense": "prune-coverage0.97-gatesoft-stepsfollow-cooldown*",
    "**ours**, coverage 0.95, fewer steps, hard cut": "prune-coverage0.95-gatetopk-stepsfollow",
}
"""The rows of the short table, each with a pattern of its setting."""


def headline_settings(records: Sequence[Record]) -> dict[str, Setting]:
    """Pick a setting with enough seeds for each row of the short table, and the dense one, from one place's records.

    Of the shortened dense runs it is the best of those with the length that several learning rates were tried at.
    """
    settings = {name: setting for name, setting in by_setting(records).items() if setting.seeds >= LEAST_SEEDS}
    tuned = {one.first["epochs"] for one in settings.values() if {"length", "lr"} <= set(one.first["options"])}
    rows: dict[str, Setting] = {}
    if "dense" in settings:
        rows["dense"] = settings["dense"]
    for name, setting in settings.items():
        row = next((row for row, pattern in _METHODS.items() if fnmatchcase(name, pattern)), None)
        if row is None or (row == _SHORTENED and setting.first["epochs"] not in tuned):
            continue
        if row not in rows or _difference(rows[row])[0] < _difference(setting)[0]:
            rows[row] = setting
    return rows


def _places(folder: Path) -> dict[Regime, dict[str, Setting]]:
    """Return the rows of one place for each data set, those with enough seeds: the place that has the most of them."""
    found: dict[str, tuple[Regime, dict[str, Setting]]] = {}
    for place, records in records_by_place(headline_runs(), folder).items():
        picked = headline_settings(records)
        rows = {row: picked[row] for row in ("dense", *_METHODS) if row in picked}
        _, most = found.get(place.data, (place, {}))
        if "dense" in rows and len(rows) > len(most):
            found[place.data] = (place, rows)
    return dict(found.values())


def short_table(folder: Path = FOLDER) -> str:
    """Make the table of at most eight rows."""
    places = _places(folder)
    if not places:
        return "Not recorded yet."
    references = [
        f"{place_name(place)}: dense {statistics.mean(rows['dense'].accuracies):.2f} % "
        f"({rows['dense'].seeds} seeds; {_machines(rows['dense'])}{_timed(rows['dense'])})"
        for place, rows in places.items()
    ]
    heads = [
        f"{place_name(place).split(',')[0]}, points | work{' | seconds' * _is_timed(rows)}"
        for place, rows in places.items()
    ]
    columns = sum(2 + _is_timed(rows) for rows in places.values())
    lines = [
        f"{'. '.join(references)}. Points: test accuracy minus that of dense runs of the same seeds, ± standard error. "
        "Work: FLOPs of all forwards and backwards, scoring included, as a share of dense.",
        "",
        f"| method | {' | '.join(heads)} |",
        "|---|" + "---|" * columns,
    ]
    for row in _METHODS:
        cells = [_cells(rows.get(row), _is_timed(rows)) for rows in places.values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_timed(rows: dict[str, Setting]) -> bool:
    return any(setting.seconds is not None for row, setting in rows.items() if row != "dense")


def _machines(dense: Setting) -> str:
    return " and ".join(sorted({run["hardware"].replace("(s)", "") for run in dense.runs.values()}))


def _timed(dense: Setting) -> str:
    return "" if dense.seconds is None else f", {dense.seconds:,.0f} s {dense.timed_on}"


def _cells(setting: Setting | None, timed: bool) -> str:
    if setting is None:
        return " | ".join("-" * (2 + timed))
    cells = [difference_cell(setting.difference), f"{setting.work_share:.2f}"]
    return " | ".join(cells + [seconds_cell(setting)] * timed)


def points(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Return what the picture shows: of each place, cost and difference of each method that has enough seeds.

    The difference is that of the table. The cost is the time of training where every method was timed, else the work in
    dense epochs. The curve joins the dense runs of all lengths at the common learning rate.
    """
    found: dict[str, dict[str, Any]] = {}
    records = records_by_place(headline_runs(), folder)
    for place, rows in _places(folder).items():
        timed = all(setting.seconds is not None for setting in rows.values())
        lengths = [
            setting
            for setting in by_setting(records[place]).values()
            if setting.first["policy"] == "dense" and "lr" not in setting.first["options"]
            if setting.seeds >= LEAST_SEEDS and (setting.seconds is not None or not timed)
        ]
        curve = sorted((_cost(each, timed), _difference(each)[0]) for each in lengths)
        found[place_name(place)] = {
            "cost": "seconds of training" if timed else "work, in dense epochs",
            "curve": [list(each) for each in curve],
            "methods": [_point(row, setting, timed) for row, setting in rows.items()],
        }
    return found


def _cost(setting: Setting, timed: bool) -> float:
    cost = setting.seconds if timed else setting.mean("work_epochs")
    assert cost is not None
    return round(cost, 1)


def _point(row: str, setting: Setting, timed: bool) -> dict[str, Any]:
    points, error = _difference(setting)
    return {"method": row.replace("*", ""), "cost": _cost(setting, timed), "points": points, "error": error}


def _difference(setting: Setting) -> tuple[float, float]:
    """Return the points of accuracy above dense runs of the same seeds, and their standard error."""
    found = setting.difference
    return (0.0, 0.0) if found is None else (round(found.mean, 3), round(found.standard_error, 3))


_LOOKS = {name.replace("*", ""): look for name, look in zip(["dense", *_METHODS], "oosDv^XP*", strict=True)}
"""The marker of each method."""


def draw(shown: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw differences against cost with standard errors, a panel for each place; the file holds its numbers."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "headline", "font.size": 9}):
        figure, panels = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 5), squeeze=False, layout="constrained")
        handles = {}
        for panel, (place, drawn) in zip(panels[0], shown.items(), strict=True):
            if drawn["curve"]:
                panel.plot(*zip(*drawn["curve"], strict=True), color="black", linewidth=0.8, zorder=0)
            for each in drawn["methods"]:
                handles[each["method"]] = _draw_method(panel, each, drawn["methods"])
            panel.set(title=place, xlabel=drawn["cost"], ylabel="test accuracy, points above dense")
            panel.grid(alpha=0.3)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(shown), frameon=False)
        metadata = {"Date": None, "Description": json.dumps(shown)}
        figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


_FAR = 3.0
"""Points of accuracy below dense from which on a method is written at the edge: the others would not be told apart."""


def _draw_method(panel: Any, each: dict[str, Any], others: Sequence[dict[str, Any]]) -> Any:
    name = each["method"]
    color = "tab:red" if name.startswith("ours") else "black" if name.startswith("dense") else "tab:blue"
    hollow = "white" if name.startswith("dense,") else color
    look = {"marker": _LOOKS[name], "color": color, "markerfacecolor": hollow, "linestyle": "none", "markersize": 7}
    if each["points"] > -_FAR:
        return panel.errorbar(each["cost"], each["points"], yerr=each["error"], capsize=2, **look)
    lowest = min(one["points"] for one in others if one["points"] > -_FAR)
    (handle,) = panel.plot(each["cost"], lowest, **look)
    panel.annotate(
        f"{each['points']:.1f} points, far below",
        (each["cost"], lowest),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
        color=color,
    )
    return handle


def drawn_points(path: Path) -> dict[str, dict[str, Any]] | None:
    """Read the numbers that a picture was drawn from; None where there is no picture."""
    if not path.is_file():
        return None
    for element in ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description"):
        found: dict[str, dict[str, Any]] = json.loads(element.text or "{}")
        return found
    return None
