"""Read the mode of execution from the ``config.yaml`` that ``lightning-ast fit`` saves beside its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ast.report.files import UnreadableError, reading
from lightning_ast.report.series import MODES

__all__ = ["read_mode"]

_MOST_BYTES = 2**17
"""A saved configuration has a few thousand; PyYAML takes a second for so many."""
_CALLBACK = "SparseSelectionCallback"


def read_mode(path: Path) -> tuple[str | None, None]:
    """Read the mode of the first ``SparseSelectionCallback`` in a configuration.

    Args:
        path: The file, which need not be there.

    Returns:
        The mode, or None where the file names none, as it may be someone else's; and None: it is never read in part.

    Raises:
        UnreadableError: It cannot be read, or is no configuration although it names the callback.
    """
    if not path.is_symlink() and not path.exists():
        return None, None
    with reading(path, most_bytes=_MOST_BYTES) as (file, size):
        text = file.read(size).decode("utf-8", "replace")
    if _CALLBACK not in text:
        return None, None
    import yaml

    try:
        # every scalar a str, and no merging: neither can a value fail to be made, nor grow from references to others
        callbacks = yaml.load(text, Loader=yaml.BaseLoader)["trainer"]["callbacks"]
        mode = _mode(callbacks if isinstance(callbacks, list) else [callbacks])
    except (KeyError, TypeError, AttributeError):
        return None, None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UnreadableError("cannot be read as YAML, so that the mode is not known") from error
    if mode is not None and mode not in MODES:
        raise UnreadableError(f"names no mode that is known: expected one of {', '.join(MODES)}")
    return mode, None


def _mode(callbacks: list[Any]) -> Any:
    for callback in callbacks:
        if callback["class_path"].rsplit(".", 1)[-1] == _CALLBACK:
            return callback["init_args"]["mode"]
    return None
