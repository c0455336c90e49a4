"""Open the files that a report reads: ordinary files of a bounded size, and nothing else."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lightning_ast.words import counted

__all__ = ["UnreadableError", "reading"]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableError(Exception):
    """A file is left out; the message tells why."""


@contextmanager
def reading(path: Path, *, most_bytes: int | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file for reading; yield it and its size in bytes. Whatever is amiss becomes an UnreadableError.

    A file may grow meanwhile: read no further than its size.
    """
    try:
        # opening a pipe waits for its writer, and reading a device may never end
        status = path.stat()
        kind = stat.S_IFMT(status.st_mode)
        if kind != stat.S_IFREG:
            raise UnreadableError(f"is {_KINDS.get(kind, 'something else')}, not a file")
        if most_bytes is not None and status.st_size > most_bytes:
            raise UnreadableError(f"has {counted(status.st_size, 'byte')}, of which a report reads {most_bytes:,}")
        with path.open("rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror or error})") from error
