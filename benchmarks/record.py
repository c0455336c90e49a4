"""What the benchmarks share: a quiet Trainer, where records lie, what each says of the machine and the code."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch

RECORDS = Path(__file__).parent / "records"

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of a Trainer that measures and writes nothing itself."""


def hardware() -> str:
    """In words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def commit() -> str:
    """The commit that was measured, with a mark where the tree had changes, but for records."""
    run = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, check=False).stdout.strip()  # noqa: E731
    return run("rev-parse", "--short", "HEAD") + (
        "+changes" if run("status", "--porcelain", "-uno", "--", ":!benchmarks/records") else ""
    )


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and day."""
    return {
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def kind() -> str:
    """``"gpu"`` or ``"cpu"``, for the names of records."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def save(record: dict[str, Any], name: str, *, folder: Path = RECORDS, indent: int | None = None) -> Path:
    """Write ``<name>.json``; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=indent) + "\n")
    return path
