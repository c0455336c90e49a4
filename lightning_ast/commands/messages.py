"""The errors that a user can mend, in a line each; all others need a traceback."""

from __future__ import annotations

import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ast.callbacks import ConfigurationError
from lightning_ast.errors import UsageError

__all__ = ["condensed", "plain_lines", "users_error"]

_PACKAGE = Path(__file__).resolve().parents[1]
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_LONGEST_VALUE = 60
# what jsonargparse writes, and what a user understands
_WORDS = {
    r"<class '(?:[\w.]+\.)?(\w+)'>": r"\1",
    r"\ba typing\.Literal\[(.*?)\]": r"one of \1",
    r"\. Got value: ": ", got ",
    r"(: | or )Expected ": r"\1expected ",
    r"\ba (?=int\b|object\b|Iterable\b)": "an ",
    r"Not a valid subclass of (\w+).*?implicit class_path\)": r"expected the class path of a \1",
    r"(?:E|e)xpected a dot import path string: (\S+?)(?:, got .*)?$": (
        r"no class \1 is known: give its full path, such as package.module.\1"
    ),
}


def plain_lines(error: Exception) -> list[str] | None:
    """Tell an error that the user can mend without looking into code, in lines; None where the traceback is needed."""
    # the errors of this package, and those of the configuration, of files and of Lightning's checks, unless the user's
    # own code stands in their traceback
    if isinstance(error, ConfigurationError):
        return [" ".join(fault.split()) for fault in error.faults]
    ours = any(kind.__module__.partition(".")[0] == _PACKAGE.name for kind in type(error).__mro__)
    if ours and not isinstance(error, UsageError):
        return [str(error)]
    mendable = isinstance(error, (UsageError, MisconfigurationException, OSError, ImportError, EOFError))
    mendable = mendable or (isinstance(error, (ValueError, RuntimeError)) and _raised_by_lightning(error))
    if not mendable or users_error(error) is not None or "Traceback" in str(error):  # a loading process's traceback
        return None
    return [" ".join(str(error).split()) or type(error).__name__]


def users_error(error: BaseException) -> BaseException | None:
    """Find the error that arose in the user's own code, among an error and those that led to it."""
    for each in _chain(error):
        if isinstance(each, SyntaxError) and each.filename is not None and _is_users(each.filename):
            return each
        if any(_is_users(name) for name in _files(each)):
            return each
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    # as a traceback shows it; `raise ... from` may make a circle
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _files(error: BaseException) -> list[str]:
    return [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]


def _raised_by_lightning(error: Exception) -> bool:
    """Tell whether Lightning itself raised an error, as its checks of a run do, and nothing that it called."""
    last = _files(error)[-1:]
    return any({"lightning", "lightning_fabric", "pytorch_lightning"} & set(Path(file).parts) for file in last)


def _is_users(file: str) -> bool:
    """Tell whether a source file is the user's: not Python's own, nor an installed package's, nor this package's."""
    path = Path(file)
    if not path.is_absolute():  # "<frozen importlib>", and what Cython leaves
        return False
    path = path.resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not path.is_relative_to(_STANDARD_LIBRARY) and not path.is_relative_to(_PACKAGE)


def condensed(message: str) -> str:
    r"""Put an error message of jsonargparse, which lists what each alternative type expects, into one line."""
    text = " ".join(_condense(message).split())
    for pattern, words in _WORDS.items():
        text = re.sub(pattern, words, text)
    return text


def _condense(text: str) -> str:
    if match := re.match(r"""(?:Parser key "([^"]*)"|Problem with given class_path '([^']*)'):\s*""", text):
        return f"{match[1] or match[2] or ''}: {_condense(_dedented(text[match.end() :]))}"
    _, union, alternatives = text.partition("Does not validate against any of the Union subtypes")
    if not union:
        return text
    errors, _, value = alternatives.partition("Errors:\n")[2].rpartition("Given value type:")
    told = _telling([_condense(_dedented(item)) for item in re.split(r"(?m)^- ", textwrap.dedent(errors))[1:]])
    given = value.partition("Given value: ")[2].strip()
    if not told or "got" in told.lower() or len(given) > _LONGEST_VALUE or re.match(r"[\[{]|\w+\(", given):
        return told or text
    # a reason may name the value already: as its class path, or in quotes (which types have too: <class 'int'>)
    is_named = told.startswith(f"{given}: ") or (f"'{given}'" in told and not told.startswith("Expected "))
    return told if is_named else f"{told}, got {given}"


def _dedented(text: str) -> str:
    """Take the indentation off all lines but the first, which has none."""
    first, _, rest = text.partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}"


def _telling(reasons: list[str]) -> str:
    """Join the reasons of the alternatives; leave out those that only name a type that nobody meant."""
    empty = ("Expected a <class 'NoneType'>", "Not a valid subclass of", "Expected a path", "Expected a dot import")
    meant = [reason for reason in reasons if not reason.startswith(empty)] or reasons[:1]
    about_class = [reason for reason in meant if re.match(r"[\w.]+\.\w+: ", reason)]
    told = list(dict.fromkeys(reason.strip() for reason in about_class[:1] or meant))
    types = [reason for reason in told if reason.startswith("Expected ")]
    others = [reason for reason in told if reason not in types]
    expected = [" or ".join([*types[:1], *(reason.removeprefix("Expected ") for reason in types[1:])])] if types else []
    return " or ".join([*others, *expected])
