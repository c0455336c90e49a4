"""The pages for readers, and what stands on them: blocks of code, links, anchors."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import markdown

__all__ = ["DOCS", "PAGES", "ROOT", "Block", "anchors", "as_html", "blocks", "code_spans", "links", "prose"]

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
HOUSE = [path for path in (ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md") if path.is_file()]
PAGES = [ROOT / "README.md", *HOUSE, *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^(?P<indent>[ >]*)(?P<fence>`{3,}|~{3,})\s*\{?\s*\.?(?P<language>[\w+-]*).*$")
_LINK = re.compile(r"\]\((?P<target>[^()\s]+(?:\([^()]*\))?[^()\s]*)(?:\s+\"[^\"]*\")?\)")
_REFERENCE = re.compile(r"^\s*\[[^\]^]+\]:\s*(?P<target>\S+)", re.MULTILINE)
_HTML = re.compile(r"<(?:a|img)\b[^>]*\b(?:href|src)=\"(?P<target>[^\"]+)\"")
_API = re.compile(r"^::: (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code: the page, the line and the language of its fence, and its text without indentation."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _split(text: str) -> tuple[list[tuple[int, str, str]], str]:
    """Return the fenced blocks of a page, and the page without them."""
    found: list[tuple[int, str, str]] = []
    outside: list[str] = []
    inside: list[str] = []
    opened: re.Match[str] | None = None
    began = 0
    for number, line in enumerate(text.splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened = fence
            began = number
            inside = []
        elif opened is not None and line.strip() == opened["fence"]:
            found.append((began, opened["language"], textwrap.dedent("\n".join(inside)) + "\n"))
            opened = None
        elif opened is not None:
            inside.append(line)
        else:
            outside.append(line)
    assert opened is None, f"a block that begins in line {began} does not end"
    return found, "\n".join(outside)


def blocks(*languages: str) -> list[Block]:
    """List the blocks of all pages in some languages."""
    return [
        Block(page, *found)
        for page in PAGES
        for found in _split(page.read_text(encoding="utf-8"))[0]
        if found[1] in languages
    ]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return _split(page.read_text(encoding="utf-8"))[1]


def code_spans(page: Path) -> list[str]:
    """List what stands in code font within a line of text."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(page: Path) -> list[str]:
    """List the targets of a page's links and pictures that are no addresses."""
    text = re.sub(r"(`+)[^`]+?\1(?!`)", "code", prose(page))
    targets = [found["target"] for pattern in (_LINK, _REFERENCE, _HTML) for found in pattern.finditer(text)]
    return sorted({target for target in targets if not re.match(r"[a-z]+:", target)})


@cache
def as_html(page: Path) -> str:
    """Return a page as the site shows it, without the reference of the API."""
    extensions = ["toc", "admonition", "attr_list", "footnotes", "tables", "md_in_html"]
    return markdown.markdown(
        page.read_text(encoding="utf-8"),
        extensions=[*extensions, *(f"pymdownx.{name}" for name in ("details", "superfences", "snippets", "tabbed"))],
        extension_configs={
            "pymdownx.snippets": {"base_path": [str(ROOT)], "check_paths": True},
            "pymdownx.tabbed": {"alternate_style": True},
        },
    )


@cache
def anchors(page: Path) -> frozenset[str]:
    """Name the places of a page that a link can point to: those of the site for its pages, else those of a forge."""
    text = page.read_text(encoding="utf-8")
    if page.is_relative_to(DOCS):
        return frozenset([*re.findall(r'\bid="([^"]+)"', as_html(page)), *_API.findall(text)])
    named = re.findall(r'\b(?:id|name)="([^"]+)"', text)
    slugs: list[str] = []
    for title in re.findall(r"^#{1,6} +(.*?)\s*#*$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return frozenset([*slugs, *named])
