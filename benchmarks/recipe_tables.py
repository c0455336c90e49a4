"""The tables of the recipes' pages: the figures of each method, mean and standard deviation over the seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["recipe_table", "recipe_tables"]

Record = dict[str, Any]

NOT_SHARES = ("loss", "error", "bits", "perplexity", "seconds", "return", "steps")
"""Words in the names of figures that are written as numbers; other figures between 0 and 1 are written in percent."""


def load_recipes(folder: Path) -> dict[str, list[Record]]:
    """Read the records of whole runs by recipe, in the order of methods and seeds."""
    recipes: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        recipes.setdefault(record["recipe"], []).append(record)
    return recipes


def recipe_tables(folder: Path) -> dict[str, Callable[[], str]]:
    """Return a function for the table of each recipe that has records, by the name of its block on the page."""
    return {
        f"recipe-{recipe.replace('/', '-').replace('_', '-')}": partial(recipe_table, records)
        for recipe, records in load_recipes(folder).items()
    }


def recipe_table(records: Sequence[Record]) -> str:
    """Make the table of one recipe: a row for each method, the dense run first."""
    first = records[0]
    methods: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["method"] != "dense", record["seed"])):
        methods.setdefault(record["method"], []).append(record)
    names = [name for name in first["figures"] if name != "work"]
    shares = {name for name in names if _is_share(name, records)}
    has_work = "work" in first["figures"]
    heads = [_head(name, percent=name in shares) for name in names] + ["work"] * has_work + ["seconds", "seeds"]
    work_text = "Work: counted FLOPs, scoring included, as a share of the dense run's. " if has_work else ""
    lines = [
        f"Mean ± standard deviation over the seeds, {first['hardware']}, torch {first['versions']['torch']}. "
        f"{work_text}Seconds: of the processor, with all preparation.",
        "",
        f"| method | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
    ]
    for method, runs in methods.items():
        cells = [_cell([run["figures"].get(name) for run in runs], percent=name in shares) for name in names]
        if has_work:
            cells.append(_cell([run["figures"].get("work") for run in runs], digits=2))
        seconds = statistics.mean(run["cpu_seconds"] for run in runs)
        cells += [f"{seconds:.0f}" if seconds >= 5 else f"{seconds:.1f}", str(len(runs))]
        lines.append(f"| {method.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_share(name: str, records: Sequence[Record]) -> bool:
    if any(word in name for word in NOT_SHARES):
        return False
    values = [record["figures"].get(name) for record in records]
    return all(0 <= value <= 1 for value in values if value is not None)


def _head(name: str, *, percent: bool) -> str:
    return name.replace("_", " ") + (" %" if percent else "")


def _cell(values: Sequence[float | None], *, percent: bool = False, digits: int | None = None) -> str:
    """Write mean and standard deviation; a dash where a method has no such figure."""
    there = [100 * value if percent else value for value in values if value is not None]
    if not there:
        return "-"
    mean = statistics.mean(there)
    if digits is None:
        digits = 1 if percent or abs(mean) >= 10 else 3
    if len(there) == 1 or digits == 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(there):.{digits}f}"
