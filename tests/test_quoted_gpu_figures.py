"""Figures of a GPU that README and the pages quote are those of the records."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

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


def run_of(folder: str, setting: str) -> dict[str, Any]:
    """The record of the first seed."""
    path = RECORDS / folder / f"cifar10-n50000-resnet964-e32-b256-{setting}-s0.json"
    return dict(json.loads(path.read_text()))


def percent(run: dict[str, Any], digits: int = 2) -> str:
    return f"{100 * run['accuracy']:.{digits}f}"


def test_steps() -> None:
    resnet, vit = steps("resnet50-256"), steps("vit-b-128")
    share = resnet["prune"]["share_of_dense"]
    assert f"A step of ResNet-50 on 0.4 of 256 images took {share:.2f} of the dense one in `prune`" in text_of(
        "README.md"
    )
    said = "`partial` is quicker there only where a dense step takes more than a tenth of a second"
    assert said in text_of("README.md")
    for name in ("resnet50-256", "vit-b-128", "resnet50-768", "vit-b-512"):
        record = json.loads((RECORDS / f"step-time-gpu-{name}.json").read_text())
        dense_milliseconds = next(row["milliseconds"] for row in record["rows"] if row["mode"] == "dense")
        assert (steps(name)["partial"]["share_of_dense"] < 1) == (dense_milliseconds > 100), name
    page = text_of("docs/modes/partial.md")
    slow = [f"{each['partial']['share_of_dense']:.1f}" for each in (resnet, vit)]
    assert f"took {' and '.join(slow)} times the dense ones" in page
    large = [steps(name)["partial"]["share_of_dense"] for name in ("vit-b-512", "resnet50-768")]
    assert f"with a batch of 512 took {large[0]:.2f} of it, ResNet-50 with 768 took {large[1]:.2f}" in page
    results = text_of("docs/results.md")
    assert f"has {large[0]:.2f} of it in `partial`; ResNet-50 with 768 images {large[1]:.2f}" in results
    dense, partial = ([f"{each['host'][mode]:.0f}" for each in (resnet, vit)] for mode in ("dense", "partial"))
    assert f"a dense step of 8 samples takes {' and '.join(dense)} ms" in results
    assert f"one of `partial` {' and '.join(partial)} ms" in results
    assert all(each[mode]["share_of_dense"] > 1 for each in (resnet, vit) for mode in ("partial", "subset"))


def test_a_strong_network_in_a_long_run() -> None:
    work = resnet9("prune-coverage0.97-gatesoft-stepsfollow", "work_epochs") / resnet9("dense", "work_epochs")
    readme, page = text_of("README.md"), text_of("docs/results.md")
    assert f"a coverage of 0.97, which skipped {1 - work:.2f} of the work" in readme
    assert f"the last epochs, {work:.2f} of the work in all" in page
    assert f"({100 * resnet9('dense', 'train_accuracy'):.1f} % on the images that it trains on)" in page
    skipped = 1 - resnet9("infobatch", "work_epochs") / resnet9("dense", "work_epochs")
    assert f"InfoBatch's rule lost 0.11 ± 0.12 there and skipped {skipped:.2f}" in readme


def test_a_run_alone_on_a_gpu() -> None:
    dense, ours = (
        run_of("regimes-gpu-alone", setting)
        for setting in ("dense", "prune-coverage0.9-gatesoft-stepsfollow-cooldown4")
    )
    (took, joules), (plain, energy) = ((run["seconds"], run["joules"] / 1000) for run in (ours, dense))
    readme, page = text_of("README.md"), text_of("docs/results.md")
    assert f"took {took:.0f} s and {joules:.1f} kJ, alone on an H200" in readme
    assert f"dense training took {plain:.0f} s and {energy:.1f} kJ" in readme
    work = ours["work_epochs"] / dense["work_epochs"]
    assert f"({work:.2f} of the work, {percent(ours, 1)} % against {percent(dense, 1)} %, one run each)" in readme
    assert (
        f"took {plain:.0f} s and {energy:.1f} kJ of dense training, and {took:.0f} s and {joules:.1f} kJ with" in page
    )
    assert (
        f"{took / plain:.2f} of the seconds and {joules / energy:.2f} of the joules for {work:.2f} of the work" in page
    )
    assert f"and {percent(ours)} % against {percent(dense)} %" in page


def test_the_last_eighth_of_a_strong_network() -> None:
    dense = resnet9("dense", "work_epochs")
    kept, follow, more, careful, bounded = (
        resnet9(f"prune-coverage{each}", "work_epochs") / dense
        for each in (
            "0.97-gatesoft-stepskeep-cooldown4",
            "0.97-gatesoft-stepsfollow-cooldown4",
            "0.99-gatesoft-stepsfollow-cooldown4",
            "0.99-gatesoft-stepskeep-cooldown4",
            "0.97-gatesoft-stepsfollow-cooldown4-weightingunbiased-ideabounded",
        )
    )
    page, readme = text_of("docs/results.md"), text_of("README.md")
    assert f"lost 0.53 ± 0.03 with the last eighth dense and schedules that follow, at {follow:.2f} of the work" in page
    assert f"0.28 ± 0.09 with the steps kept, at {kept:.2f}." in page
    assert f"for more work: 0.38 ± 0.12 at {more:.2f} with schedules that follow" in page
    assert f"0.16 ± 0.10 at {careful:.2f} with the steps kept" in page
    assert f"with schedules that follow: 0.20 ± 0.07 at {bounded:.2f}." in page
    assert f"at a coverage of 0.99 0.16 ± 0.10 at {careful:.2f}." in text_of("docs/coverage.md")
    assert f"steps kept it lost 0.28 ± 0.09 and skipped {1 - kept:.2f}" in readme
    assert f"at a coverage of 0.99 it lost 0.16 ± 0.10 and skipped {1 - careful:.2f}" in readme
    shortened = resnet9("dense-length21", "work_epochs") / dense
    assert f"A dense run of 21 epochs lost 0.31 ± 0.09 and skipped {1 - shortened:.2f}" in readme


def test_joules() -> None:
    record = json.loads((RECORDS / "energy-gpu.json").read_text())
    assert f"its counter gave {record['ratio']:.2f} of the integral" in text_of("docs/monitoring.md")
