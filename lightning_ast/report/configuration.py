"""Read the mode of execution from the configuration that ``lightning-ast fit`` saves beside its log."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_ast.config_mark import is_written_by_a_run
from lightning_ast.mode_facts import MODES
from lightning_ast.report.files import UnreadableError, reading

__all__ = ["configuration_among", "read_mode"]

_CALLBACK = "SparseSelectionCallback"
_NAME = re.compile(r"config(?:_(\d{1,9}))?\.yaml")


def configuration_among(files: Sequence[Path]) -> Path | None:
    """Find the newest configuration that a run saved among the files of its folder, else a ``config.yaml``."""
    # A run leaves a person's config.yaml alone, and takes config_1.yaml: only that holds what the command line changed.
    numbers = {path: int(found[1] or 0) for path in files if (found := _NAME.fullmatch(path.name))}
    times = {path: time for path in numbers if (time := _saved_at(path)) is not None}
    if times:
        return max(times, key=lambda path: (times[path], numbers[path]))
    return next((path for path in numbers if path.name == "config.yaml"), None)


def _saved_at(path: Path) -> int | None:
    """Return when a run saved this file; None where no run did, or it cannot be read."""
    try:
        with reading(path) as file:
            return os.fstat(file.fileno()).st_mtime_ns if is_written_by_a_run(file.read()) else None
    except UnreadableError:
        return None


def read_mode(path: Path) -> tuple[str | None, None]:
    """Return the mode of the first selection callback in a configuration file, and None: nothing is left out."""
    with reading(path) as file:
        text = file.read().decode("utf-8", "replace")
    if _CALLBACK not in text:  # it may be the file of another program
        return None, None
    import yaml

    try:
        # every scalar a str: no value can fail to be made
        callbacks = yaml.load(text, Loader=yaml.BaseLoader)["trainer"]["callbacks"]
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        own = (each for each in listed if each["class_path"].rsplit(".", 1)[-1] == _CALLBACK)
        mode = next((each["init_args"]["mode"] for each in own), None)
    except (KeyError, TypeError, AttributeError):
        return None, None
    except yaml.YAMLError as error:
        raise UnreadableError("cannot be read as YAML, so that the mode is not known") from error
    if mode is not None and mode not in MODES:
        raise UnreadableError(f"names no mode that is known: expected one of {', '.join(MODES)}")
    return mode, None
