"""What a report writes: its page, and never over another file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_ast.cli import main
from lightning_ast.errors import ReportError
from lightning_ast.report import write_report

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


def test_what_no_report_wrote_is_refused_and_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "out" / "report.html").write_bytes(FOREIGN)
    before = content(root / "out")
    assert main(["report", str(root / "logs"), "--out", str(root / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"lightning-ast: expected to write {root}/out/report.html, but it is a file that no report wrote: move it away, "
        "or give another folder with --out."
    )
    assert content(root / "out") == before


def test_the_page_of_an_earlier_report_is_replaced_and_other_files_stay(root: Path) -> None:
    out = root / "out"
    before = content(out)
    (out / "notes.txt").write_text("mine")
    page = write_report([root / "logs" / "two"], out)
    after = content(out)
    assert set(after) == {"report.html", "notes.txt"}
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


def test_a_link_is_replaced_and_what_it_leads_to_stays(root: Path) -> None:
    shutil.move(root / "out" / "report.html", root / "kept.html")
    (root / "out" / "report.html").symlink_to(root / "kept.html")
    before = (root / "kept.html").read_bytes()
    write_report([root / "logs" / "one"], root / "out")
    assert not (root / "out" / "report.html").is_symlink()
    assert (root / "kept.html").read_bytes() == before


def test_the_folder_itself_may_be_a_link(root: Path) -> None:
    (root / "through").symlink_to(root / "out")
    assert write_report([root / "logs"], root / "through").resolve() == root / "out" / "report.html"
