"""The page of a notebook: its text, its code and what that printed when it was last run.

Run `python docs/_notebook.py` after a change of the notebook; with `--execute` the notebook is run first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["execute", "main", "to_markdown"]

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"
PAGE = ROOT / "docs" / "recipes" / "walkthrough.md"


def to_markdown(notebook: dict[str, Any]) -> str:
    """Write the cells of a notebook as a page; code is marked as `python3`, as a cell needs those before it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python3\n{source}\n```")
        printed = "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def execute(path: Path) -> None:
    """Run a notebook in an empty folder and keep what it printed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # it holds the times of this run
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") == "stdout"]
    nbformat.write(notebook, path)


def main() -> None:
    """Make the page."""
    if "--execute" in sys.argv[1:]:
        execute(NOTEBOOK)
    PAGE.write_text(to_markdown(json.loads(NOTEBOOK.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
