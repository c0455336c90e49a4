"""Finding runs: folders at any depth, links, what cannot be listed; and their names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lightning_ast.errors import ReportError
from lightning_ast.report.runs import find_runs, run_names


def table(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,val_acc\n1,0.5\n")
    return folder


def test_folders_are_found_at_any_depth_and_once(logs: Path) -> None:
    found, _ = find_runs([logs, logs / "tb", str(logs / "tb" / "dense")])
    assert found == sorted(
        (logs / kind / name / "version_0").resolve() for kind in ("tb", "csv") for name in ("dense", "partial", "prune")
    )


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/dense/version_0", "/a/prune/version_0"], ["dense", "prune"]),
        (["/a/dense/version_0", "/a/dense/version_1"], ["version_0", "version_1"]),
        (["/a/x/version_0", "/a/x/version_1", "/a/y/version_0"], ["x/version_0", "x/version_1", "y/version_0"]),
        (["/a/b", "/a/b/c"], ["b", "c"]),
        (["/a/b/1/tb/v", "/a/c/1/tb/v"], ["b", "c"]),
        (["/a"], ["a"]),
        (["/a/dup", "/a/dup/dup"], ["dup", "dup/dup"]),
    ],
)
def test_names_are_short_and_tell_the_runs_apart(folders: list[str], names: list[str]) -> None:
    assert run_names([Path(folder) for folder in folders]) == names


def test_links_to_folders_are_followed_once_and_without_end(tmp_path: Path) -> None:
    far = table(tmp_path / "store" / "3f2a")
    near = table(tmp_path / "logs" / "version_1")
    (tmp_path / "logs" / "dense").symlink_to(far)
    (tmp_path / "logs" / "again").symlink_to(far)
    (tmp_path / "logs" / "latest").symlink_to(near)
    (near / "up").symlink_to(tmp_path / "logs")
    assert find_runs([tmp_path / "logs"]) == ([tmp_path / "logs" / "again", near], [])
    early = tmp_path / "logs" / "a" / "link"
    early.parent.mkdir()
    early.symlink_to(near)
    assert near in find_runs([tmp_path / "logs"])[0]  # by its own path, though the link is listed first
    assert find_runs([tmp_path / "logs" / "dense"]) == ([tmp_path / "logs" / "dense"], [])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = table(tmp_path / "good")
    table(tmp_path / "locked" / "run")
    listed = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    line = f"{tmp_path / 'locked'}: cannot be listed (Permission denied)"
    assert find_runs([tmp_path]) == ([good], [line])
    assert find_runs([tmp_path / "locked"]) == ([], [line])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="no logs in or below"):
        find_runs([tmp_path / "empty"])
