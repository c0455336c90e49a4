"""The scripts of ``examples/``, imported as the recipe runner does, and made small."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

__all__ = ["EXAMPLES", "recipe"]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def recipe(name: str, monkeypatch: pytest.MonkeyPatch, **sizes: object) -> ModuleType:
    """Import ``examples/<name>.py`` afresh, with other values of its constants."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('/', '_')}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant, value in sizes.items():
        monkeypatch.setattr(module, constant, value)
    return module
