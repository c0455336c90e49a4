"""``lightning-ast`` in this process, as a person would run it in a folder."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_ast.cli import main

BORING = "lightning.pytorch.demos.boring_classes.BoringModel"


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of the standard error."""
        return self.err.splitlines()[-1]


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """Work in a folder; forget the modules that were imported from it."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("COLUMNS", "200")
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6's use of it
        yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(path)):
            del sys.modules[name]


def run(*arguments: str, cwd: Path, status: int = 0) -> Done:
    """Run a command that must end with a status; any exception but SystemExit comes through."""
    out, err = io.StringIO(), io.StringIO()
    with folder(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = main(arguments)
        except SystemExit as left:
            ended = int(left.code or 0)
    done = Done(ended, out.getvalue(), err.getvalue())
    assert done.status == status, done
    assert "Traceback" not in done.err, done.err
    return done


def boring(*options: str) -> tuple[str, ...]:
    """The arguments of a fit of one batch that takes no time and logs nothing."""
    quiet = ("logger=false", "enable_progress_bar=false", "enable_model_summary=false", "enable_checkpointing=false")
    small = ("max_epochs=1", "limit_train_batches=1", "limit_val_batches=0", "accelerator=cpu")
    return (
        "fit",
        "--seed_everything=1",
        "--model",
        BORING,
        *(f"--trainer.{each}" for each in (*small, *quiet)),
        *options,
    )
