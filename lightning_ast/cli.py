"""The command ``lightning-ast``: LightningCLI over any LightningModule, a demo, a report of runs, advice before one.

Importing this module makes the callbacks known to LightningCLI by their short names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import get_args

from lightning_ast import __version__
from lightning_ast.callbacks import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.callbacks._faults import ConfigurationError
from lightning_ast.core.execution import Mode

__all__ = ["EnergyMonitor", "SparseSelectionCallback", "SparseTrainingMonitor", "TwoStageScheduler", "main"]

USAGE = """usage: lightning-ast COMMAND [...]

  fit | validate | test | predict   LightningCLI: train any LightningModule (--config FILE, --print_config, --help)
  demo                              dense against sparse training on real images, in two minutes (--help)
  report LOGDIR [LOGDIR ...]        a page about runs from their TensorBoard or CSV logs (--help)
  advise --config FILE              what each mode would save on your model and data, in a minute (--help)
  --version                         print the version
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"lightning-ast {__version__}")
        return 0
    own = {"demo": _demo, "report": _report, "advise": _advise}
    if command in own:
        return own[command](arguments[1:])
    return _lightning(argv)


def _missing(extra: str, error: ImportError) -> int:
    print(
        f"lightning-ast: {error}. Install what this command needs: pip install 'lightning-ast[{extra}]'",
        file=sys.stderr,
    )
    return 2


def _needs_cli(command: Callable[[], int]) -> int:
    """Run a command of LightningCLI's; where its packages are missing, say which."""
    try:
        return command()
    except ModuleNotFoundError as error:
        known = ("jsonargparse", "rich", "docstring_parser", "typeshed_client")
        if error.name not in known and "jsonargparse" not in str(error):  # Lightning's own error has no name
            raise
        return _missing("cli", error)


def _lightning(arguments: list[str] | None) -> int:
    def run() -> int:
        from lightning.pytorch.cli import LightningCLI

        LightningCLI(args=arguments, save_config_kwargs={"overwrite": True})
        return 0

    return _needs_cli(run)


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("lightning-ast report", description="A page about training runs, from their logs.")
    parser.add_argument("logdir", nargs="+", help="folder with TensorBoard or CSV logs, at any depth")
    parser.add_argument("--out", default="ast-report", help="folder to write to (default: ast-report)")
    options = parser.parse_args(arguments)
    from lightning_ast.report.command import report_command

    return report_command(options.logdir, options.out)


def _advise(arguments: list[str]) -> int:
    from lightning_ast.advice.command import advise_command

    return _needs_cli(lambda: advise_command(arguments))


def _demo(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("lightning-ast demo", description="Dense against sparse training on real images.")
    parser.add_argument("--data", choices=["digits", "fashion_mnist", "cifar10"], default="digits")
    parser.add_argument("--root", default="data", help="folder (or .npz file) with the images, and to download them to")
    parser.add_argument("--mode", choices=get_args(Mode), default="partial")
    parser.add_argument("--rate", type=float, default=0.4, help="target activation rate in (0, 1]")
    parser.add_argument("--epochs", type=int, help="length of the runs (default: by data set)")
    parser.add_argument("--width", type=int, help="channels of the first layer (default: by data set)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-limit", type=int, help="use only the first so many training images")
    options = parser.parse_args(arguments)
    try:
        from lightning_ast.demo.compare import run_demo
        from lightning_ast.demo.data import DataNotFoundError
    except ModuleNotFoundError as error:
        return _missing("cli,vision", error)
    try:
        run_demo(
            options.data,
            root=options.root,
            mode=options.mode,
            target_activation_rate=options.rate,
            epochs=options.epochs,
            width=options.width,
            seed=options.seed,
            train_limit=options.train_limit,
        )
    except (DataNotFoundError, ConfigurationError) as error:
        print(f"lightning-ast: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        return _missing("vision", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
