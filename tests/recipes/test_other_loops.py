"""Loops without Lightning's Trainer: each trains on fewer samples through one call before the backward, and learns."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "other_loops"


def figures(name: str, method: str, **options: Any) -> dict[str, float]:
    """Run a script's function."""
    found: dict[str, float] = runpy.run_path(str(FOLDER / f"{name}.py"))["train"](method, **options)
    return found


def check_it_learns(name: str) -> None:
    """A whole run trains on half of the samples, and a dense one on all."""
    ours = figures(name, "ours")
    assert ours["test_accuracy"] > 0.93
    assert 0.3 < ours["trained_on"] < 0.6
    assert figures(name, "dense", max_steps=5)["trained_on"] == 1


def printed_by_two_processes(*command: str, **environment: str) -> list[dict[str, float]]:
    """Run a script that makes a process group of two; return what each process prints."""
    done = subprocess.run(
        [sys.executable, *command, "--max_steps=20"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # two processes that print at once may put both on one line
    return [ast.literal_eval(printed) for printed in re.findall(r"\{.*?\}", done.stdout)]


def check_they_are_one(first: dict[str, float], second: dict[str, float]) -> None:
    assert first["test_accuracy"] == second["test_accuracy"] > 0.7
    assert first["trained_on"] == pytest.approx(second["trained_on"], abs=0.15)
    assert max(first["trained_on"], second["trained_on"]) < 1


def test_plain_pytorch() -> None:
    check_it_learns("plain_pytorch")


def test_fabric() -> None:
    check_it_learns("with_fabric")


@pytest.mark.slow
def test_fabric_with_two_processes() -> None:
    check_they_are_one(*printed_by_two_processes(str(FOLDER / "with_fabric.py"), "--devices=2"))


@pytest.mark.slow
def test_accelerate() -> None:
    pytest.importorskip("accelerate")
    check_it_learns("with_accelerate")


@pytest.mark.slow
def test_accelerate_with_two_processes() -> None:
    pytest.importorskip("accelerate")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2")
    check_they_are_one(*printed_by_two_processes(*launcher, str(FOLDER / "with_accelerate.py")))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_hugging_face() -> None:
    pytest.importorskip("accelerate")  # transformers' Trainer needs it
    ours = figures("with_hugging_face", "ours", max_steps=60)
    assert ours["test_accuracy"] > 0.12
    assert 0.5 < ours["trained_on"] <= 0.95
    assert figures("with_hugging_face", "dense", max_steps=2)["trained_on"] == 1
