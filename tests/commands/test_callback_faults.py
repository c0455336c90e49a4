"""A fault of a callback, from a file or an option, is told in a line that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command import BORING, boring, run

SELECTION = "--trainer.callbacks+=SparseSelectionCallback"
MONITOR = "--trainer.callbacks+=SparseTrainingMonitor"
OURS = "trainer.callbacks: lightning_ast.SparseSelectionCallback: "


def listed(*callbacks: Any) -> str:
    return yaml.safe_dump({"seed_everything": 1, "model": BORING, "trainer": {"callbacks": list(callbacks)}})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_activation_rate": 5}, "target_activation_rate: expected a rate in (0, 1], got 5.0."),
        ({"target_activation_rate": float("nan")}, "target_activation_rate: expected a rate in (0, 1], got nan."),
        ({"target_activation_rate": "abc"}, OURS + "target_activation_rate: expected float, got abc"),
        ({"target_rate": 0.4}, OURS + "Option 'target_rate' is not accepted"),
        ({"mode": "fast"}, OURS + "mode: expected one of 'mask', 'subset', 'partial', 'prune', got fast"),
        ({"controller": {"class_path": "lightning_ast.PIController", "init_args": {"preset": "x"}}}, "controller: "),
        (
            {"controller": {"class_path": "nosuch.Controller"}},
            "controller: nosuch.Controller: No module named 'nosuch'",
        ),
        ({"min_selected": 0}, "min_selected: expected an int >= 1 or a share of the batch in (0, 1), got 0."),
    ],
)
def test_from_a_file(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    selection = {"class_path": "SparseSelectionCallback", "init_args": settings}
    (tmp_path / "c.yaml").write_text(listed({"class_path": "lightning_ast.SparseTrainingMonitor"}, selection))
    done = run(*boring("--config=c.yaml"), cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: ")
    assert told in done.last
    assert len(done.last) < 250, "a line, not what every type of the parameter would need"


def test_all_faults_come_together(tmp_path: Path) -> None:
    selection = {"class_path": "SparseSelectionCallback", "init_args": {"target_activation_rate": 5, "min_selected": 0}}
    schedule = {"class_path": "TwoStageScheduler", "init_args": {"warmup_epochs": -1}}
    (tmp_path / "c.yaml").write_text(listed(schedule, selection))
    done = run(*boring("--config=c.yaml"), cwd=tmp_path, status=2)
    told = [line for line in done.err.splitlines() if line.startswith("lightning-ast: ")]
    assert [line.split(": ")[1].partition("=")[0] for line in told] == [
        "target_activation_rate",
        "min_selected",
        "warmup_epochs",
    ]


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"class_path": "nosuch.Callback"}, "nosuch.Callback: No module named 'nosuch'"),
        ({"class_path": "SparseSelection"}, "trainer.callbacks: no class SparseSelection is known: give its full path"),
        ("pathlib.Path", "pathlib.Path"),
        ({"class_path": {"a": 1}}, "trainer.callbacks: unhashable type: 'dict'"),
        (7, "Not a valid subclass of Callback, got 7"),
        ([1], "Not a valid subclass of Callback, got [1]"),
        (
            {"class_path": "EarlyStopping", "init_args": {"monitor": "x", "mode": "best"}},
            "lightning-ast: EarlyStopping: `mode` can be min, max, got best",
        ),
    ],
)
def test_other_items_of_a_list(item: Any, told: str, tmp_path: Path) -> None:
    first = {"class_path": "EarlyStopping", "init_args": {"monitor": "x"}}
    (tmp_path / "c.yaml").write_text(listed(first, item))
    done = run("fit", "--config", "c.yaml", cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: ")
    assert told in done.last
    assert len(done.last) < 250, "a line, not what every type of the parameter would need"


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("target_activation_rate=5", "a rate in (0, 1], got 5.0."),
        ("init_args.mode=fast", OURS + "mode: expected one of 'mask', 'subset'"),
        ("rate=0.4", OURS + "Option 'rate' is not accepted"),
    ],
)
def test_overrides(option: str, told: str, tmp_path: Path) -> None:
    done = run(*boring(MONITOR, SELECTION, f"--trainer.callbacks.{option}"), cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: ")
    assert told in done.last


def test_an_override_before_its_callback(tmp_path: Path) -> None:
    done = run(*boring("--trainer.callbacks.mode=mask"), cwd=tmp_path, status=2)
    assert "Option 'mode' is not accepted: the settings of a callback stand below its init_args" in done.last


def test_an_override_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(listed("SparseTrainingMonitor", {"class_path": "SparseSelectionCallback"}))
    rate = "--trainer.callbacks.target_activation_rate=-1"
    told = "lightning-ast: target_activation_rate: expected a rate in (0, 1], got -1.0."
    assert run(*boring("--config=c.yaml", rate), cwd=tmp_path, status=2).last == told
    assert run("advise", "--config=c.yaml", "--trainer.accelerator=cpu", rate, cwd=tmp_path, status=2).last == told


def test_a_schedule_in_advise(tmp_path: Path) -> None:
    schedule = {"class_path": "TwoStageScheduler", "init_args": {"warmup_epochs": 10**30}}
    (tmp_path / "c.yaml").write_text(listed("SparseSelectionCallback", schedule))
    options = ("--trainer.accelerator=cpu", "--trainer.max_epochs=2")
    done = run("advise", "--config=c.yaml", *options, cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: warmup_epochs=1000")
