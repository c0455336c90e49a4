"""Name the callback of a configuration that a fault belongs to: its place in ``trainer.callbacks`` and its class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

from lightning_ast.callbacks import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.commands.messages import condensed
from lightning_ast.selection.setting_faults import setting_faults
from lightning_ast.selection.settings import SelectionSettings

__all__ = ["faulty_file", "faulty_item", "named", "with_owner"]

_KEY = "--trainer.callbacks"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # Python's own takes seconds for deep brackets


def named(index: int, name: str) -> str:
    """Write the place and the class of a callback, where the class is known."""
    place = f"trainer.callbacks[{index}]"
    return f"{place} ({name.rpartition('.')[2]})" if name else place


def with_owner(fault: str, callbacks: Sequence[object], trainer: pl.Trainer) -> str:
    """Put the name of the callback that has a fault before it, where the fault is one of a callback's settings."""
    for index, callback in enumerate(callbacks):
        own: list[str] = []
        if isinstance(callback, SparseSelectionCallback):
            own = setting_faults(SelectionSettings.of(callback))
        elif isinstance(callback, TwoStageScheduler):
            own = [f for known in (False, True) for f in callback.faults(trainer, batches_known=known)]
        if fault in own:
            return f"{named(index, type(callback).__name__)}: {fault}"
    return fault


def faulty_item(arguments: Sequence[str]) -> str | None:
    """Name the first item of ``trainer.callbacks`` that cannot be parsed, and what is wrong with it."""
    # The list is built as jsonargparse builds it, in the order of the arguments: files, lists, items that are appended,
    # and settings of the last item.
    items: list[Any] = []
    for option, value in _options(arguments):
        last = ""
        if option in ("-c", "--config"):
            found = _callbacks_of(_content(value), arguments)
            items = items if found is None else _as_list(found)
        elif option == _KEY:
            items = _as_list(_parsed(value))
        elif option == f"{_KEY}+":
            items = items + _as_list(_parsed(value))
        elif option.startswith(f"{_KEY}.") and items:
            items = [*items[:-1], _with_setting(items[-1], option.removeprefix(f"{_KEY}."), _parsed(value))]
            last = " (this option sets the last callback of the list)"
        elif option.startswith(f"{_KEY}."):
            return f"{option}: expected a callback before it, for example {_KEY}+=SparseSelectionCallback"
        for index, item in enumerate(items):
            if fault := _item_fault(item):
                return f"{named(index, _class_name(item))}: {fault}{last}"
    return None


def faulty_file(arguments: Sequence[str]) -> str | None:
    """Name the first configuration file that is not text, not YAML or not a mapping, and what is wrong with it."""
    for option, name in _options(arguments):
        if option not in ("-c", "--config") or not Path(name).is_file():  # a pipe can be read only once
            continue
        try:
            content = _load(Path(name).read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            return f"{name}: expected a YAML file, got bytes that are not UTF-8 text (at byte {error.start})"
        except (yaml.YAMLError, RecursionError) as error:
            return f"{name}: expected a YAML file, got: {' '.join(str(error).split())}"
        except ValueError:  # a date that does not exist, which jsonargparse takes as text
            continue
        if not isinstance(content, dict):
            return f"{name}: expected settings such as `trainer: ...`, got {type(content).__name__}"
    return None


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_LOADER)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """List the options with their values, written as ``--a=b`` or ``--a b``."""
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if argument.startswith("-"):
            yield option, value if equals else next(iter(arguments[position + 1 :][:1]), "")


def _content(path: str) -> Any:
    try:
        return _load(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _callbacks_of(content: Any, arguments: Sequence[str]) -> Any:
    """Find the callbacks in the content of a file, which is for one command or has a section for each."""
    if not isinstance(content, dict):
        return None
    own = next((content[name] for name in arguments if name in content), content)
    trainer = own.get("trainer") if isinstance(own, dict) else None
    return trainer.get("callbacks") if isinstance(trainer, dict) else None


def _parsed(value: str) -> Any:
    try:
        return _load(value)
    except yaml.YAMLError:
        return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _class_name(item: Any) -> str:
    name = item.get("class_path") if isinstance(item, dict) else item
    return name if isinstance(name, str) else ""


def _with_setting(item: Any, name: str, value: Any) -> Any:
    """Copy an item of the list with one of its settings changed."""
    changed: Any = {"class_path": item} if isinstance(item, str) else {**item} if isinstance(item, dict) else {}
    path = name.split(".")
    path = path if path[0] in ("init_args", "class_path", "dict_kwargs") else ["init_args", *path]
    level = changed
    for part in path[:-1]:
        below = level.get(part)
        level[part] = {**below} if isinstance(below, dict) else {}
        level = level[part]
    level[path[-1]] = value
    return changed


def _item_fault(item: Any) -> str | None:
    if isinstance(item, dict) and not isinstance(item.get("class_path", ""), str):
        return f"class_path: expected the class path of a Callback, got {item['class_path']!r}"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    try:
        parser.parse_object({"callback": item})
    except Exception as error:  # jsonargparse's own error, or whatever an odd value raises in it
        text = condensed(str(error)).removeprefix("callback: ")
        path, _, rest = text.partition(": ")
        return rest if rest and "." in path and " " not in path else text  # the name of the item tells the path already
    return None
