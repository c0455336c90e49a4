"""The parts that benchmarks share: a quiet Trainer, the place of records, facts of the machine and the code."""

from __future__ import annotations

import json
import logging
import platform
import shutil
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


def silence_lightning() -> None:
    """Leave out what Lightning tells of every Trainer: a benchmark makes hundreds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def on_gpu(device: str | None = None) -> bool:
    """Tell whether a benchmark runs on a GPU: on ``device`` ("cpu" or "cuda"), or by default where there is one."""
    return torch.cuda.is_available() if device is None else device == "cuda"


def hardware(device: str | None = None) -> str:
    """Name the GPU, or the CPU with its number of threads."""
    if on_gpu(device):
        return torch.cuda.get_device_name()
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def commit(folder: Path | None = None) -> str:
    """Name the commit that was measured, with a mark where the tree had changes, but for records.

    Args:
        folder: The checkout; None takes the current folder.

    Returns:
        The short hash, or "unknown" for a copy without history and where git is missing.
    """
    if shutil.which("git") is None or (folder is not None and not (folder / ".git").exists()):
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    name = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "-uno", "--", ":!benchmarks/records")
    return (name or "unknown") + ("+changes" if changed else "")


def provenance(device: str | None = None) -> dict[str, Any]:
    """Collect hardware, versions, commit and day."""
    return {
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def kind(device: str | None = None) -> str:
    """Return ``"gpu"`` or ``"cpu"``, for the names of records."""
    return "gpu" if on_gpu(device) else "cpu"


def save(record: dict[str, Any], name: str, *, folder: Path = RECORDS, indent: int | None = None) -> Path:
    """Write ``<name>.json``, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=indent) + "\n")
    return path
