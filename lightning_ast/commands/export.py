"""The command ``lightning-ast export``: what a checkpoint remembers of each sample, as a table."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_ast.core.state import reading
from lightning_ast.errors import UsageError
from lightning_ast.pruning.score_files import write_parts
from lightning_ast.words import counted

__all__ = ["export_command"]


def export_command(checkpoint: Path, out: Path, *, trust: bool) -> int:
    """Write the scores in a checkpoint of a run in mode ``prune`` to a CSV or Parquet file.

    Args:
        checkpoint: A checkpoint of Lightning's.
        out: The file to write to.
        trust: Whether the file may run code of its own while it is loaded.

    Returns:
        The number of samples.
    """
    owner, state = _state_in(_loaded(checkpoint, trust=trust), checkpoint)
    with reading(state, owner=owner):
        epochs = state.get("epochs")
        if epochs is None or epochs["history"] is None:
            mode = state["rule"]["mode"]
            raise UsageError(f"{checkpoint} is of a run in mode={mode!r}: only mode='prune' remembers samples")
        write_parts(out, state)
        return sum(len(part["history"]["scores"]) for part in state.get("parts", [epochs]))


def _loaded(path: Path, *, trust: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        if not trust and isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise UsageError(
                f"{path} holds objects that can run code while they are loaded: add --trust if you know where it comes "
                "from"
            ) from error
        raise UsageError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _state_in(checkpoint: Any, path: Path) -> tuple[str, dict[str, Any]]:
    """Find the state of the selection callback, which may be of a subclass with another name."""
    states = (checkpoint.get("callbacks") or {}) if isinstance(checkpoint, dict) else {}
    found = [(str(key), s) for key, s in states.items() if isinstance(s, dict) and {"rule", "selector"} <= s.keys()]
    if len(found) != 1:
        raise UsageError(
            f"{path}: expected the state of one SparseSelectionCallback among {counted(len(states), 'callback')}, "
            f"got {len(found)}"
        )
    return found[0]
