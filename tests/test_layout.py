"""The architecture: imports point one way, the core knows no Lightning, importing has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lightning_ast"
LAYERS = [
    "words",
    "errors",
    "mode_facts",
    "core",
    "__about__",
    "extras",
    "schedule",
    "lightning_internals",
    "mixin",
    "testing",
    "streams",
    "pruning",
    "selection",
    "energy",
    "monitoring",
    "callbacks",
    "report",
    "commands",
    "advice",
    "demo",
    "recipes",
]
LAYERS += ["__main__", "cli"]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "lightning_ast":  # `from lightning_ast import report` names a module in the alias
                names |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name in LAYERS}
    return names


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts == ("__init__",):
        return
    own = LAYERS.index(parts[0])
    for name in imports(path):
        if name.startswith("lightning_ast."):
            assert LAYERS.index(name.split(".")[1]) <= own, f"{path} imports {name}"
        if parts[0] in ("words", "core"):
            top = name.split(".")[0]
            assert top not in (
                "lightning",
                "pytorch_lightning",
                "lightning_fabric",
                "lightning_utilities",
                "torchmetrics",
            ), f"{path}: {name}"


CORE_LAYERS = [
    "state",
    "partial",
    "batch",
    "dependence",
    "entries",
    "gradient_gate",
    "losses",
    "traceless_forward",
    "significance",
    "gate",
    "threshold",
    "large_plan",
    "controller",
    "selector",
    "plan_rules",
    "sample_record",
    "history",
    "plan_sampler",
    "plain_loop",
    "ledger",
]


def test_the_core_is_walked_in_one_direction() -> None:
    for path in sorted((ROOT / "core").rglob("*.py")):
        own = path.relative_to(ROOT / "core").with_suffix("").parts[0]
        for name in imports(path):
            if own != "__init__" and name.startswith("lightning_ast.core."):
                assert CORE_LAYERS.index(name.split(".")[2]) <= CORE_LAYERS.index(own), f"{path} imports {name}"


def test_no_circle_exists_between_files() -> None:
    """Count every import: those inside functions and those for the type checker too."""
    modules = {
        ".".join(("lightning_ast", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        packages = {f"{each}.__init__" for each in found} - {name}
        graph[name] = (found | packages) & modules.keys()
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_partial_backward_is_walked_in_one_direction() -> None:
    order = ["registry", "rows", "gradient", "memory", "rules", "selection", "flops"]
    assert {p.stem for p in (ROOT / "core" / "partial").iterdir() if p.stem not in ("__init__", "__pycache__")} == set(
        order
    )
    for path in (ROOT / "core" / "partial").rglob("*.py"):
        parts = path.relative_to(ROOT / "core" / "partial").with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imports(path):
            if name.startswith("lightning_ast."):
                package, *step = name.split(".")[1:][1:]
                assert package == "partial", f"{path} imports {name}"
                assert not step or order.index(step[0]) <= order.index(parts[0]), f"{path} imports {name}"


def test_importing_has_no_side_effects() -> None:
    code = (
        "import sys, lightning.pytorch, torchmetrics; before = set(sys.modules);"
        "import torch, random; torch.manual_seed(0); random.seed(0); a = torch.get_rng_state(); b = random.getstate();"
        "from lightning_ast import *; import lightning_ast.core, lightning_ast.advice.command;"
        "assert torch.equal(a, torch.get_rng_state()) and b == random.getstate();"
        "assert not {'torchvision', 'sklearn', 'tensorboard', 'matplotlib', 'rich.table', 'jsonargparse'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_core_alone_needs_no_lightning() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None; import importlib.util, types;"
        "pkg = types.ModuleType('lightning_ast'); pkg.__path__ = [sys.argv[1]]; sys.modules['lightning_ast'] = pkg;"
        "import lightning_ast.core as core; print(core.SampleSelector)"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)


def test_every_module_names_its_public_surface() -> None:
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assigned = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        assigned |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        assert "__all__" in assigned, path
        assert ast.get_docstring(tree), path


TESTS = Path(__file__).parent
PUBLIC_ALONE = ("callbacks", "selection", "pruning", "monitoring", "energy")
OBJECTS = {"callback", "selection", "monitor", "scheduler", "energy", "session"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names() -> set[str]:
    """The private attributes, methods and functions of the folders that are tested by their public names alone."""
    found: set[str] = set()
    for path in (path for folder in PUBLIC_ALONE for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                found.add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
    return set(filter(is_private, found))


def reaches(source: str, private: set[str]) -> list[str]:
    """Where a test reads a private name: of a callback, a session and the like any, of other objects one of ours."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            ours = owner.split(".")[-1] in OBJECTS or node.attr in private
            if ours and owner not in ("self", "module", "super()"):  # a test's own object, or one of Lightning's
                found.append(f"line {node.lineno}: {owner}.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr") and len(node.args) > 1:
            owner, name = (ast.unparse(argument) for argument in node.args[:2])
            if owner.split(".")[-1] in OBJECTS and name[1:2] == "_":
                found.append(f"line {node.lineno}: {owner}.{name}")
    return found


def test_tests_use_public_names() -> None:
    private = private_names()
    assert {"_session", "_progress"} <= private
    for path in sorted(TESTS.rglob("*.py")):
        assert not (found := reaches(path.read_text(), private)), f"{path}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "callback._anything",
        "trainer.callbacks[0].session._gate",
        "resumed._session.selector",
        "getattr(monitor, '_progress')",
        "monkeypatch.setattr(selection, '_step', 1)",
    ],
)
def test_a_private_reach_is_seen(source: str) -> None:
    assert reaches(source, {"_session"})


def test_files_of_tests_stay_short() -> None:
    for path in TESTS.rglob("*.py"):
        assert path.read_text().count("\n") <= 400, path


def test_files_and_functions_stay_short() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 330, path  # about 250; long docstrings count too
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
                assert length <= 40, f"{path.name}:{node.name} has {length} lines"
