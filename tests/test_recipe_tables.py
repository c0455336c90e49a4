"""The runs of recipes are recorded once, and their tables show what the records hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def record(method: str, seed: int, **figures: float) -> dict[str, Any]:
    return {
        "benchmark": "recipes",
        "recipe": "language/gpt",
        "method": method,
        "seed": seed,
        "figures": figures,
        "seconds": 99.0,
        "cpu_seconds": 10.0 + seed,
        "hardware": "CPU x86_64, 1 thread(s)",
        "versions": {"torch": "2.6.0"},
    }


def test_the_table_shows_means_and_deviations_of_each_method(benchmark: Any) -> None:
    runs = [record("ours", seed, accuracy=0.80 + 0.02 * seed, loss=0.5 + 0.1 * seed, work=0.6) for seed in range(3)]
    runs.append(record("dense", 0, accuracy=0.9, loss=0.4, work=1.0))
    table = benchmark("recipe_tables").recipe_table(runs).splitlines()
    assert table[2:] == [
        "| method | accuracy % | loss | work | seconds | seeds |",
        "|---|---|---|---|---|---|",
        "| dense | 90.0 | 0.400 | 1.00 | 10 | 1 |",
        "| ours | 82.0 ± 2.0 | 0.600 ± 0.100 | 0.60 | 11 | 3 |",
    ]


def test_a_table_without_work_has_no_column_for_it(benchmark: Any) -> None:
    table = benchmark("recipe_tables").recipe_table([record("dense", 0, accuracy=0.9)])
    assert "Work" not in table
    assert table.splitlines()[2] == "| method | accuracy % | seconds | seeds |"
    assert table.splitlines()[4] == "| dense | 90.0 | 10 | 1 |"


def test_a_run_is_recorded_once(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = benchmark("recipes")
    examples = tmp_path / "examples" / "small"
    examples.mkdir(parents=True)
    (examples / "one.py").write_text(
        "from typing import Literal\n"
        "Method = Literal['dense', 'ours']\n"
        "def train(method, *, seed=0, max_steps=-1):\n"
        "    return {'accuracy': 0.5 + seed / 10, 'work': 1.0 if method == 'dense' else 0.5}\n"
    )
    monkeypatch.setattr(recipes, "EXAMPLES", tmp_path / "examples")
    out = tmp_path / "records"
    recipes.main(["--recipe", "small/one", "--seeds", "0", "1", "--out", str(out)])
    names = sorted(path.stem for path in out.glob("*.json"))
    assert names == ["small-one-dense-s0", "small-one-dense-s1", "small-one-ours-s0", "small-one-ours-s1"]
    assert json.loads((out / "small-one-ours-s1.json").read_text())["figures"] == {"accuracy": 0.6, "work": 0.5}
    before = (out / "small-one-ours-s1.json").stat().st_mtime_ns
    recipes.main(["--recipe", "small/one", "--seeds", "1", "--out", str(out)])
    assert (out / "small-one-ours-s1.json").stat().st_mtime_ns == before
    assert set(benchmark("recipe_tables").recipe_tables(out)) == {"recipe-small-one"}
    with pytest.raises(FileNotFoundError, match="such as language/gpt, got 'small/two'"):
        recipes.main(["--recipe", "small/two", "--methods", "dense", "--out", str(out)])


def test_the_coverage_of_the_tests_is_recorded(benchmark: Any, tmp_path: Path) -> None:
    totals = {"num_statements": 200, "covered_lines": 190, "num_branches": 50, "covered_branches": 40, "other": 1}
    (tmp_path / "totals.json").write_text(json.dumps({"totals": totals}))
    benchmark("coverage_record").main([str(tmp_path / "totals.json"), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "test-coverage.json").read_text())
    assert (found["lines_run"], found["lines"], found["branches_run"], found["branches"]) == (190, 200, 40, 50)
    assert found["commit"]
