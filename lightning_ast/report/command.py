"""The command ``lightning-ast report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from lightning_ast.errors import ReportError
from lightning_ast.report.texts import readable
from lightning_ast.report.write import make_report

__all__ = ["report_command"]


def report_command(log_dirs: Sequence[str], out: str) -> int:
    """Write a report; print where it is, and what was left out of it.

    Args:
        log_dirs: Folders with logs in them, at any depth.
        out: The folder to write to.

    Returns:
        The exit status: 0, or 2 where no report was written.
    """
    try:
        page, left_out = make_report(log_dirs, out, progress=True)
    except ReportError as error:
        _print(f"lightning-ast: {error}", sys.stderr)
        return 2
    for line in left_out:
        _print(f"lightning-ast: left out: {line}", sys.stderr)
    _print(str(page), sys.stdout)
    return 0


def _print(text: str, stream: TextIO) -> None:
    """Print a line of names that may be of any bytes, none of which is to command the terminal."""
    encoding = stream.encoding or "utf-8"
    print(readable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream)
