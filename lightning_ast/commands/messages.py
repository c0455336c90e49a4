"""The errors that a user can mend, in a line each; all others need a traceback."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from traceback import walk_tb

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ast.errors import ConfigurationError, UsageError

__all__ = ["condensed", "plain_lines", "users_error"]

_PACKAGE = Path(__file__).resolve().parents[1]
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
# the lines of jsonargparse that repeat the types of a parameter, or the value of a list or mapping
_REPEATED = re.compile(
    r"\s*(- )?(Does not validate against|Subtypes: |Errors:$|Expected a <class 'NoneType'>|Expected a path but |"
    r"Given value type: |Given value: ([\[{]|\w+\()|Not a valid subclass of \w+$|Subclass types |a class path |"
    r"a dict with)"
)
_WORDS = {
    r'Parser key "(.*?)":': r"\1:",
    r"Problem with given class_path '(.*?)':": r"\1:",
    r": (?:- )?Expected a ": ": expected ",
    r" - Expected a ": " or ",
    r": - ": ": ",
    r"<class '(?:[\w.]+\.)?(\w+)'>": r"\1",
    r"typing\.Literal\[(.*?)\]": r"one of \1",
    r"\.? (?:Given|Got) value:": ", got",
    r" or dot import path string: [^,\s]+|dot import path string: [^,\s]+ or ": "",  # that a class is possible, too
    r"expected dot import path string: ([^,\s]+)(, got .*)?": (
        r"no class \1 is known: give its full path, such as package.module.\1"
    ),
    r" - lightning\.Callback:( Option '\w+' is not accepted)?$": "",
    r"lightning\.Callback: (Option '\w+' is not accepted)": (
        r"\1: the settings of a callback stand below its init_args, and as options behind --trainer.callbacks+=CLASS"
    ),
}


def condensed(message: str) -> str:
    """Put an error message of jsonargparse into one line, without what it says twice."""
    lines: list[str] = []
    for line in message.splitlines():
        told = line.strip()
        is_new = told not in lines or told.startswith("Parser key")  # a key may hold another one of its name
        if told and is_new and not _REPEATED.match(line):
            lines.append(told)
    text = " ".join(lines)
    for pattern, words in _WORDS.items():
        text = re.sub(pattern, words, text)
    return text


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
    # as a traceback shows them; `raise ... from` may make a circle
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if isinstance(each, SyntaxError) and each.filename is not None and _is_users(each.filename):
            return each
        if any(map(_is_users, _files(each))):
            return each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return None


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
