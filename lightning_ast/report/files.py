"""A search for the folders that hold a run's log, and the opening of the files in them that a report reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from lightning_ast.errors import ReportError

__all__ = ["CSV", "EVENTS", "UnreadableError", "find_runs", "reading", "run_names"]

EVENTS = "events.out.tfevents.*"
CSV = "metrics.csv"


class UnreadableError(Exception):
    """A file is left out; the message tells why."""


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; raise an :class:`UnreadableError` where it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe waits for its writer
            raise UnreadableError("is not a file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror or error})") from error


def find_runs(log_dirs: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Find folders at or below ``log_dirs`` that hold a log, each once; and a line for each that cannot be read."""
    if not log_dirs:
        raise ReportError("expected at least one folder with logs, got none.")
    found: dict[Path, Path] = {}
    lines: dict[str, None] = {}
    for given in log_dirs:
        root = Path(given).expanduser()
        logs, unreadable = _walk(_absolute(root, given))
        if not logs and not unreadable:
            raise ReportError(
                f"no logs in or below {given}: looked for {EVENTS} (TensorBoardLogger) and {CSV} (CSVLogger). "
                "Pass one of these loggers to the Trainer, and its save_dir to the report."
            )
        lines.update(dict.fromkeys(unreadable))
        for real, path in logs.items():
            if path == real or real not in found:  # a run that is also there without a link has its own path
                found[real] = path
    return sorted(found.values()), list(lines)


def _absolute(root: Path, given: str | Path) -> Path:
    if not root.is_dir():
        what = "a file" if root.exists() else "not there"
        raise ReportError(f"expected a folder with logs, but {given} is {what}: give the folder a logger wrote to.")
    # a link keeps its own name, which is the one the user gave; .. after a link must be resolved
    return root.resolve() if ".." in root.parts else root.absolute()


def _walk(root: Path) -> tuple[dict[Path, Path], list[str]]:
    """Find folders with logs, by their real paths, and a line for each that cannot be listed."""
    # links to folders are followed, as TensorBoard does, but last: a run that is there without a link is found so
    found: dict[Path, Path] = {}
    lines: list[str] = []
    visited: set[Path] = set()
    waiting = [root]
    top = root.resolve()

    def refused(error: OSError) -> None:
        lines.append(f"{error.filename}: cannot be listed ({error.strerror})")

    for start in waiting:  # grows by the links that are found
        for name, folders, files in os.walk(start, onerror=refused):
            folder = Path(name)
            real = folder.resolve()
            if real in visited:  # a link into what was seen, or above itself
                folders.clear()
                continue
            visited.add(real)
            # a folder with the name of a log is no log, but it is reported as one that cannot be read
            if any(entry == CSV or fnmatchcase(entry, EVENTS) for entry in (*files, *folders)):
                found[real] = folder
            folders.sort()
            # Path.is_symlink raises an error in a folder that can be listed but not entered
            links = [folder / below for below in folders if os.path.islink(folder / below)]  # noqa: PTH114
            # never up and out of the folder that was given: a link to / would list the whole machine
            waiting += [link for link in links if not top.is_relative_to(link.resolve())]
    return found, lines


def run_names(folders: Sequence[Path]) -> list[str]:
    """Shorten names: the path from the common parent on, without the last parts that are the same for all runs."""
    if not folders:
        return []
    parents = [folder.parent for folder in folders]
    common = Path(os.path.commonpath(folders if len(folders) > 1 else parents))
    parts = [folder.relative_to(common).parts or (folder.name,) for folder in folders]
    if len(set(parts)) < len(parts):  # dup and dup/dup: the parent tells them apart
        parts = [folder.relative_to(common.parent).parts for folder in folders]
    while min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]
