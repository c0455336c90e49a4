"""A fault of a callback, from a file or an override, names the callback and its place in the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command import BORING, boring, run

SELECTION = "--trainer.callbacks+=SparseSelectionCallback"
MONITOR = "--trainer.callbacks+=SparseTrainingMonitor"
SECOND = "lightning-ast: trainer.callbacks[1] (SparseSelectionCallback): "


def listed(*callbacks: Any) -> str:
    return yaml.safe_dump({"seed_everything": 1, "model": BORING, "trainer": {"callbacks": list(callbacks)}})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_activation_rate": 5}, "target_activation_rate: expected a rate in (0, 1], got 5.0."),
        ({"target_activation_rate": float("nan")}, "target_activation_rate: expected a rate in (0, 1], got nan."),
        ({"target_activation_rate": "abc"}, "target_activation_rate: expected a float, got abc"),
        ({"target_rate": 0.4}, "Option 'target_rate' is not accepted"),
        ({"mode": "fast"}, "mode: expected one of 'mask', 'subset', 'partial', 'prune', got fast"),
        ({"controller": {"class_path": "lightning_ast.PIController", "init_args": {"preset": "x"}}}, "controller: "),
        ({"controller": {"class_path": "nosuch.Controller"}}, "No module named 'nosuch'"),
        ({"min_selected": 0}, "min_selected: expected an int >= 1 or a share of the batch in (0, 1), got 0."),
    ],
)
def test_from_a_file(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    selection = {"class_path": "SparseSelectionCallback", "init_args": settings}
    (tmp_path / "c.yaml").write_text(listed({"class_path": "lightning_ast.SparseTrainingMonitor"}, selection))
    done = run(*boring("--config=c.yaml"), cwd=tmp_path, status=2)
    assert done.last.startswith(SECOND)
    assert told in done.last


def test_all_faults_come_together(tmp_path: Path) -> None:
    selection = {"class_path": "SparseSelectionCallback", "init_args": {"target_activation_rate": 5, "min_selected": 0}}
    schedule = {"class_path": "TwoStageScheduler", "init_args": {"warmup_epochs": -1}}
    (tmp_path / "c.yaml").write_text(listed(schedule, selection))
    done = run(*boring("--config=c.yaml"), cwd=tmp_path, status=2)
    told = [line for line in done.err.splitlines() if line.startswith("lightning-ast: ")]
    assert [line.partition(": ")[2].partition(": ")[0] for line in told] == [
        "trainer.callbacks[1] (SparseSelectionCallback)",
        "trainer.callbacks[1] (SparseSelectionCallback)",
        "trainer.callbacks[0] (TwoStageScheduler)",
    ]


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"class_path": "nosuch.Callback"}, "(Callback): No module named 'nosuch'"),
        ({"class_path": "SparseSelection"}, "(SparseSelection): no class SparseSelection is known"),
        ("pathlib.Path", "(Path): "),
        ({"class_path": {"a": 1}}, "class_path: expected the class path of a Callback, got {'a': 1}"),
        (7, "expected the class path of a Callback, got 7"),
        ([1], "expected the class path of a Callback"),
        (
            {"class_path": "EarlyStopping", "init_args": {"monitor": "x", "mode": "best"}},
            "(EarlyStopping): `mode` can be min, max, got best",
        ),
    ],
)
def test_other_items_of_a_list(item: Any, told: str, tmp_path: Path) -> None:
    first = {"class_path": "EarlyStopping", "init_args": {"monitor": "x"}}
    (tmp_path / "c.yaml").write_text(listed(first, item))
    done = run("fit", "--config", "c.yaml", cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: trainer.callbacks[1]")
    assert told in done.last


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((MONITOR, SELECTION, "--trainer.callbacks.target_activation_rate=5"), "a rate in (0, 1], got 5.0."),
        ((MONITOR, SELECTION, "--trainer.callbacks.target_activation_rate", "abc"), "expected a float, got abc"),
        ((MONITOR, SELECTION, "--trainer.callbacks.init_args.mode=fast"), "mode: expected one of 'mask', 'subset'"),
        ((MONITOR, SELECTION, "--trainer.callbacks.rate=0.4"), "Option 'rate' is not accepted (this option sets the last"),
        (("--trainer.callbacks=" + json.dumps(["SparseTrainingMonitor", {"class_path": "SparseSelectionCallback",
          "init_args": {"mode": "fast"}}]),), "mode: expected one of 'mask'"),
    ],
)  # fmt: skip
def test_overrides(overrides: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run(*boring(*overrides), cwd=tmp_path, status=2)
    assert done.last.startswith(SECOND)
    assert told in done.last


def test_an_override_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(listed("SparseTrainingMonitor", {"class_path": "SparseSelectionCallback"}))
    done = run(*boring("--config=c.yaml", "--trainer.callbacks.target_activation_rate=abc"), cwd=tmp_path, status=2)
    assert done.last.startswith(SECOND + "target_activation_rate: expected a float, got abc")
    rate = "--trainer.callbacks.target_activation_rate=-1"
    assert run(*boring("--config=c.yaml", rate), cwd=tmp_path, status=2).last.startswith(SECOND)
    advised = run("advise", "--config=c.yaml", "--trainer.accelerator=cpu", rate, cwd=tmp_path, status=2)
    assert advised.last == SECOND + "target_activation_rate: expected a rate in (0, 1], got -1.0."


def test_an_override_without_a_callback(tmp_path: Path) -> None:
    done = run(*boring("--trainer.callbacks.target_activation_rate=0.4"), cwd=tmp_path, status=2)
    assert done.last.endswith("expected a callback before it, for example --trainer.callbacks+=SparseSelectionCallback")
    done = run(*boring("--trainer.callbacks+=SparseSelectionCallbac"), cwd=tmp_path, status=2)
    assert "trainer.callbacks[0] (SparseSelectionCallbac): no class SparseSelectionCallbac is known" in done.last


def test_a_schedule_in_advise(tmp_path: Path) -> None:
    schedule = {"class_path": "TwoStageScheduler", "init_args": {"warmup_epochs": 10**30}}
    (tmp_path / "c.yaml").write_text(listed("SparseSelectionCallback", schedule))
    options = ("--trainer.accelerator=cpu", "--trainer.max_epochs=2")
    done = run("advise", "--config=c.yaml", *options, cwd=tmp_path, status=2)
    assert done.last.startswith("lightning-ast: trainer.callbacks[1] (TwoStageScheduler): warmup_epochs=1000")
