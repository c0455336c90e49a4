"""Checks for the commands on a page: they parse the arguments as the command would, and run nothing."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from tests.helpers.command import run
from tests.helpers.pages import ROOT

__all__ = ["check_command", "check_config", "check_mention", "commands"]

EXAMPLE = ROOT / "examples" / "cifar10_resnet9.yaml"
LIGHTNING = ("fit", "validate", "test", "predict")


class _ParsedError(Exception):
    """A script has parsed its arguments, and is to do no more."""


def commands(text: str) -> list[list[str]]:
    """Split a block into its commands, without comments, variables of the environment, and what they show."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line for line in lines if line.startswith("$ ")]
    found = []
    for line in prompted or lines:
        for part in re.split(r"\s(?:&&|\|\||\||;)\s", line.removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def check_command(words: list[str], cwd: Path) -> None:
    """Fail where a command is not one that this project has, or would refuse its arguments."""
    name, *arguments = words
    if Path(name).name.startswith("python") and arguments:
        if arguments[0] == "-m":
            name = {"lightning_ast": "lightning-ast"}.get(arguments[1], arguments[1])
            arguments = arguments[2:]
        elif arguments[0].startswith(("benchmarks/", "examples/")):
            _check_script(ROOT / arguments[0], arguments[1:], cwd)
    if name == "lightning-ast":
        _check_own(arguments, cwd)
    elif name == "make":
        _check_targets(arguments)
    elif name == "pip" or name.endswith("/pip"):
        _check_extras(arguments)


def check_mention(words: list[str], cwd: Path) -> None:
    """Fail where a text names a command that there is not; what it needs may be left out there."""
    if words[0] == "lightning-ast" and len(words) == 2:
        words = [*words, "--help"]
    elif words[0] == "python" and len(words) == 2:
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
        return
    check_command(words, cwd)


def check_config(text: str, cwd: Path) -> None:
    """Fail where the command line refuses a configuration; a part of one gets the model and the data of the demo."""
    (cwd / "page.yaml").write_text(text)
    rest = []
    if not re.search(r"^model:", text, re.MULTILINE):
        rest += ["--model", "lightning_ast.demo.ResNet9"]
    if not re.search(r"^data:", text, re.MULTILINE):
        rest += ["--data", "lightning_ast.demo.ImageData"]
    run("fit", "--config", "page.yaml", *rest, "--print_config", cwd=cwd)


def _check_own(arguments: list[str], cwd: Path) -> None:
    command, *rest = arguments or ["--help"]
    if command in LIGHTNING:
        run(command, *_with_files(rest), "--print_config", cwd=cwd)
    elif command == "advise":
        text = " ".join(rest)
        budget = re.search(r"--budget_seconds[ =](\S+)", text)
        assert budget is None or float(budget[1]) > 0, text
        run("fit", *_with_files(re.sub(r"--budget_seconds[ =]\S+", "", text).split()), "--print_config", cwd=cwd)
    elif command in ("demo", "report", "export"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_ast.demo.compare.run_demo", lambda **options: None)
            patch.setattr("lightning_ast.report.write.make_report", lambda *_, **options: (Path("report.html"), []))
            patch.setattr("lightning_ast.commands.export.export_command", lambda *_, **options: 0)
            run(*arguments, cwd=cwd)
    else:
        run(*arguments, cwd=cwd)


def _with_files(arguments: list[str]) -> list[str]:
    """Put an example in the place of a configuration that is the reader's own."""
    replaced = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, joined, value = word.partition("=")
        is_joined = option == "--config" and bool(joined)
        if before != "--config" and not is_joined:
            replaced.append(word)
            continue
        file = value if is_joined else word
        path = ROOT / file if file.startswith("examples/") else EXAMPLE
        replaced.append(f"--config={path}" if is_joined else str(path))
    return replaced


def _check_script(script: Path, arguments: list[str], cwd: Path) -> None:
    assert script.is_file(), f"there is no {script.relative_to(ROOT)}"
    source = script.read_text()
    if "argparse" not in source:
        assert all(f'"{word}"' in source for word in arguments), f"{script.name} knows no {arguments}"
        return

    parser_class = jsonargparse.ArgumentParser if "auto_cli" in source else argparse.ArgumentParser
    parse = parser_class.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        parse(parser, *given, **options)
        raise _ParsedError

    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr("sys.argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        patch.setattr(parser_class, "parse_args", stop)
        try:
            with pytest.raises(_ParsedError):
                runpy.run_path(str(script), run_name="__main__")
        except ModuleNotFoundError as missing:  # a recipe may need what no other part of the project does
            pytest.skip(f"{missing.name} is not installed")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(script.parent)):
            del sys.modules[name]


def _check_targets(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in (word for word in arguments if "=" not in word and not word.startswith("-")):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"the Makefile has no target {target}"


def _check_extras(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for listed in re.findall(r"(?:lightning-ast|\.)\[([\w,-]+)\]", " ".join(arguments)):
        for extra in listed.split(","):
            assert re.search(rf"^{re.escape(extra)} = \[", project, re.MULTILINE), f"there is no extra {extra}"
