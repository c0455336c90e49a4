"""``advise`` for a configuration of LightningCLI: the file that ``lightning-ast fit --config`` takes, as it is."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_ast.advice import advise, render
from lightning_ast.advice.measured import AdviceError

__all__ = ["advise_command"]

_USAGE = """usage: lightning-ast advise --config FILE [--OPTION VALUE ...] [--budget_seconds 45]

Measures a run on this machine without training it, and says what each mode would save. FILE and the options are those
of `lightning-ast fit` (see its --help).
"""


def advise_command(arguments: list[str]) -> int:
    """Run ``lightning-ast advise``; the report goes to the standard output.

    Args:
        arguments: those of ``lightning-ast fit``, without the command, and ``--budget_seconds``.

    Returns:
        The exit status: 0, 1 where nothing can be measured, 2 where no configuration was given.

    Raises:
        ModuleNotFoundError: jsonargparse is not installed (``pip install 'lightning-ast[cli]'``).
        SystemExit: an argument is wrong; with status 2, behind its message.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(_USAGE)
        return 0 if arguments else 2
    parser = argparse.ArgumentParser("lightning-ast advise", add_help=False, allow_abbrev=False)
    parser.add_argument("--budget_seconds", type=float, default=45.0)
    options, configuration = parser.parse_known_args(arguments)
    try:
        cli = _configured(configuration)
        advice = advise(cli.trainer, cli.model, cli.datamodule, budget_seconds=options.budget_seconds)
    except (AdviceError, MisconfigurationException) as error:
        sys.stderr.write(f"lightning-ast: {error}\n")
        return 1
    if cli.said is not None:
        sys.stdout.write(f"{cli.said}\n")
    render(advice)
    return 0


def _configured(arguments: list[str]) -> Any:
    """Everything that ``fit`` would make of the arguments, for one device, with nothing that writes files."""
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loggers.logger import DummyLogger

    class Configured(LightningCLI):
        said: str | None = None

        def before_instantiate_classes(self) -> None:
            """What is measured is one process."""
            trainer = self.config["fit"]["trainer"]
            asked = {name: trainer[name] for name in ("devices", "num_nodes", "strategy")}
            if _several(asked["devices"]) or (asked["num_nodes"] or 1) > 1:
                self.said = (
                    f"The configuration asks for devices={asked['devices']!r}, num_nodes={asked['num_nodes']!r}: what "
                    "follows is for one device, with the whole training data."
                )
            asked_loggers = trainer["logger"]
            self.loggers = len(asked_loggers) if isinstance(asked_loggers, list) else int(asked_loggers is not False)
            forced = {"devices": 1, "num_nodes": 1, "logger": False}
            for name, value in {**forced, "enable_progress_bar": False, "enable_model_summary": False}.items():
                trainer[name] = value
            if str(asked["strategy"]).startswith("ddp"):
                trainer["strategy"] = "auto"

        def after_instantiate_classes(self) -> None:
            """Loggers that take everything and write nothing, where the module may use some."""
            self.trainer.loggers = [DummyLogger() for _ in range(self.loggers)]

        def _run_subcommand(self, subcommand: str) -> None:
            """Nothing is trained."""

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return Configured(args=["fit", *arguments], save_config_callback=None)


def _several(devices: Any) -> bool:
    """Whether a Trainer's ``devices`` are more than one here."""
    if devices in ("auto", "-1", -1):
        return torch.accelerator.device_count() > 1
    if isinstance(devices, str):
        return "," in devices.strip(",") or (devices.isdigit() and int(devices) > 1)
    return len(devices) > 1 if isinstance(devices, (list, tuple)) else (devices or 1) > 1
