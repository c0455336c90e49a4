"""The house style that a program can check: whole sentences in docstrings, one assignment a line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("lightning_ast", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))

NO_VERBS = re.compile(
    "(a|all|an|as|at|behind|by|each|every|for|from|here|how|if|in|kept|likewise|much|no|not|nothing|of|on|one|so|that|"
    "the|their|there|these|those|to|what|when|where|whether|which|who|whose|why|with|without)$",
    re.IGNORECASE,
)
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
ENTRY = re.compile(r" {4}(\*{0,2}\w+): (.*)")


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node, text


def dangling(text: str) -> Iterator[str]:
    """Yield the entries of a docstring's sections that do not begin a sentence of their own."""
    section, is_first = "", False
    for line in text.splitlines():
        if found := SECTION.match(line):
            section, is_first = found[1], True
            continue
        if line.strip() and not line.startswith(" "):
            section = ""
        if section in ("Args", "Attributes", "Raises") and (entry := ENTRY.match(line)):
            if re.match("[a-z]", entry[2]):
                yield line.strip()
        elif section in ("Returns", "Yields") and is_first and re.match(" {4}[a-z]", line):
            yield line.strip()
        is_first = False


def begins_with_verb(text: str) -> bool:
    """Tell whether a docstring may begin with an imperative verb; it cannot where its first word is none of any kind."""
    word = re.split("[ ,;]", text, maxsplit=1)[0]
    is_third_person = word.endswith("s") and not word.endswith("ss")
    return word.isalpha() and word[0].isupper() and not NO_VERBS.match(word) and not is_third_person


def packed(tree: ast.Module) -> Iterator[ast.Assign]:
    """Yield assignments of several values to as many names, but for exchanges of values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                names = [ast.unparse(part) for part in target.elts] if isinstance(target, ast.Tuple) else []
                values = [ast.unparse(part) for part in node.value.elts]
                if len(names) == len(values) and set(names) != set(values):
                    yield node


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def test_entries_of_docstrings_begin_a_sentence() -> None:
    found = [f"{place(p, n)}: {entry}" for p in FILES for n, text in docstrings(read(p)) for entry in dangling(text)]
    assert not found, "begin with a capital letter and a noun (`trainer: The trainer of this fit.`):\n" + "\n".join(
        found
    )


def test_functions_are_described_by_a_verb() -> None:
    found = [
        f"{place(path, node)}: {text.splitlines()[0]}"
        for path in FILES
        for node, text in docstrings(read(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not begins_with_verb(text)
    ]
    assert not found, "begin with an imperative (`Return ...`, `Tell whether ...`):\n" + "\n".join(found)


def test_one_assignment_a_line() -> None:
    found = [f"{place(path, node)}: {ast.unparse(node)}" for path in FILES for node in packed(read(path))]
    assert not found, "one assignment a line:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Do.\n\nArgs:\n    trainer: of this fit.\n    rate: The rate.", 1),
        ("Do.\n\nAttributes:\n    seconds: that watching took.\n\nReturns:\n    undoes it.", 2),
        ("Do.\n\nRaises:\n    ValueError: it is wrong.", 1),
        (
            "Do.\n\nArgs:\n    rate: ``(B,)`` rates.\n        of all samples: a second line.\n\nReturns:\n    The\n    rate.",
            0,
        ),
    ],
)
def test_dangling_entries_are_seen(text: str, count: int) -> None:
    assert len(list(dangling(text))) == count


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("Return it.", True),
        ("Process it.", True),
        ("What it is.", False),
        ("Whether it is.", False),
        ("``(B,)`` of it.", False),
        ("Returns it.", False),
        ("So that it is.", False),
    ],
)
def test_verbs_are_told_from_other_words(text: str, is_one: bool) -> None:
    assert begins_with_verb(text) is is_one


@pytest.mark.parametrize(
    ("source", "count"), [("a, b = 1, 2", 1), ("self.a, self.b = a, b", 1), ("a, b = b, a", 0), ("a, b = f()", 0)]
)
def test_packed_assignments_are_seen(source: str, count: int) -> None:
    assert len(list(packed(ast.parse(source)))) == count
