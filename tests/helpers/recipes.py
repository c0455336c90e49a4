"""The scripts of ``examples/``, imported as the recipe runner does, and made small."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest

__all__ = ["EXAMPLES", "recipe"]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def recipe(
    name: str, monkeypatch: pytest.MonkeyPatch, runs: Mapping[str, Any] = MappingProxyType({}), **sizes: object
) -> ModuleType:
    """Import ``examples/<name>.py`` afresh, with other values of its constants and of its comparison."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('/', '_')}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if runs:
        sizes["RUNS"] = replace(module.RUNS, **runs)
    for constant, value in sizes.items():
        monkeypatch.setattr(module, constant, value)
    return module
