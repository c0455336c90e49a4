"""README's Python runs as it stands, its links lead somewhere, its tables are those of the records."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Epoch 4/4 | Loss:" in done.stdout or "relative error of the gradients" in done.stdout


def test_there_is_a_block_to_run() -> None:
    assert BLOCKS


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", TEXT))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_tables_are_the_records() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "summarize.py"), "--check"], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", TEXT, re.M))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
