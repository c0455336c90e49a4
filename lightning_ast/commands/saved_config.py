"""The configuration that a run saves beside its logs never replaces a file that no run wrote."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lightning_ast.config_mark import is_written_by_a_run, marked
from lightning_ast.whole_file import write_whole

__all__ = ["SavedConfig"]


class SavedConfig(SaveConfigCallback):
    """Save the configuration of a run as ``config.yaml`` in its log directory.

    A ``config.yaml`` that is there already is replaced only where an earlier run saved it, nobody has changed it since,
    and it is not itself one of the ``inputs`` of this run. In any other case the next free name of ``config_1.yaml``,
    ``config_2.yaml`` ... is taken, and the run tells which.
    """

    def __init__(self, parser: Any, config: Any, *, inputs: Iterable[str] = (), **options: Any) -> None:
        # Lightning itself would overwrite any file, or refuse to run where there is one
        super().__init__(parser, config, save_to_log_dir=False, **options)
        self.inputs = tuple(inputs)
        self._log_dir = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the configuration, once."""
        if not self.already_saved:
            self._log_dir = trainer.log_dir or trainer.default_root_dir  # every process asks: this broadcasts
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file; Lightning calls this in the first process alone."""
        text = marked(self.parser.dump(self.config, skip_none=False))
        system = get_filesystem(self._log_dir)
        system.makedirs(self._log_dir, exist_ok=True)
        folder = self._log_dir
        stem, ending = os.path.splitext(self.config_filename)  # noqa: PTH122 - a name, not a path
        names = chain([self.config_filename], (f"{stem}_{number}{ending}" for number in count(1)))
        wanted = path = os.path.join(folder, next(names))  # noqa: PTH118 - it may be an address such as s3://...
        local = isinstance(system, LocalFileSystem)
        while not (_local_is_free(path, text, self.inputs) if local else _remote_is_free(system, path)):
            path = os.path.join(folder, next(names))  # noqa: PTH118
        if local:
            write_whole(Path(path), text.encode())
        else:
            system.pipe_file(path, text.encode())
        if path != wanted:
            rank_zero_info(
                f"lightning-ast: the configuration of this run is saved as {path}: {wanted} is not a file that an "
                "earlier run saved, so it stays as it is."
            )


def _local_is_free(path: str, text: str, inputs: Iterable[str]) -> bool:
    """Tell whether a file may be written, or holds already what would be written."""
    if not os.path.lexists(path):
        return True
    # a link may lead to a file of anybody's
    if os.path.islink(path) or not os.path.isfile(path):  # noqa: PTH113, PTH114
        return False
    try:
        content = Path(path).read_bytes()
    except OSError:
        return False
    if not is_written_by_a_run(content):
        return False
    is_input = any(os.path.exists(name) and os.path.samefile(name, path) for name in inputs)  # noqa: PTH110, PTH121
    return not is_input or content == text.encode()


def _remote_is_free(system: Any, path: str) -> bool:
    return not system.exists(path) or (system.isfile(path) and is_written_by_a_run(system.cat_file(path)))
