"""What a report writes: its own files as a whole, and never another one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_ast.cli import main
from lightning_ast.errors import ReportError
from lightning_ast.report import write_report
from lightning_ast.report.write import write_files

FOREIGN = b"<!DOCTYPE html><html><body>mine, of lightning-ast report</body></html>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with logs of two runs in ``logs``, and their report in ``out``."""
    root = tmp_path_factory.mktemp("made")
    for name in ("one", "two"):
        (root / "logs" / name).mkdir(parents=True)
        (root / "logs" / name / "metrics.csv").write_text("epoch,step,val_acc\n0,1,0.5\n")
    write_report([root / "logs"], root / "out")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["report.html", "comparison.png", "dashboard-two.png"])
def test_what_no_report_wrote_is_refused_and_stays(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "out" / name).write_bytes(FOREIGN)
    before = content(root / "out")
    assert main(["report", str(root / "logs"), "--out", str(root / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"lightning-ast: expected to write {root}/out/{name}, but it is a file that no report wrote: move it away, or "
        "give another folder with --out."
    )
    assert content(root / "out") == before


def test_a_link_is_replaced_and_what_it_leads_to_stays(root: Path) -> None:
    shutil.move(root / "out" / "report.html", root / "kept.html")
    (root / "out" / "report.html").symlink_to(root / "kept.html")
    before = (root / "kept.html").read_bytes()
    write_report([root / "logs" / "one"], root / "out")
    assert not (root / "out" / "report.html").is_symlink()
    assert (root / "kept.html").read_bytes() == before


def test_own_files_are_replaced_and_own_pictures_removed(root: Path) -> None:
    """Not those that have a picture's name alone."""
    out = root / "out"
    before = content(out)
    (out / "dashboard-holiday.png").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine")
    page = write_report([root / "logs" / "two"], out)
    after = content(out)
    assert set(after) == {"report.html", "dashboard-two.png", "dashboard-holiday.png", "notes.txt"}
    assert after["report.html"] != before["report.html"]
    assert page == out / "report.html"


def test_a_report_that_could_not_be_finished_leaves_the_earlier_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(root / "out")

    def full(path: Path, *_: Any) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ReportError, match=r"cannot write the report to .*No space left"):
        write_report([root / "logs"], root / "out")
    assert content(root / "out") == before, "no rest of it is left beside"


def test_files_are_as_readable_as_any_that_the_user_makes(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_files(tmp_path / "out", {"report.html": b""})
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "report.html").stat().st_mode & 0o777 == 0o644


def test_the_folder_itself_may_be_a_link(root: Path) -> None:
    (root / "through").symlink_to(root / "out")
    assert write_report([root / "logs"], root / "through").resolve() == root / "out" / "report.html"
