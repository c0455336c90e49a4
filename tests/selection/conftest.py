"""Data of the tests of the selection."""

from __future__ import annotations

import pytest

from tests.helpers.data import Digits
from tests.selection.plain_and_ours import BATCH

__all__: list[str] = []


@pytest.fixture
def few(digits: Digits) -> Digits:
    """Eight batches."""
    return digits[0][: 8 * BATCH], digits[1][: 8 * BATCH]
