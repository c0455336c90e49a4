"""Write the files of a report, without touching a file that no report wrote."""

from __future__ import annotations

import base64
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning_ast.errors import ReportError
from lightning_ast.report.page import GENERATOR, SOFTWARE
from lightning_ast.whole_file import write_whole

__all__ = ["check_files", "write_files"]

_MARKS = {".html": GENERATOR.encode(), ".png": b"Software\0" + SOFTWARE.encode()}
_HEAD_BYTES = 1024


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse to write where something stands that is not a report's own file.

    Links are refused too: through them a file elsewhere would be replaced, or would no longer be the same file.

    Args:
        folder: Where to; it need not be there.
        names: The names of a page and its pictures.

    Raises:
        ReportError: Something else stands there.
        OSError: It cannot be looked at.
    """
    for name in names:
        _check(folder / name)


def _check(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        what = "a link"
    elif not stat.S_ISREG(status.st_mode):
        what = "no file"
    elif status.st_nlink > 1:
        what = "a file with a second name (a hard link)"
    elif not _is_own(path):
        what = "a file that no report wrote"
    else:
        return
    raise ReportError(f"expected to write {path}, but it is {what}: move it away, or give another folder with --out.")


def write_files(folder: Path, pictures: Mapping[str, bytes], page: tuple[str, bytes]) -> None:
    """Write a page and its pictures, each as a whole or not at all, and remove the pictures of an earlier page.

    Args:
        folder: Where to; made where it is not there.
        pictures: The contents by name.
        page: Its name and content.

    Raises:
        ReportError: A file that is not a report's own stands in the way; nothing was written.
        OSError: Writing fails.
    """
    files = {**pictures, page[0]: page[1]}
    check_files(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _pictures_of(folder / page[0])
    for name, content in files.items():
        write_whole(folder / name, content)
    for path in earlier - {folder / name for name in pictures}:
        path.unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARKS[path.suffix] in file.read(_HEAD_BYTES)


def _pictures_of(page: Path) -> set[Path]:
    """Find the files beside an earlier page that hold its pictures; any other file may be a person's."""
    if not page.is_file():
        return set()
    shown = set(re.findall(rb'src="data:image/png;base64,([^"]*)"', page.read_bytes()))
    return {
        path
        for kind in ("comparison", "dashboard-*", "samples-*", "costs-*")
        for path in page.parent.glob(f"{kind}.png")
        if _is_plain(path) and base64.b64encode(path.read_bytes()) in shown
    }


def _is_plain(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1
