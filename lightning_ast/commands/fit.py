"""LightningCLI as the command ``fit``, ``validate``, ``test`` or ``predict``, with errors that tell what to change."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lightning_ast.callbacks import ConfigurationError
from lightning_ast.commands.messages import condensed
from lightning_ast.commands.saved_config import SavedConfig
from lightning_ast.errors import UsageError
from lightning_ast.extras import needs
from lightning_ast.lightning_internals.command_line import OpenCLI

__all__ = ["CommandLine", "CommandLineParser"]


class CommandLineParser(LightningArgumentParser):
    """A parser that raises an error of one line instead of printing all options that there are."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse the arguments."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        raise UsageError(condensed(message)) from ex


class CommandLine(OpenCLI):
    """Parse the arguments of a command line, the command first; make the objects and run the command."""

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        self._arguments = list(arguments)
        defaults: dict[str, Any] = {"parser_kwargs": {"prog": "lightning-ast"}, "save_config_callback": SavedConfig}
        super().__init__(args=self._arguments, **{**defaults, **options})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser, where its packages are installed."""
        with needs("cli", "jsonargparse", "docstring_parser", "typeshed_client"):
            parser = super().init_parser(**kwargs)
        parser.__class__ = CommandLineParser  # Lightning 2.5 does not take another class of parser
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; where that fails, find the file or the callback that is at fault."""
        from lightning_ast.commands.listed import faulty_file, faulty_item  # needs jsonargparse, which is there now

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
                super().parse_arguments(parser, args)
        except Exception as error:
            # jsonargparse names neither the file that it could not read nor the item of a list: each is tried alone
            text = _told(error)
            found = faulty_file(self._arguments)
            if found is None and "trainer.callbacks" in text:
                found = faulty_item(self._arguments)
            raise UsageError(found or text) from error
        parsed = [self.config, self.config.get(self.config.get("subcommand") or "", {})]
        files = [file for each in parsed for file in each.get("config") or [] if file is not None]
        self.save_config_kwargs.setdefault("inputs", [str(file.absolute) for file in files])

    def instantiate_classes(self) -> None:
        """Make the objects; where a callback cannot be made, tell which."""
        from lightning_ast.commands.listed import named

        # The configuration names callbacks in their order, and they are made in it: the number of those of one class
        # that were made tells which of them failed.
        made: Counter[type] = Counter()
        failed: list[tuple[type, Exception]] = []

        def make(kind: type, *args: Any, **kwargs: Any) -> Any:
            try:
                instance = kind(*args, **kwargs)
            except Exception as error:
                failed.append((kind, error))
                raise
            made[kind] += 1
            return instance

        self.parser.add_instantiator(make, Callback)
        try:
            super().instantiate_classes()
        except Exception as error:
            if not failed:
                raise UsageError(_told(error)) from error
            kind, cause = failed[0]
            paths = [item["class_path"] for item in _listed(self.config[self.subcommand])]
            places = [i for i, path in enumerate(paths) if path.rpartition(".")[2] == kind.__name__]
            index = places[made[kind]] if made[kind] < len(places) else None
            owner = kind.__name__ if index is None else named(index, kind.__name__)
            raise UsageError(f"{owner}: {_told(cause)}") from error
        if (factor := self.trainer.accumulate_grad_batches) < 1:  # Lightning fails later, without a word on it
            raise UsageError(f"trainer.accumulate_grad_batches: expected an int >= 1, got {factor}")

    def run_command(self, name: str) -> None:
        """Run the command; where the set-up is at fault, name the callbacks."""
        try:
            super().run_command(name)
        except ConfigurationError as error:
            raise self.with_owners(error) from error

    def with_owners(self, error: ConfigurationError) -> ConfigurationError:
        """Name the callback of each fault that is one of a callback's settings."""
        from lightning_ast.commands.listed import with_owner

        callbacks = _listed(self.config_init[self.subcommand])
        return ConfigurationError([with_owner(fault, callbacks, self.trainer) for fault in error.faults])


def _listed(config: Any) -> list[Any]:
    """List the callbacks of a configuration, which may name a single one without a list."""
    callbacks = config.get("trainer.callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _told(error: Exception) -> str:
    """Return the message of an error, with the error's type where the message alone would not be understood."""
    text = " ".join(error.faults) if isinstance(error, ConfigurationError) else condensed(str(error))
    clear = (UsageError, MisconfigurationException, ValueError, TypeError, RuntimeError, OSError, ImportError)
    return text if text and isinstance(error, clear) else f"{type(error).__name__}: {text}".removesuffix(": ")
