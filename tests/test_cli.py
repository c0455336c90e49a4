"""The commands on real data, in this process; what only a process of its own shows is in ``test_entry_point.py``."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_ast.demo.data import load_images
from tests.helpers.command import Done, run

ROOT = Path(__file__).parent.parent

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
EPOCH_TWO = re.compile(r"Epoch 1/1 \| Loss: (\S+) \| Val Acc: \S+ \| Act: (\S+)% \| Skipped: \S+%")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A folder in which ``fit`` has run once, and what it printed."""
    cwd = tmp_path_factory.mktemp("fit")
    (cwd / "config.yaml").write_text(CONFIG)
    return cwd, run("fit", "--config", "config.yaml", cwd=cwd)


def test_fit_from_yaml_and_rerun_of_the_saved_config(trained: tuple[Path, Done]) -> None:
    cwd, done = trained
    first = EPOCH_TWO.search(done.out)
    assert first
    assert 25 < float(first[2]) < 35
    assert "ast/threshold" in (cwd / "logs" / "version_0" / "metrics.csv").read_text()
    again = EPOCH_TWO.search(run("fit", "--config", "logs/version_0/config.yaml", cwd=cwd).out)
    assert again
    assert again[0] == first[0], "the saved config repeats the run to the last digit"


def test_print_config(trained: tuple[Path, Done]) -> None:
    cwd, _ = trained
    printed = yaml.safe_load(run("fit", "--config", "config.yaml", "--print_config", cwd=cwd).out)
    selection = printed["trainer"]["callbacks"][0]
    assert selection["class_path"] == "lightning_ast.SparseSelectionCallback", "short names become full ones"
    assert selection["init_args"]["weighting"] == "none"
    assert selection["init_args"]["min_selected"] == 2


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
    options = {"max_epochs": "4", "limit_train_batches": "2", "enable_progress_bar": "false"}
    small = [f"--trainer.{name}={value}" for name, value in options.items()] + ["--data.init_args.batch_size=32"]
    if "resnet9" in example.stem:
        small += ["--model.init_args.width", "4"]
    out = run("fit", "--config", str(example), "--data.init_args.root", "cifar10.npz", *small, cwd=tmp_path).out
    assert re.search(r"Epoch 3/3 \| Loss: \S+ \| Val Acc: \S+ \| Act: \S+%", out)


def test_report_of_what_fit_logged(trained: tuple[Path, Done]) -> None:
    cwd, _ = trained
    done = run("report", "logs/version_0", "--out", "page", cwd=cwd)
    assert Path(done.out.split()[-1]) == Path("page/report.html")
    page = (cwd / "page" / "report.html").read_text()
    assert "mask" in page, "the mode is read from the configuration that fit saves beside its logs"
    assert (cwd / "page" / "report.html").stat().st_size > 50_000, "the figures are in it"


def test_report_without_logs(tmp_path: Path) -> None:
    done = run("report", str(tmp_path), cwd=tmp_path, status=2)
    assert done.err.startswith("lightning-ast: ")
    assert "events.out.tfevents" in done.err, "it names what it looked for"


def test_advice_on_what_fit_would_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    done = run("advise", "--config", "config.yaml", "--budget_seconds", "0.2", cwd=tmp_path)
    assert re.search(r"2 epochs of \d+ batches of 256", done.out)
    assert "'mask' at 0.3" in done.out, "the file's own mode and rate"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "nothing is written"
