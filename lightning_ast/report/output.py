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
    """Refuse to write where something stands that is not a report's own file; the folder need not be there."""
    for path in (folder / name for name in names):
        if what := _fault(path):
            raise ReportError(
                f"expected to write {path}, but it is {what}: move it away, or give another folder with --out."
            )


def _fault(path: Path) -> str | None:
    """Describe what stands in the place of a report's own file, if anything does."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    # through a link a file elsewhere would be replaced, or would no longer be the same file
    if stat.S_ISLNK(status.st_mode):
        return "a link"
    if not stat.S_ISREG(status.st_mode):
        return "no file"
    if status.st_nlink > 1:
        return "a file with a second name (a hard link)"
    with path.open("rb") as file:
        return None if _MARKS[path.suffix] in file.read(_HEAD_BYTES) else "a file that no report wrote"


def write_files(folder: Path, pictures: Mapping[str, bytes], page: tuple[str, bytes]) -> None:
    """Write a page (name and content) and its pictures (contents by name), and remove those of an earlier page."""
    files = {**pictures, page[0]: page[1]}
    check_files(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _pictures_of(folder / page[0])  # asked before the page is replaced, which tells which were its own
    for name, content in files.items():
        write_whole(folder / name, content)
    for path in earlier - {folder / name for name in pictures}:
        path.unlink(missing_ok=True)


def _pictures_of(page: Path) -> set[Path]:
    """Find the files beside an earlier page that hold its pictures; any other file may be a person's."""
    if not page.is_file():
        return set()
    shown = set(re.findall(rb'src="data:image/png;base64,([^"]*)"', page.read_bytes()))
    return {
        path
        for kind in ("comparison", "dashboard-*", "samples-*", "costs-*")
        for path in page.parent.glob(f"{kind}.png")
        if _fault(path) is None and base64.b64encode(path.read_bytes()) in shown
    }
