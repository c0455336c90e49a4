"""Mark the configuration that a run saves, so that it can be told from a file that a person wrote."""

from __future__ import annotations

import hashlib

__all__ = ["is_written_by_a_run", "marked"]

_MARK = "# Saved by a run of lightning-ast; sha256 of the lines below: "


def marked(text: str) -> str:
    r"""Put a line before a configuration that tells later whether anybody has changed it.

    Example:
        >>> is_written_by_a_run(marked("trainer: {}\n").encode())
        True
        >>> is_written_by_a_run(marked("trainer: {}\n").encode() + b"# mine\n")
        False
    """
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def is_written_by_a_run(content: bytes) -> bool:
    """Tell whether a file is what a run saved, and nobody has changed a byte of it since."""
    first, _, rest = content.partition(b"\n")
    return first == f"{_MARK}{hashlib.sha256(rest).hexdigest()}".encode()
