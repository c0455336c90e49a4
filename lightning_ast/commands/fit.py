"""LightningCLI as the command ``fit``, ``validate``, ``test`` or ``predict``, with errors of one line."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lightning_ast.callbacks import ConfigurationError  # this makes the callbacks known by their short names
from lightning_ast.commands.messages import condensed
from lightning_ast.errors import UsageError
from lightning_ast.extras import needs
from lightning_ast.lightning_internals.command_line import OpenCLI

__all__ = ["CommandLine", "CommandLineParser", "SavedConfig"]


class CommandLineParser(LightningArgumentParser):
    """A parser that raises an error of one line instead of printing all options that there are."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse the arguments."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        raise UsageError(condensed(message)) from ex


class SavedConfig(SaveConfigCallback):
    """Save the configuration of a run in its log directory, beside any file that is there already.

    The name is the first of ``config.yaml``, ``config_1.yaml``, ``config_2.yaml`` ... that is free.
    """

    def __init__(self, parser: Any, config: Any, **options: Any) -> None:
        # Lightning itself would overwrite any file, or refuse to run where there is one
        super().__init__(parser, config, save_to_log_dir=False, **options)
        self._folder = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the configuration, once."""
        if not self.already_saved:
            self._folder = trainer.log_dir or trainer.default_root_dir  # every process asks: this broadcasts
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file; Lightning calls this in the first process alone."""
        system = get_filesystem(self._folder)
        system.makedirs(self._folder, exist_ok=True)
        stem, ending = os.path.splitext(self.config_filename)  # noqa: PTH122 - a name, not a path
        names = chain([self.config_filename], (f"{stem}_{number}{ending}" for number in count(1)))
        paths = (os.path.join(self._folder, name) for name in names)  # noqa: PTH118 - may be an address such as s3://...
        wanted = path = next(paths)
        while system.exists(path):
            path = next(paths)
        with system.open(path, "w", encoding="utf-8") as file:
            file.write(self.parser.dump(self.config, skip_none=False))
        if path != wanted:
            rank_zero_info(f"lightning-ast: the configuration of this run is saved as {path}: there is a {wanted}.")


def _file_fault(arguments: Sequence[str]) -> str | None:
    """Name the first configuration file that is no mapping in YAML; jsonargparse does not tell which it read."""
    import yaml  # of the extra that brings jsonargparse

    for position, argument in enumerate(arguments):
        option, equals, name = argument.partition("=")
        if not equals:
            name = "".join(arguments[position + 1 : position + 2])
        if option not in ("-c", "--config") or not Path(name).is_file():  # a pipe can be read only once
            continue
        try:
            content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            return f"{name}: expected a YAML file, got: {' '.join(str(error).split())}"
        except ValueError:  # a date that does not exist, which jsonargparse takes as text
            continue
        if not isinstance(content, dict):
            return f"{name}: expected settings such as `trainer: ...`, got {type(content).__name__}"
    return None


class CommandLine(OpenCLI):
    """Parse the arguments of a command line, the command first; make the objects and run the command."""

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        defaults: dict[str, Any] = {"parser_kwargs": {"prog": "lightning-ast"}, "save_config_callback": SavedConfig}
        self._arguments = list(arguments)
        super().__init__(args=self._arguments, **{**defaults, **options})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser, where its packages are installed."""
        with needs("cli", "jsonargparse", "docstring_parser", "typeshed_client"):
            parser = super().init_parser(**kwargs)
        parser.__class__ = CommandLineParser  # Lightning 2.5 does not take another class of parser
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; any failure is the user's to mend."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
                super().parse_arguments(parser, args)
        except Exception as error:  # also what an odd value or file raises in jsonargparse itself
            text = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            raise UsageError(_file_fault(self._arguments) or text) from error

    def instantiate_classes(self) -> None:
        """Make the objects; any failure of theirs is the user's to mend."""
        failed: list[str] = []

        def make(kind: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return kind(*args, **kwargs)
            except Exception as error:
                # jsonargparse names no class, and tries every other type of the parameter
                text = " ".join(error.faults) if isinstance(error, ConfigurationError) else str(error)
                failed.append(f"{kind.__name__}: {text or type(error).__name__}")
                raise

        self.parser.add_instantiator(make, Callback)
        try:
            super().instantiate_classes()
        except (ConfigurationError, UsageError):
            raise
        except Exception as error:
            raise UsageError(failed[0] if failed else str(error) or type(error).__name__) from error
        if (factor := self.trainer.accumulate_grad_batches) < 1:  # Lightning fails later, without a word on it
            raise UsageError(f"trainer.accumulate_grad_batches: expected an int >= 1, got {factor}")
