"""Private names of Lightning and torchmetrics are used in ``lightning_internals`` alone, and each is in its table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightning_ast
from lightning_ast.lightning_internals.table import PRIVATE_NAMES
from tests.lightning_internals.private_access import is_private, own_names, private_uses, uses_in

ROOT = Path(lightning_ast.__file__).parent
INTERNALS = ROOT / "lightning_internals"
KNOWN = {entry.name for entry in PRIVATE_NAMES if is_private(entry.name)}
OF_TORCH_ALONE = {"core"}  # imports no Lightning: tests/test_layout.py


def test_other_folders_use_none() -> None:
    files = [
        p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in {"lightning_internals", *OF_TORCH_ALONE}
    ]
    assert len(files) > 50
    package = {name for path in files for name in own_names(ast.parse(path.read_text()))}
    found = [f"{path.parent.name}/{use}" for path in sorted(files) for use in uses_in(path, KNOWN, package)]
    assert not found, "move these behind a function of lightning_internals:\n" + "\n".join(found)


def test_every_name_used_is_in_the_table() -> None:
    text = {path: path.read_text() for path in INTERNALS.glob("*.py") if path.stem != "table"}
    used = {name for source in text.values() for _, name in private_uses(ast.parse(source), KNOWN)}
    assert not (missing := used - KNOWN), f"describe them in lightning_internals/table.py: {sorted(missing)}"


def test_every_name_in_the_table_is_used() -> None:
    text = "\n".join(path.read_text() for path in INTERNALS.glob("*.py") if path.stem != "table")
    words = set(re.findall(r"\w+", text))
    assert not (idle := {entry.name for entry in PRIVATE_NAMES} - words), f"nothing uses these: {sorted(idle)}"


@pytest.mark.parametrize(
    "source",
    [
        "trainer.fit_loop._combined_loader = None",
        "getattr(trainer, '_val_check_time_interval', None)",
        "loop.__dict__['_data_fetcher']",
        "vars(loop)['_data_fetcher']",
        "copied.__dict__.update(_iterator=None)",
        "from lightning.pytorch.loops.fit_loop import _FitLoop",
        "import lightning.pytorch._graveyard",
        "class A:\n    def __init__(self):\n        self._results = trainer._results",
        "from lightning.pytorch.cli import LightningCLI\nclass A(LightningCLI):\n    def _set_seed(self): pass",
        "class A(B):\n    def __iter__(self):\n        return self._iterator",
        "class A(OpenCLI):\n    def _run_subcommand(self, name): pass",
    ],
)
def test_private_use_is_seen(source: str) -> None:
    assert list(private_uses(ast.parse(source), KNOWN))


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self):\n        self._mode = 1\n    def get(self):\n        return self._mode",
        "def _helper(): pass\n_helper()",
        "row._replace(a=1)",
        "{'_epochs': 1}['_epochs']",
        "name.endswith('_epoch')",
        "before = parameter._version",
    ],
)
def test_own_names_are_left_alone(source: str) -> None:
    assert not list(private_uses(ast.parse(source), KNOWN))
