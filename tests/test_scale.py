"""The benchmark of scale runs from end to end where everything is small; its tables tell what was calculated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_scale_is_measured_and_calculated(benchmark: Any, tmp_path: Path) -> None:
    sizes = ["--sizes", "1e4", "2e4", "5e4", "--simulated", "1000", "--ranks", "1", "2", "7"]
    benchmark("scale").main([*sizes, "--memory-gib", "0.001", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "scale-cpu.json").read_text())
    assert [(row["samples"], row["measured"]) for row in record["rows"]] == 2 * [
        (10_000, True),
        (20_000, True),
        (50_000, False),
    ]
    assert all(row["agree"] for row in record["ranks"])
    assert [row["samples"] for row in record["ranks"][:3]] == [1000, 1000, 994]


def test_the_tables_of_scale(benchmark: Any) -> None:
    tables = benchmark("scale_table")
    assert [tables.power(size) for size in (10**9, 65_536)] == ["10<sup>9</sup>", "65,536"]
    assert [tables.gigabytes(count) for count in (0, 12, 4.5e3, 3.25e9)] == ["0 B", "12 B", "4.5 kB", "3.25 GB"]
    row = {
        "samples": 10**9,
        "gate": "topk",
        "observe_seconds": 1.0,
        "fold_seconds": 1.0,
        "plan_seconds": 200.0,
        "peak_bytes": 33e9,
        "checkpoint_bytes": None,
        "measured": False,
    }
    shard = {"samples": 10**9, "parts": 64, "seconds": 3.0, "peak_bytes": 5e8}
    shard |= {"coverage": 0.9, "exchanged_bytes": 168, "checkpoint_bytes": 2e8}
    text = tables.plan_table(
        {
            "hardware": "a CPU",
            "versions": {"torch": "2"},
            "rate": 0.4,
            "rows": [row],
            "samplers": [{"samples": 10**7, "seconds": 2.0, "peak_bytes": 4e8}],
            "shards": [shard],
        }
    )
    assert "| 10<sup>9</sup>, calculated | `topk` | 1.0 | 1.0 | 200.0 | 33 GB | 33 | - |" in text
    assert "one of 64 processes at 10<sup>9</sup> samples" in text
    assert "200 MB in the checkpoint, which holds 12.8 GB of all." in text
