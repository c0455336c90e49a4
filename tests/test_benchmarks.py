"""The benchmarks run from end to end where everything is tiny; their figures are not tested."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """Write random images in CIFAR-10's format."""
    random = np.random.default_rng(0)
    arrays = {}
    for pixels, labels, count in (("x", "y", 256), ("xt", "yt", 20)):
        arrays[pixels] = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[labels] = random.integers(0, 10, count)
    path = tmp_path / "cifar10.npz"
    np.savez(path, **arrays)
    return path


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


def test_gpu_heart_goes_on_after_a_section_that_fails(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--against", str(tmp_path / "missing")]
    options = ["--tiny", "--sections", "steps", "accuracy", "--out", str(tmp_path / "out"), *missing]
    assert benchmark("gpu_heart").main(options) == 1
    printed = capsys.readouterr().out
    assert "FAIL CheckoutError: expected a checkout with lightning_ast/ in it" in printed
    assert "left out: needs --root" in printed


@pytest.mark.slow
def test_gpu_heart_trains_on_cifar10_and_packs_the_records(benchmark: Any, tmp_path: Path, cifar10: Path) -> None:
    out, archive = tmp_path / "out", tmp_path / "records"
    options = ["--tiny", "--sections", "accuracy", "--root", str(cifar10), "--jobs", "0", "--seeds", "1"]
    assert benchmark("gpu_heart").main([*options, "--out", str(out), "--archive", str(archive)]) == 0
    records = [json.loads(path.read_text()) for path in out.iterdir()]
    assert {record["policy"] for record in records} == {"dense", "partial", "prune"}
    assert len(ZipFile(f"{archive}.zip").namelist()) == 3


@pytest.mark.slow
def test_gpu_heart_runs_from_end_to_end(tmp_path: Path, cifar10: Path) -> None:
    root, out = BENCHMARKS.parent, tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu_heart.py"), "--tiny", "--jobs", "1", "--seeds", "1"]
    command += ["--against", str(root), "--root", str(cifar10), "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert done.returncode == 0
    names = {json.loads(path.read_text())["benchmark"] for path in out.iterdir()}
    assert names == {"row-gradients", "step-time-against", "overhead", "overhead-short-run", "cifar10-resnet9"}
