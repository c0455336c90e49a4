"""The notebook runs from top to bottom, and its page on the site is what it holds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def pages() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "_notebook.py"))


def printed(notebook: dict[str, Any]) -> str:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert all(output.get("name") == "stdout" for output in outputs), outputs
    return "".join("".join(output["text"]) for output in outputs)


def test_the_page_is_that_of_the_notebook(pages: dict[str, Any]) -> None:
    notebook = json.loads(pages["NOTEBOOK"].read_text())
    assert pages["PAGE"].read_text() == pages["to_markdown"](notebook), "run: python docs/_notebook.py"
    assert "work of ours: 0." in printed(notebook), "it was run before it was committed"


def test_only_what_is_printed_comes_onto_the_page(pages: dict[str, Any]) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [{"name": "stdout", "text": ["1\n"]}, {"name": "stderr", "text": ["no\n"]}],
        },
        {"cell_type": "code", "source": ["x = 1"], "outputs": []},
    ]
    page = "# Title\ntext\n\n```python3\nprint(1)\n```\n\n```text\n1\n```\n\n```python3\nx = 1\n```\n"
    assert pages["to_markdown"]({"cells": cells}) == page


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_notebook_runs(pages: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    copy = tmp_path / "walkthrough.ipynb"
    source = pages["NOTEBOOK"].read_text().replace("epochs=10", "epochs=4").replace("round(10 *", "round(4 *")
    copy.write_text(source)
    pages["execute"](copy)
    told = printed(json.loads(copy.read_text()))
    assert "dense: accuracy" in told
    assert "epoch 3:  100%" in told, "the last epoch trains on everything"
    assert "report.html with" in told
