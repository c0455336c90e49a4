"""What docs/troubleshooting.md quotes are words that the package really prints."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lightning_ast.monitoring.text import RunSummary, format_epoch, format_summary

ROOT = Path(__file__).parent.parent
QUOTES = re.findall(r"```text\n(.*?)\n```", (ROOT / "docs" / "troubleshooting.md").read_text(), re.S)
SHORTEST = 6  # shorter pieces may stand anywhere
ENOUGH = 0.7  # the rest are names and numbers

LINE = format_epoch(0, 2, loss=2.3472, accuracy=0.0944, activation_rate=0.031, flops_savings=0.001)
SUMMARY = RunSummary(
    2,
    1.0,
    mode="partial",
    activation_rate=0.398,
    sparse_rate=0.398,
    target=0.4,
    savings={"samples": 0.602, "flops": 0.002, "seconds": None},
    best_savings=0.002,
)
FIGURES = {LINE, "\n".join(format_summary(SUMMARY).splitlines()[1:4])}
"""Quotes of few words: they are compared with what the monitor's own functions make."""


@cache
def pieces() -> frozenset[str]:
    """The constant parts of all strings of the package, without its docstrings."""
    found = set()
    for path in (ROOT / "lightning_ast").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found.add(" ".join(node.value.split()))
    return frozenset(piece for piece in found if len(piece) >= SHORTEST)


def share_printed(quote: str) -> float:
    """The share of the letters of a quote that stand in strings of the package."""
    text = " ".join(quote.split())
    covered = [False] * len(text)
    for piece in pieces():
        for match in re.finditer(re.escape(piece), text):
            covered[match.start() : match.end()] = [True] * len(match.group())
    letters = [place for place, sign in enumerate(text) if sign.isalpha()]
    return sum(covered[place] for place in letters) / len(letters)


@pytest.mark.parametrize("quote", QUOTES, ids=[" ".join(quote.split()[:6]) for quote in QUOTES])
def test_the_package_prints_what_is_quoted(quote: str) -> None:
    if quote not in FIGURES:
        assert share_printed(quote) >= ENOUGH, f"{share_printed(quote):.2f}"


def test_the_lines_of_figures_are_quoted() -> None:
    assert set(QUOTES) >= FIGURES


def test_a_sentence_that_is_not_printed_is_seen() -> None:
    assert share_printed("lightning-ast: the samples were lost, please try again") < ENOUGH
