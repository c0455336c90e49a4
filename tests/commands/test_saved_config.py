"""The configuration that a run saves replaces nothing that a person wrote."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_ast.config_mark import is_written_by_a_run
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
    fit("--config", spelling.format(here=tmp_path), cwd=tmp_path)
    assert files(tmp_path) == ["config.yaml", "config_1.yaml", "link", "sub"], "a repeated run takes its own again"


def test_repeated_runs_without_version_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    fit("--config", "mine.yaml", cwd=tmp_path)
    fit("--config", "mine.yaml", "--trainer.check_val_every_n_epoch=7", cwd=tmp_path)
    assert files(tmp_path) == ["config.yaml", "mine.yaml"]
    assert "config.yaml" not in caplog.text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["check_val_every_n_epoch"] == 7


def test_the_saved_file_as_the_configuration_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    fit("--config", "mine.yaml", cwd=tmp_path)
    first = (tmp_path / "config.yaml").read_bytes()
    fit("--config", "config.yaml", cwd=tmp_path)
    assert files(tmp_path) == ["config.yaml", "mine.yaml"], "the same settings: there is nothing to write"
    fit("--config", "config.yaml", "--trainer.check_val_every_n_epoch=7", cwd=tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == first, "it is what this run was made from"
    assert yaml.safe_load((tmp_path / "config_1.yaml").read_text())["trainer"]["check_val_every_n_epoch"] == 7


def test_a_saved_file_that_somebody_has_changed_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    fit("--config", "mine.yaml", cwd=tmp_path)
    changed = (tmp_path / "config.yaml").read_text() + "# a comment of mine\n"
    (tmp_path / "config.yaml").write_text(changed)
    fit("--config", "mine.yaml", cwd=tmp_path)
    assert (tmp_path / "config.yaml").read_text() == changed
    assert files(tmp_path) == ["config.yaml", "config_1.yaml", "mine.yaml"]


def test_links_and_other_things_of_that_name(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    here = tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    (here / "mine.yaml").write_text(MINE)
    fit("--config", "mine.yaml", cwd=here)
    saved = (here / "config.yaml").read_bytes()
    shutil.move(here / "config.yaml", elsewhere / "saved.yaml")
    (here / "config.yaml").symlink_to(elsewhere / "saved.yaml")  # what a run saved, but not here
    (here / "config_1.yaml").symlink_to(elsewhere / "nowhere.yaml")
    (here / "config_2.yaml").mkdir()
    os.mkfifo(here / "config_3.yaml")
    (here / "config_4.yaml").write_bytes(bytes(range(256)))
    os.link(elsewhere / "saved.yaml", here / "config_5.yaml")
    fit("--config", "mine.yaml", "--trainer.check_val_every_n_epoch=7", cwd=here)
    assert files(elsewhere) == ["saved.yaml"]
    assert (elsewhere / "saved.yaml").read_bytes() == saved, "another name of the file keeps what it had"
    assert yaml.safe_load((here / "config_5.yaml").read_text())["trainer"]["check_val_every_n_epoch"] == 7
    assert (here / "config.yaml").is_symlink()


def test_a_free_name_is_config_yaml(tmp_path: Path) -> None:
    run(*boring("--trainer.default_root_dir=logs/deep"), cwd=tmp_path)
    assert is_written_by_a_run((tmp_path / "logs" / "deep" / "config.yaml").read_bytes())
    assert files(tmp_path / "logs" / "deep") == ["config.yaml"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("mine")
    done = run(*boring("--trainer.default_root_dir=logs"), cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: ")
    assert "logs" in done.last
