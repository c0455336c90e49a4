"""The benchmarks run from end to end where everything is tiny; their figures are not tested."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_overhead_measures_every_mode(benchmark: Any, tmp_path: Path) -> None:
    benchmark("overhead").main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "overhead-cpu.json").read_text())
    names = [row["variant"] for row in record["rows"]]
    assert names == ["plain", "warmup", "warmup of prune", "mask", "partial", "subset", "prune"]
    assert all(row["steps_a_round"] >= 6 for row in record["rows"])
    assert all(row["milliseconds"] > 0 for row in record["rows"])
    assert record["rows"][0]["share_of_plain"] == 1


def test_overhead_measures_a_short_run_and_leaves_the_process_as_it_was(benchmark: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    options = ["--tiny", "--short-run", "--threads", str(threads + 1), "--device", "cpu", "--out", str(tmp_path)]
    benchmark("overhead").main(options)
    record = json.loads((tmp_path / "overhead-short-run-cpu.json").read_text())
    assert [row["variant"] for row in record["rows"]] == ["plain", "partial, r = 0.4", "partial, r = 0.1"]
    assert gc.isenabled()
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_row_gradients_agree_on_a_cpu(benchmark: Any, tmp_path: Path) -> None:
    record = benchmark("row_gradients").main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert {(row["model"], row["precision"]) for row in record["rows"]} == {
        (model, precision) for model in ("groupnorm", "vit") for precision in ("32-true", "bf16-mixed")
    }
    assert all(row["passed"] for row in record["rows"]), record["rows"]


def test_gpu_day_goes_on_after_a_stage_that_fails(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    day = benchmark("gpu_day")

    def broken(_: Any) -> list[str]:
        raise day.StageError("nothing fits", ["a", "b"])

    monkeypatch.setitem(day.STAGES, 1, day.Stage("broken", broken))
    monkeypatch.setitem(day.STAGES, 2, day.Stage("faulty", lambda _: 1 / 0))
    monkeypatch.setitem(day.STAGES, 3, day.Stage("well", lambda _: ["all is well"]))
    options = ["--tiny", "--out", str(tmp_path)]
    assert day.main([*options, "--stage", "1", "--stage", "2", "--stage", "3"]) == 1
    stages = json.loads((tmp_path / "gpu-day-cpu.json").read_text())["stages"]
    assert [stages[number]["passed"] for number in "123"] == [False, False, True]
    assert stages["1"]["verdict"] == "nothing fits"
    assert stages["2"]["verdict"] == "ZeroDivisionError: division by zero"
    assert day.main([*options, "--list"]) == 0
    assert "3 well: all is well" in capsys.readouterr().out


def test_gpu_day_leaves_out_what_went_well(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = benchmark("gpu_day")
    called: list[int] = []
    for number in day.STAGES:
        passed = day.Stage("a stage", lambda _, number=number: [f"call {called.append(number)}"])
        monkeypatch.setitem(day.STAGES, number, passed)
    options = ["--tiny", "--out", str(tmp_path)]
    assert day.main([*options, "--stage", "2"]) == 0
    assert day.main(options) == 0
    assert sorted(called) == list(day.STAGES)
    assert day.main(options) == 0
    assert len(called) == len(day.STAGES)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of runs that are too small for their settings
def test_gpu_day_runs_every_stage_on_a_cpu(benchmark: Any, tmp_path: Path) -> None:
    day = benchmark("gpu_day")
    assert day.main(["--tiny", "--out", str(tmp_path)]) == 0
    stages = json.loads((tmp_path / "gpu-day-cpu.json").read_text())["stages"]
    assert len(stages) == len(day.STAGES)
    assert all(stage["passed"] for stage in stages.values())
    assert stages["5"]["verdict"] == "all runs are recorded"
    names = {json.loads(path.read_text())["benchmark"] for path in tmp_path.glob("*.json")}
    assert names >= {"row-gradients", "step-time", "image-loading", "advice", "overhead", "overhead-short-run"}
    runs = {json.loads(path.read_text())["policy"] for path in (tmp_path / "regimes").glob("*.json")}
    assert runs == {"dense", "prune", "random", "infobatch"}


@pytest.mark.slow
def test_step_time_compares_two_checkouts(benchmark: Any, tmp_path: Path) -> None:
    root = BENCHMARKS.parent
    options = ["--against", str(root), "--root", "digits", "--case", "vit-tiny-16", "--out", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "step_time.py"), *options]
    command += ["--steps", "4", "--skip", "2", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert done.returncode == 0
    record = json.loads((tmp_path / "step-time-against-cpu-vit-tiny-16.json").read_text())
    assert [row["rate"] for row in record["rows"]] == [0.4, 0.1]


def test_step_time_refuses_a_folder_that_is_no_checkout(benchmark: Any, tmp_path: Path) -> None:
    options = ["--root", "digits", "--against", str(tmp_path), "--case", "vit-tiny-16", "--out", str(tmp_path)]
    with pytest.raises(Exception, match="expected a checkout with lightning_ast/ in it"):
        benchmark("step_time").main(options)
