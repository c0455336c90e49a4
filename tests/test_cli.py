"""The installed command, as a person runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_ast.demo.data import load_images

ROOT = Path(__file__).parent.parent
COMMAND = Path(sys.executable).parent / "lightning-ast"


def run(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [str(COMMAND), *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs, name: ""}}
  callbacks:
    - class_path: SparseSelectionCallback
      init_args: {target_activation_rate: 0.3, mode: mask, significance: confidence, weighting: none}
    - class_path: TwoStageScheduler
      init_args: {warmup_epochs: 1}
    - class_path: lightning_ast.SparseTrainingMonitor
model: {class_path: lightning_ast.demo.ResNet9, init_args: {in_channels: 1, width: 4}}
data: {class_path: lightning_ast.demo.ImageData, init_args: {data: digits, batch_size: 256}}
"""
EPOCH_TWO = re.compile(r"Epoch 2/2 \| Loss: (\S+) \| Val Acc: \S+ \| Act: (\S+)% \| Save: \S+%")


def test_fit_from_yaml_print_config_and_rerun_of_the_saved_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    first = EPOCH_TWO.search(run("fit", "--config", "config.yaml", cwd=tmp_path).stdout)
    assert first
    assert 25 < float(first[2]) < 35
    assert "ast/threshold" in (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()

    printed = yaml.safe_load(run("fit", "--config", "config.yaml", "--print_config", cwd=tmp_path).stdout)
    selection = printed["trainer"]["callbacks"][0]
    assert selection["class_path"] == "lightning_ast.SparseSelectionCallback", "short names become full ones"
    assert selection["init_args"]["weighting"] == "none"
    assert selection["init_args"]["min_selected"] == 2

    saved = tmp_path / "logs" / "version_0" / "config.yaml"
    again = EPOCH_TWO.search(run("fit", "--config", str(saved), cwd=tmp_path).stdout)
    assert again
    assert again[0] == first[0], "the saved config repeats the run to the last digit"


def test_callbacks_from_the_command_line(tmp_path: Path) -> None:
    done = run(
        *("fit", "--model", "lightning_ast.demo.ResNet9", "--model.in_channels", "1", "--model.width", "4"),
        *("--data", "lightning_ast.demo.ImageData", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
        *("--trainer.callbacks+=SparseSelectionCallback", "--trainer.callbacks.target_activation_rate=2"),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0
    assert "target_activation_rate: expected a rate in (0, 1], got 2.0" in done.stderr


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    """With a small cifar10.npz of real pictures in CIFAR's format (digits, enlarged), in place of the download."""
    digits = load_images("digits")

    def rgb(images: object, count: int) -> np.ndarray:
        small = images[:count].repeat_interleave(4, 2).repeat_interleave(4, 3)
        return small.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()

    arrays = {"x": rgb(digits.train_images, 512), "y": digits.train_labels[:512].numpy().astype(np.uint8)}
    arrays |= {"xt": rgb(digits.test_images, 100), "yt": digits.test_labels[:100].numpy().astype(np.uint8)}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    small = [
        "--trainer.max_epochs",
        "4",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.enable_progress_bar",
        "false",
    ]
    if "resnet9" in example.stem:
        small += ["--model.init_args.width", "4"]
    out = run("fit", "--config", str(example), "--data.init_args.root", "cifar10.npz", *small, cwd=tmp_path).stdout
    assert re.search(r"Epoch 4/4 \| Loss: \S+ \| Val Acc: \S+ \| Act: \S+%", out)


def test_plain_pytorch_example() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "plain_pytorch.py")], capture_output=True, text=True, check=True
    )
    last = re.search(r"epoch 10: accuracy (\S+)%, trained on (\S+)% of 1400 samples", done.stdout)
    assert last
    assert float(last[1]) > 90
    assert float(last[2]) == pytest.approx(40, abs=2)


def test_demo_table(tmp_path: Path) -> None:
    out = run("demo", "--epochs", "6", "--width", "8", cwd=tmp_path).stdout
    for column in ("accuracy", "seconds", "samples", "GFLOPs", "activation", "saved:"):
        assert column in out
    rows = re.findall(
        r"│ (dense|AST, partial, r = 0.4|dense, shortened) +│ +(\d+) │ +(\S+)% │ +(\S+) │ +(\S+) │ +(\S+) │ +(\S+)% │",
        out,
    )
    assert [row[0] for row in rows] == ["dense", "AST, partial, r = 0.4", "dense, shortened"]
    assert [float(row[6]) for row in rows] == [100.0, pytest.approx(40 * 0.8 + 20, abs=4), 100.0]
    assert int(rows[2][1]) < 6
    assert "Epoch 6/6 | Loss:" in out
    assert "baseline to beat" in out


def test_demo_names_every_choice_when_there_are_no_images(tmp_path: Path) -> None:
    done = run("demo", "--data", "cifar10", "--root", str(tmp_path / "none"), cwd=tmp_path, check=False)
    if done.returncode == 0:
        pytest.skip("CIFAR-10 could be downloaded here")
    assert done.returncode == 1
    for choice in ("cifar10.npz", "cifar-10-batches-py", "--root FOLDER", "--data digits"):
        assert choice in done.stderr


def test_demo_with_an_impossible_rate(tmp_path: Path) -> None:
    done = run("demo", "--rate", "2", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("- target_activation_rate: expected a rate in (0, 1], got 2.0")
    assert "epochs" not in done.stdout, "not after the dense run"


def test_report_of_what_fit_logged(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    run("fit", "--config", "config.yaml", cwd=tmp_path)
    done = run("report", "logs", "--out", "page", cwd=tmp_path)
    assert Path(done.stdout.split()[-1]) == Path("page/report.html")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "mask" in page, "the mode is read from the configuration that fit saves beside its logs"
    assert (tmp_path / "page" / "report.html").stat().st_size > 50_000, "the figures are in it"
    empty = run("report", "page", cwd=tmp_path, check=False)
    assert empty.returncode == 2
    assert empty.stderr.startswith("lightning-ast: ")
    assert "events.out.tfevents" in empty.stderr, "it says what it looked for"
    assert "Traceback" not in empty.stderr


def test_advice_on_what_fit_would_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    done = run("advise", "--config", "config.yaml", "--budget_seconds", "1", cwd=tmp_path)
    assert re.search(r"2 epochs of \d+ batches of 256", done.stdout)
    assert "'mask' at 0.3" in done.stdout, "the file's own mode and rate"
    assert not (tmp_path / "logs").exists(), "nothing is written"
    missing = run("advise", "--config", "none.yaml", cwd=tmp_path, check=False)
    assert missing.returncode == 2
    assert "none.yaml" in missing.stderr


def test_help_and_version(tmp_path: Path) -> None:
    assert "fit | validate | test" in run("--help", cwd=tmp_path).stdout
    assert run("--version", cwd=tmp_path).stdout.startswith("lightning-ast 0.")
    assert "--rate" in run("demo", "--help", cwd=tmp_path).stdout
    assert "logdir" in run("report", "--help", cwd=tmp_path).stdout
    assert "--budget_seconds" in run("advise", "--help", cwd=tmp_path).stdout
