"""The configuration that a run saves replaces nothing that a person wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.helpers.command import BORING, boring, run

MINE = f"# mine\nseed_everything: 3\nmodel: {BORING}\ntrainer: {{default_root_dir: .}}\n"
PLAIN = boring()[4:]  # the quiet settings, without seed and model


def fit(*options: str, cwd: Path) -> None:
    run("fit", *options, *PLAIN, cwd=cwd)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "spelling", ["config.yaml", "./config.yaml", "{here}/config.yaml", "sub/../config.yaml", "link"]
)
def test_the_users_own_file_stays(spelling: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.yaml").write_text(MINE)
    (tmp_path / "link").symlink_to("config.yaml")
    fit("--config", spelling.format(here=tmp_path), cwd=tmp_path)
    assert (tmp_path / "config.yaml").read_text() == MINE
    saved = yaml.safe_load((tmp_path / "config_1.yaml").read_text())
    assert saved["seed_everything"] == 3
    assert saved["trainer"]["max_epochs"] == 1
    assert "config_1.yaml" in caplog.text, "the run tells where it saved"


def test_repeated_runs_without_version_folders(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    fit("--config", "mine.yaml", cwd=tmp_path)
    fit("--config", "mine.yaml", "--trainer.check_val_every_n_epoch=7", cwd=tmp_path)
    fit("--config", "config.yaml", cwd=tmp_path)
    assert files(tmp_path) == ["config.yaml", "config_1.yaml", "config_2.yaml", "mine.yaml"]
    every = [yaml.safe_load((tmp_path / name).read_text())["trainer"] for name in files(tmp_path)[:3]]
    assert [trainer["check_val_every_n_epoch"] for trainer in every] == [1, 7, 1]


def test_links_folders_and_pipes_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "other.yaml").write_text("mine")
    (tmp_path / "config.yaml").symlink_to("other.yaml")
    (tmp_path / "config_1.yaml").mkdir()
    os.mkfifo(tmp_path / "config_2.yaml")
    fit("--config", "mine.yaml", cwd=tmp_path)
    assert (tmp_path / "other.yaml").read_text() == "mine"
    assert yaml.safe_load((tmp_path / "config_3.yaml").read_text())["seed_everything"] == 3


def test_a_free_name_is_config_yaml(tmp_path: Path) -> None:
    run(*boring("--trainer.default_root_dir=logs/deep"), cwd=tmp_path)
    assert files(tmp_path / "logs" / "deep") == ["config.yaml"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("mine")
    done = run(*boring("--trainer.default_root_dir=logs"), cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: ")
    assert "logs" in done.last
