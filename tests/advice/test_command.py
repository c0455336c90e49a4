"""``advise`` for the configuration files that ``fit`` takes, on real digits."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ast.advice import Advice, render
from lightning_ast.cli import main
from tests.advice.test_predict import facts

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
DIGITS = ["--data.init_args.data", "digits", "--model.init_args.in_channels", "1", "--model.init_args.width", "4"]
QUICK = ["--budget_seconds", "0.2", "--trainer.accelerator", "cpu"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6's use of it
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10_resnet9.yaml", "cifar10_resnet9_prune.yaml"])
def test_the_examples(name: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(EXAMPLES / name), *DIGITS, *QUICK, "--trainer.max_epochs", "20"]
    assert main(["advise", *arguments]) == 0
    out = capsys.readouterr().out
    assert "20 epochs of 5 batches of 256" in out
    # Read the table: on a busy machine no mode is faster, and none is advised.
    own = r"'partial' at 0\.4" if name == "cifar10_resnet9.yaml" else r"(?m)^ *prune +0\.5 "
    assert re.search(own, out), "the rate of the file"
    for mode in ("dense", "mask", "subset", "partial", "prune"):
        assert re.search(rf"(?m)^ *{mode} ", out)
    assert list(work.iterdir()) == [], "no logs, no checkpoints"


def test_a_config_for_several_devices_is_measured_on_one(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((EXAMPLES / "cifar10_resnet9.yaml").read_text())
    config["trainer"] |= {"devices": 4, "strategy": "ddp", "logger": True}
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"})
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
    config["ckpt_path"] = None  # as in the file that a fit saves
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["advise", "--config=config.yaml", *DIGITS, *QUICK]) == 0
    out = capsys.readouterr().out
    assert "asks for devices=4, num_nodes=1: what follows is for one device" in out
    assert [path.name for path in work.iterdir()] == ["config.yaml"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_an_accelerator_that_is_not_there_is_said(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(EXAMPLES / "cifar10_resnet9.yaml")
    assert main(["advise", "--config", config, *DIGITS, "--trainer.accelerator", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("lightning-ast: No supported gpu backend found!")


def test_what_cannot_be_measured_is_said(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(EXAMPLES / "cifar10_resnet9.yaml")
    assert main(["advise", "--config", config, *DIGITS, *QUICK, "--trainer.fast_dev_run", "true"]) == 2
    assert "fast_dev_run runs a single batch" in capsys.readouterr().err
    assert main(["advise", "--config", config, "--model.init_args.depth", "3"]) == 2
    assert "'depth' is not accepted" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["advise", "--help"])
    assert ended.value.code == 0
    assert "usage: lightning-ast advise --config FILE" in capsys.readouterr().out


def test_the_rendered_report_is_the_texts() -> None:
    advice = Advice(facts())
    file = io.StringIO()
    render(advice, file=file)
    assert file.getvalue() == f"{advice}\n"
    (row,) = [line.split() for line in file.getvalue().splitlines() if line.startswith("partial   0.4 ")]
    assert row[2:] == ["2.3", "s", "0.66", "4.88", "KiB", "42.3", "min", "0.73"]
