"""What only a process of its own shows: what is imported. None of these imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import lightning_ast
from lightning_ast.__main__ import DATA_SETS
from lightning_ast.demo.data import DataName
from tests.helpers.command import run

ROOT = Path(__file__).parent.parent
LIGHT = """
import runpy, sys
import lightning_ast
from lightning_ast.__main__ import main

assert "SparseSelectionCallback" in dir(lightning_ast) and "core" in dir(lightning_ast)
asked = [["--version"], ["--help"], [], ["frob"], *([name, "--help"] for name in ("demo", "report", "advise"))]
for arguments in asked:
    try:
        main(arguments)
    except SystemExit:
        pass
del sys.modules["lightning_ast.__main__"]  # else runpy warns
sys.argv = ["lightning-ast", "--version"]
try:
    runpy.run_module("lightning_ast", run_name="__main__")
except SystemExit as left:
    assert left.code == 0
heavy = {"torch", "lightning", "numpy", "yaml", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


def test_version_and_help_import_neither_torch_nor_lightning() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"lightning-ast {lightning_ast.__version__}\n") == 2
    for expected in ("fit | validate | test", "--rate", "--train-limit", "logdir", "--budget_seconds"):
        assert expected in done.stdout
    assert done.stderr.count("\n") == 1
    assert "got 'frob'" in done.stderr


def test_the_choices_of_the_demo_are_those_of_the_code() -> None:
    assert get_args(DataName) == DATA_SETS


def test_every_public_name_is_there_and_no_other() -> None:
    names: dict[str, object] = {}
    exec("from lightning_ast import *", names)
    assert set(lightning_ast.__all__) <= set(names)
    assert set(lightning_ast.__all__) <= set(dir(lightning_ast))
    assert lightning_ast.core.PIController is lightning_ast.PIController
    with pytest.raises(AttributeError, match="module 'lightning_ast' has no attribute 'SparseSelection'"):
        _ = lightning_ast.SparseSelection
    with pytest.raises(ImportError, match="cannot import name 'Sparse'"):
        exec("from lightning_ast import Sparse")


def test_an_unknown_command_or_option(tmp_path: Path) -> None:
    for arguments in (["frob"], ["--frob"], ["fró\udcff"], ["--config", "x.yaml"]):
        done = run(*arguments, cwd=tmp_path, status=2)
        assert done.err.startswith("lightning-ast: expected a command, one of fit, validate,")
        assert done.err.count("\n") == 1
    for arguments in (
        ["report"],
        ["demo", "--epochs", "ten"],
        ["demo", "--mode", "ünknown"],
        ["report", "--frob", "x"],
    ):
        done = run(*arguments, cwd=tmp_path, status=2)
        assert done.err.startswith(f"lightning-ast {arguments[0]}: ")
        assert done.err.count("\n") == 1
