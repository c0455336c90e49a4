"""A text in memory, and its windows as the samples of a language model."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lightning_ast.errors import DataNotFoundError

__all__ = ["DEBIAN_JARGON_FILE", "load_text", "text_windows"]

DEBIAN_JARGON_FILE = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
"""The Jargon File 4.4.7, 1.7 MB in the public domain: ``apt-get install jargon-text``."""


def load_text(path: str | Path | None = None) -> bytes:
    """Read a text file, plain or ``.gz``.

    Args:
        path: The file; None takes the Jargon File of Debian's package ``jargon-text``.

    Returns:
        The bytes of the text.

    Raises:
        DataNotFoundError: There is no such file.
    """
    file = DEBIAN_JARGON_FILE if path is None else Path(path).expanduser()
    if not file.is_file():
        raise DataNotFoundError(
            f"expected a text file, found none at {file}. Do one of these:\n"
            "  - pass --text FILE with a plain or gzipped text of your own, 0.5 MB or more\n"
            "  - on Debian or Ubuntu: apt-get install jargon-text"
        )
    raw = file.read_bytes()
    return gzip.decompress(raw) if file.suffix == ".gz" else raw


def text_windows(text: bytes, length: int) -> TensorDataset:
    """Cut a text into windows that follow one another: ``(inputs, targets)``, ``(N, length)`` each, int64.

    The targets are the inputs moved by one byte: what a language model is to predict. A rest at the end is left out.

    Example:
        >>> inputs, targets = text_windows(b"abcdefgh", 3).tensors
        >>> bytes(inputs[1].tolist()), bytes(targets[1].tolist())
        (b'def', b'efg')
    """
    tokens = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    count = (len(tokens) - 1) // length
    if count < 1:
        raise DataNotFoundError(f"expected a text of more than {length} bytes, got {len(text)}: pass a longer one.")
    return TensorDataset(tokens[: count * length].view(count, length), tokens[1 : count * length + 1].view(count, -1))
