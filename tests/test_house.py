"""The files around the package: one version, valid forms, and types that another project's mypy sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ast.__about__ import __version__
from tests.helpers.pages import ROOT

KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_version_stands_in_one_file_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'path = "lightning_ast/__about__.py"' in project
    assert not re.search(r"^version\s*=", project, re.MULTILINE)
    literal = re.compile(rf"""["']{re.escape(__version__)}["']""")
    holders = [path.name for path in (ROOT / "lightning_ast").rglob("*.py") if literal.search(path.read_text())]
    assert holders == ["__about__.py"]


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["message"]
    assert citation["title"].startswith("lightning-ast")
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_changelog_has_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    if versions[1:]:
        assert versions[1].startswith(f"[{__version__}]")
    for section in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds == sorted(set(kinds), key=KINDS.index), "known kinds, each once, in the usual order"
        for entries in re.split(r"^### .*$", section, flags=re.MULTILINE)[1:]:
            assert not re.sub(r"^(?:- |  ).*\n", "", entries, flags=re.MULTILINE).strip(), "a list and nothing else"


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_issue_forms_are_valid(form: Path) -> None:
    """Keep to GitHub's syntax of forms, as far as it is used."""
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys() <= {"name", "description", "labels", "title", "body"}
    names = [field["id"] for field in content["body"]]
    assert len(names) == len(set(names))
    for field in content["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["attributes"]["label"]
        assert (field["type"] == "dropdown") == ("options" in field["attributes"])
        assert all(isinstance(value, str) for key, value in field["attributes"].items() if key != "options")
        assert field.get("validations", {}).keys() <= {"required"}
    assert any(field.get("validations", {}).get("required") for field in content["body"])


def test_the_issue_form_knows_the_modes() -> None:
    from lightning_ast.mode_facts import MODES

    (field,) = [each for each in read(".github/ISSUE_TEMPLATE/bug.yml")["body"] if each["id"] == "mode"]
    assert {*MODES} < {*field["attributes"]["options"]}


def test_hooks_are_those_of_make_check() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    checks = (ROOT / "Makefile").read_text()
    for hook in repository["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys()
        tool = " ".join(word for word in hook["entry"].split()[:2] if not word.startswith("-"))
        assert tool.replace(".venv/bin", "$(BIN)") in checks


RIGHT = """
import lightning as L
from torch import Tensor, nn

from lightning_ast import PIController, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.advice import Prediction, advise
from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.energy import EnergyMeter, find_meters
from lightning_ast.testing import check_partial_backward


class Net(SparseLossMixin, L.LightningModule):
    def count_samples(self, batch: list[Tensor]) -> int:
        return len(batch[0])


def callbacks(rate: float) -> list[L.Callback]:
    selection = SparseSelectionCallback(target_activation_rate=rate, mode="prune", controller=PIController(kp=0.1))
    return [selection, TwoStageScheduler(warmup_epochs=1, cooldown_epochs=0.1)]


def saved(callback: SparseSelectionCallback) -> float | None:
    return callback.savings["flops"]


def seconds(trainer: L.Trainer, module: L.LightningModule) -> float:
    prediction: Prediction | None = advise(trainer, module).at("partial", 0.4)
    return 0.0 if prediction is None else prediction.run_seconds


def step(gate: GradientGate, loss: Tensor) -> None:
    gate.open(loss, batch_size=8)


gate: GradientGate = GradientGate(SampleSelector(target_coverage=0.9))
error: float = check_partial_backward(nn.Linear(1, 1), None).relative_error
"""
WRONG = {
    'SparseSelectionCallback(mode="fast")': "arg-type",
    "SparseSelectionCallback(0.4)": "call-arg",
    'TwoStageScheduler(warmup_epochs="1")': "arg-type",
    "SparseSelectionCallback().no_such": "attr-defined",
    'PIController(preset="theirs")': "arg-type",
}


@pytest.mark.slow  # mypy reads torch and Lightning
def test_another_projects_mypy_sees_the_types(tmp_path: Path) -> None:
    """As installed packages are seen: without the marker ``py.typed`` every import would be an error."""
    from mypy import api

    right = tmp_path / "right.py"
    wrong = tmp_path / "wrong.py"
    right.write_text(RIGHT)
    imports = "from lightning_ast import PIController, SparseSelectionCallback, TwoStageScheduler\n"
    wrong.write_text(imports + "\n".join(WRONG) + "\n")
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}", "--no-error-summary", "--hide-error-context"]
    told, faults, _ = api.run([*options, str(right), str(wrong)])
    assert not faults
    found = re.findall(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", told, re.MULTILINE)
    assert found == [("wrong", str(line), kind) for line, kind in enumerate(WRONG.values(), start=2)], told
