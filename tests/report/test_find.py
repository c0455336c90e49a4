"""Finding runs: folders at any depth, links; and their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_ast.report.runs import find_runs, run_names


def table(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,val_acc\n1,0.5\n")
    return folder


def test_folders_are_found_at_any_depth_and_once(logs: Path) -> None:
    found = find_runs([logs, logs / "tb", str(logs / "tb" / "dense")])
    assert found == sorted(
        (logs / kind / name / "version_0").resolve() for kind in ("tb", "csv") for name in ("dense", "partial", "prune")
    )


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/dense/version_0", "/a/prune/version_0"], ["dense", "prune"]),
        (["/a/dense/version_0", "/a/dense/version_1"], ["version_0", "version_1"]),
        (["/a/x/version_0", "/a/x/version_1", "/a/y/version_0"], ["x/version_0", "x/version_1", "y/version_0"]),
        (["/a/b", "/a/b/c"], ["b", "b/c"]),
        (["/a/b/1/tb/v", "/a/c/1/tb/v"], ["b", "c"]),
        (["/a"], ["a"]),
        (["/a/dup", "/a/dup/dup"], ["dup", "dup/dup"]),
    ],
)
def test_names_are_short_and_tell_the_runs_apart(folders: list[str], names: list[str]) -> None:
    assert run_names([Path(folder) for folder in folders]) == names


def test_a_link_leads_to_a_run_where_it_is_given_and_not_from_a_folder(tmp_path: Path) -> None:
    near = table(tmp_path / "logs" / "version_1")
    (tmp_path / "logs" / "latest").symlink_to(near)
    (near / "up").symlink_to(tmp_path / "logs")
    assert find_runs([tmp_path / "logs"]) == find_runs([tmp_path / "logs" / "latest"]) == [near]
