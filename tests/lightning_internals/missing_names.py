"""Which of the private names in the table the installed versions do not have."""

from __future__ import annotations

import dis
import inspect
from functools import reduce
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any

import lightning.pytorch as pl
from torch.torch_version import TorchVersion

from lightning_ast.lightning_internals.table import LIGHTNING, PRIVATE_NAMES, TORCH, TORCHMETRICS, PrivateName

OLDEST = {"lightning": LIGHTNING[0], "torchmetrics": TORCHMETRICS[0], "torch": TORCH[0]}
ABSENT = object()


def package_of(name: PrivateName) -> str:
    """The distribution that the owner comes from."""
    package = name.owner.partition(".")[0]
    return "lightning" if package == "trainer" else package


def missing_names(trainer: pl.Trainer, names: tuple[PrivateName, ...] = PRIVATE_NAMES) -> list[str]:
    """A sentence for each private name that the installed versions do not have, and should have."""
    missing = []
    for name in names:
        package = package_of(name)
        installed = version(package)
        first = name.checked[0]
        # Names that only newer versions have are not missed in older ones.
        expected = first == OLDEST[package] or TorchVersion(installed) >= first
        if expected and not exists(name, trainer):
            gone = f"{package} {installed} has no {name.owner}.{name.name}, which is used to {name.why}."
            remedy = f"It was there in {' and '.join(name.checked)}: install one of these, or change"
            missing.append(f"{gone} {remedy} lightning_ast/lightning_internals.")
    return missing


def exists(name: PrivateName, trainer: pl.Trainer) -> bool:
    try:
        if name.owner.startswith("trainer"):
            owner: Any = reduce(getattr, name.owner.split(".")[1:], trainer)
        else:
            owner = resolve_name(name.owner)
    except (AttributeError, ImportError):
        return False
    if inspect.getattr_static(owner, name.name, ABSENT) is not ABSENT:  # a property may refuse to be read yet
        return True
    return inspect.isclass(owner) and name.name in set_by_methods(owner)


def set_by_methods(kind: type[Any]) -> set[str]:
    """The attributes that the methods of a class set."""
    # Read from the code: to make an object of each class only to look at it is not worth it.
    held = [value for base in kind.__mro__ for value in vars(base).values()]
    methods = [inspect.unwrap(value) for value in held if inspect.isfunction(value)]
    return {
        str(instruction.argval)
        for method in methods
        for instruction in dis.get_instructions(method)
        if instruction.opname == "STORE_ATTR"
    }
