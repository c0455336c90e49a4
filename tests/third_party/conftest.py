"""What all tests with other people's modules have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Many of these modules are shrunk to a layer or two, whose backward is so small that a mode saves little."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:lightning-ast. mode=.* at an activation rate"))
