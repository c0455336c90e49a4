"""Figures of a GPU that README and the pages quote are those of the records."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "records"


def text_of(page: str) -> str:
    return " ".join((ROOT / page).read_text().replace("**", "").split())


def steps(model: str) -> dict[str, dict[str, Any]]:
    """The rows of a record at r = 0.4, by mode, and what the host takes."""
    record = json.loads((RECORDS / f"step-time-gpu-{model}.json").read_text())
    return {**{row["mode"]: row for row in record["rows"] if row["rate"] == 0.4}, "host": record["host_milliseconds"]}


def resnet9(setting: str, value: str) -> float:
    files = (RECORDS / "regimes-gpu").glob(f"cifar10-n50000-resnet964-e32-b256-{setting}-s*.json")
    runs = [json.loads(path.read_text()) for path in files]
    assert len(runs) == 5
    return statistics.mean(run[value] for run in runs)


def test_steps() -> None:
    resnet, vit = steps("resnet50-256"), steps("vit-b-128")
    share = resnet["prune"]["share_of_dense"]
    assert f"a step of ResNet-50 on 0.4 of 256 images took {share:.2f} of the dense one in `prune`" in text_of(
        "README.md"
    )
    slow = [f"{each['partial']['share_of_dense']:.1f}" for each in (resnet, vit)]
    assert f"took {' and '.join(slow)} times the dense ones" in text_of("docs/modes/partial.md")
    hosts = [f"{each['host']['dense']:.0f}" for each in (resnet, vit)]
    assert f"a dense step of 8 samples takes {' and '.join(hosts)} ms" in text_of("docs/results.md")
    assert all(each["host"]["partial"] / each["host"]["dense"] == pytest.approx(2, abs=0.1) for each in (resnet, vit))
    assert all(each[mode]["share_of_dense"] > 1 for each in (resnet, vit) for mode in ("partial", "subset"))


def test_a_strong_network_in_a_long_run() -> None:
    work = resnet9("prune-coverage0.97-gatesoft-stepsfollow", "work_epochs") / resnet9("dense", "work_epochs")
    assert f"a coverage of 0.97, which skipped {1 - work:.2f} of the work" in text_of("README.md")
    page = text_of("docs/results.md")
    assert f"the last epochs, {work:.2f} of the work in all" in page
    assert f"({100 * resnet9('dense', 'train_accuracy'):.1f} % on the images that it trains on)" in page


def test_joules() -> None:
    record = json.loads((RECORDS / "energy-gpu.json").read_text())
    assert f"its counter gave {record['ratio']:.2f} of the integral" in text_of("docs/monitoring.md")
