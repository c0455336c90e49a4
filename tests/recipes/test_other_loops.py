"""Loops without Lightning's Trainer: each trains on fewer samples through one call before the backward, and learns."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent.parent / "examples" / "other_loops"


def told(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[float, float]:
    """Run a script; return the last accuracy and share of the samples that it prints, in percent."""
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    *_, last = re.finditer(r"accuracy (\S+)%, trained on (\S+)% of ", capsys.readouterr().out)
    return float(last[1]), float(last[2])


def test_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, share = told("plain_pytorch", capsys)
    assert accuracy > 90
    assert share == pytest.approx(40, abs=2)


def test_fabric(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, share = told("with_fabric", capsys)
    assert accuracy > 93
    assert 10 < share < 60


@pytest.mark.slow
def test_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    accuracy, share = told("with_accelerate", capsys)
    assert accuracy > 93
    assert 10 < share < 60


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_hugging_face(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")  # transformers' Trainer needs it
    monkeypatch.setattr("sys.argv", ["with_hugging_face.py", "--max_steps", "30"])
    accuracy, share = told("with_hugging_face", capsys)
    assert accuracy > 10
    assert 50 < share <= 95
