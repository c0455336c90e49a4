"""Write a file as a whole or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write to a second file and rename it: even on a full disk, the old file or the new one is there as a whole.

    A hard link to the file that was there keeps the old content.
    """
    # In the same folder: a rename is one step within a file system alone.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
