"""The pages for readers: their code runs, their commands and configurations parse, their links lead somewhere."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from typing import get_origin

import pytest
import yaml

from tests.helpers.page_commands import check_command, check_config, check_mention, commands
from tests.helpers.pages import DOCS, PAGES, ROOT, Block, anchors, as_html, blocks, code_spans, links, prose

PUBLIC = (
    "",
    ".advice",
    ".callbacks",
    ".commands",
    ".core",
    ".demo",
    ".energy",
    ".errors",
    ".report",
    ".streams",
    ".testing",
)
SHOWN = {"SparseTrainingMonitor(": " | Loss:", "print(": "\n"}
"""A block that holds the first prints the second."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("block", blocks("python", "py"), ids=str)
@pytest.mark.filterwarnings("default")  # as in a script of the reader's own
def test_python_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    for call, text in SHOWN.items():
        assert call not in block.text or text in shown, shown


@pytest.mark.parametrize("block", blocks("bash", "sh", "shell", "console"), ids=str)
def test_commands_exist(block: Block, tmp_path: Path) -> None:
    for command in commands(block.text):
        check_command(command, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_within_the_text_exist(page: Path, tmp_path: Path) -> None:
    spans = [span for span in code_spans(page) if re.match(r"(lightning-ast|python|make|pip) [\w-]", span)]
    for span in spans:
        if span == "lightning-ast report":  # names the command
            continue
        for command in commands(span):
            check_mention(command, tmp_path)


@pytest.mark.parametrize("block", blocks("yaml", "yml"), ids=str)
def test_configurations_parse(block: Block, tmp_path: Path) -> None:
    settings = yaml.safe_load(block.text)
    if {"trainer", "model", "data"} & set(settings):
        check_config(block.text, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: there is no such file"
        assert target.is_relative_to(DOCS) or not page.is_relative_to(DOCS), f"{link}: not on the site"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such place on the page"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    for span in code_spans(page):
        if re.fullmatch(r"(benchmarks|docs|examples|lightning_ast|tests)/[\w./*-]*", span):
            assert list(ROOT.glob(span.rstrip("/"))), f"there is no {span}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name)
def test_lines_are_short(page: Path) -> None:
    text = re.sub(r"<!-- ([\w-]+): generated .*?<!-- /\1 -->", "", prose(page), flags=re.DOTALL)
    assert not [line for line in text.splitlines() if len(line) > 120 and not re.match(r"\s*(\||!?\[[^\]]*\]\()", line)]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name)
def test_what_is_marked_up_is_rendered(page: Path) -> None:
    """A list, a table and a note need an empty line before them, which a forge does without."""
    shown = re.sub(r"<(code|pre|script)\b.*?</\1>", "", as_html(page), flags=re.DOTALL)
    assert shown.count("<h1") == 1, "one title"
    for paragraph in re.findall(r"<p>(.*?)</p>", shown, re.DOTALL):
        assert not re.search(r"^\s*([-*+] |\d\d?\. |\||!!!|===|```)|\*\*|\]\(", paragraph, re.MULTILINE), paragraph


def test_every_page_is_in_the_navigation() -> None:
    def files(entries: object) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        inner = entries.values() if isinstance(entries, dict) else entries
        return [file for entry in inner for file in files(entry)]

    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    listed = files(settings["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def resolved(path: str) -> object:
    """Import what a path of modules and attributes names."""
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_reference_holds_every_public_name() -> None:
    paths = [path for page in (DOCS / "api").glob("*.md") for path in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    assert len(paths) == len(set(paths))
    described = [id(resolved(path)) for path in paths]
    assert len(described) == len(set(described)), "an object is described twice, under two names"
    public = {
        f"lightning_ast{package}.{name}": getattr(module, name)
        for package in PUBLIC
        for module in [importlib.import_module(f"lightning_ast{package}")]
        for name in module.__all__
        if name != "__version__"
    }
    missing = [path for path, value in public.items() if id(value) not in described and get_origin(value) is None]
    assert not missing


def test_places_on_pages_are_found(tmp_path: Path) -> None:
    assert "the-way-of-a-batch" in anchors(DOCS / "architecture.md")
    assert "lightning_ast.callbacks.EnergyMonitor" in anchors(DOCS / "api" / "callbacks.md")
    page = tmp_path / "page.md"
    page.write_text(
        "# What `r` is, [really](x.md)?\n## Twice\n## Twice\n```python\n# no heading\n[no link](no.md)\n```\n"
        '![a picture](p.png "A title") `[code](no.md)` [there](y.md#z) [away](https://example.com)\n'
    )
    assert anchors(page) == {"what-r-is-really", "twice", "twice-1"}
    assert links(page) == ["p.png", "x.md", "y.md#z"]


def test_docstrings_become_markdown() -> None:
    to_markdown = runpy.run_path(str(DOCS / "_docstrings.py"))["to_markdown"]
    assert to_markdown("Call :meth:`close`.\n\nExample:\n    >>> 1") == "Call `close`.\n\nExamples:\n    >>> 1"
    link = '<autoref identifier="lightning_ast.core.select" optional><code>select</code></autoref>'
    assert to_markdown("See :func:`~lightning_ast.core.select`.") == f"See {link}."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("make demo  # a minute\n", [["make", "demo"]]),
        ("$ A=1 B=2 python x.py --a \\\n  --b\n", [["python", "x.py", "--a", "--b"]]),
        ("$ make demo\nwhat it shows\n", [["make", "demo"]]),
        ("cd x && lightning-ast report 'a b'\n\n# nothing\n", [["cd", "x"], ["lightning-ast", "report", "a b"]]),
    ],
)
def test_commands_are_found(text: str, found: list[list[str]]) -> None:
    assert commands(text) == found


@pytest.mark.parametrize(
    "command",
    [
        "lightning-ast train",
        "lightning-ast demo --mode fast",
        "lightning-ast report",
        "lightning-ast fit --config config.yaml --trainer.no_such 1",
        "lightning-ast advise --config config.yaml --budget_seconds 0",
        "python -m lightning_ast fit --config examples/no_such.yaml",
        "python benchmarks/cifar10.py --policy no_such",
        "python benchmarks/summarize.py --write",
        "python examples/no_such.py",
        "make coffee",
        "pip install '.[no_such]'",
    ],
)
def test_commands_that_are_wrong_are_seen(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_command(commands(command)[0], tmp_path)
