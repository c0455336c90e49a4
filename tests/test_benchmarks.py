"""The benchmarks run from end to end where everything is tiny; their figures are not tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark as its command line does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_overhead_measures_every_mode(benchmark: Any, tmp_path: Path) -> None:
    benchmark("overhead").main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "overhead-cpu.json").read_text())
    names = [row["variant"] for row in record["rows"]]
    assert names == ["plain", "warmup", "warmup of prune", "mask", "partial", "subset", "prune"]
    assert all(row["steps_a_round"] >= 6 for row in record["rows"])
    assert all(row["milliseconds"] > 0 for row in record["rows"])
    assert record["rows"][0]["share_of_plain"] == 1


def test_overhead_measures_a_short_run(benchmark: Any, tmp_path: Path) -> None:
    benchmark("overhead").main(["--tiny", "--short-run", "--device", "cpu", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "overhead-short-run-cpu.json").read_text())
    assert [row["variant"] for row in record["rows"]] == ["plain", "partial, r = 0.4", "partial, r = 0.1"]


def test_overhead_leaves_garbage_collection_and_threads_as_they_were(benchmark: Any, tmp_path: Path) -> None:
    import gc

    import torch

    before = torch.get_num_threads()
    benchmark("overhead").main(["--tiny", "--short-run", "--threads", "3", "--device", "cpu", "--out", str(tmp_path)])
    assert gc.isenabled()
    assert torch.get_num_threads() == before
