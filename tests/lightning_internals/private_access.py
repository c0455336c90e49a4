"""Private names that a file uses of objects which are not its own, found in its source."""

from __future__ import annotations

import ast
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path

FOREIGN = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics")
NAMED_TUPLE = {"_replace", "_make", "_fields"}
TORCH = {"_version", "_values", "_pytree"}  # of a tensor, of a jagged one, of torch.utils
READERS = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


def private_uses(
    tree: ast.Module, known: set[str] = frozenset(), package: set[str] = frozenset()
) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each use.

    Args:
        tree: The file.
        known: Names that are foreign even where the file has one of the same name, unless its own class has it.
        package: Names that an object's own class may have from another file of the package.
    """
    own = own_names(tree)
    bases = foreign_classes(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            inherited = package - known if on_self else set()
            is_own = node.attr in own | inherited and (on_self or node.attr not in known)
            found = [] if is_own else [node.attr]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found = list(imported(node))
        elif isinstance(node, ast.ClassDef):
            found = list(overridden(node, bases, known))
        else:
            found = [name for name in named_in_text(node) if name not in own or name in known]
        yield from ((node.lineno, name) for name in found)


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    for alias in node.names:
        path = f"{module}.{alias.name}".strip(".").split(".")
        if path[0] in FOREIGN and any(map(is_private, path)):
            yield path[-1]


def overridden(node: ast.ClassDef, bases: dict[str, type], known: set[str]) -> Iterator[str]:
    parents = [bases[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in bases]
    methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
    for name in filter(is_private, methods):
        if any(hasattr(parent, name) for parent in parents) or (node.bases and name in known):
            yield name


def named_in_text(node: ast.AST) -> Iterator[str]:
    """Yield the private names in ``getattr(x, "_n")``, ``x.__dict__["_n"]`` and ``x.__dict__.update(_n=...)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
        texts = node.args[1:2]
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(("__dict__", ")")):
        texts = [node.slice]
    else:
        texts = []
    yield from (t.value for t in texts if isinstance(t, ast.Constant) and is_private(str(t.value)))
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("__dict__.update", ").update")):
        yield from (word.arg for word in node.keywords if word.arg and is_private(word.arg))


def own_names(tree: ast.Module) -> set[str]:
    """Collect what the file's functions, classes, fields and assignments to ``self`` are called."""
    names = NAMED_TUPLE | TORCH
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.attr if isinstance(node.target, ast.Attribute) else ast.unparse(node.target))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def foreign_classes(tree: ast.Module) -> dict[str, type]:
    """Import the classes of Lightning and torchmetrics that the file imports by name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the oldest Lightning's command line on a new jsonargparse
                module = importlib.import_module(node.module)
            found |= {a.asname or a.name: getattr(module, a.name, None) for a in node.names}
    return {name: kind for name, kind in found.items() if isinstance(kind, type)}


def uses_in(path: Path, known: set[str], package: set[str]) -> list[str]:
    return [f"{path.name}:{line}: {name}" for line, name in private_uses(ast.parse(path.read_text()), known, package)]
