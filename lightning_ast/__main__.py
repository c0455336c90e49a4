"""The command ``lightning-ast``, also ``python -m lightning_ast``. Only a command that runs imports torch."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from lightning_ast.__about__ import __version__
from lightning_ast.mode_facts import MODES

__all__ = ["DATA_SETS", "main"]

USAGE = """usage: lightning-ast COMMAND [...]

  fit | validate | test | predict   LightningCLI: train any LightningModule (--config FILE, --print_config, --help)
  demo                              dense against sparse training on real images, in two minutes (--help)
  report LOGDIR [LOGDIR ...]        a page about runs from their TensorBoard or CSV logs (--help)
  advise --config FILE              what each mode would save on your model and data, in a minute (--help)
  export CHECKPOINT OUT             what mode='prune' remembers of each sample, as CSV or Parquet (--help)
  --version                         print the version
"""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

# a copy of what the demo defines, which imports torch
DATA_SETS = ("digits", "fashion_mnist", "cifar10")

WRONG_USE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0; 2 for what the user can mend, behind a line on the standard error that tells it; 130 after
        an interrupt.

    Raises:
        SystemExit: An option of a command is wrong (status 2), or help was asked for (status 0).
        Exception: Any other failure, a programming error in the user's own module above all.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")  # a character that the output cannot show is no error
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _explain(error)


def _refuse(line: str) -> int:
    print(f"lightning-ast: {line}", file=sys.stderr)
    return WRONG_USE


def _explain(error: Exception) -> int:
    """Tell a user's error in a line; leave any other to Python's traceback."""
    if isinstance(error, OSError) and "torch" not in sys.modules:  # no command has begun
        return _refuse(str(error))
    from lightning_ast.commands.messages import plain_lines, users_error

    lines = plain_lines(error)
    if lines is None:
        raise users_error(error) or error
    for line in lines:
        _refuse(line)
    return WRONG_USE


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"lightning-ast {__version__}")
        return 0
    own = {"demo": _demo, "report": _report, "advise": _advise, "export": _export}
    if command in own:
        return own[command](arguments[1:])
    if command in LIGHTNING_COMMANDS or (command.startswith("-") and set(LIGHTNING_COMMANDS) & set(arguments)):
        return _lightning(arguments)
    known = ", ".join((*LIGHTNING_COMMANDS, *own))
    return _refuse(f"expected a command, one of {known}, got {command!r} (see lightning-ast --help)")


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Find modules in the current folder first, as ``python -m`` does."""
    folder = os.getcwd()  # noqa: PTH109 - a string, as the entries of sys.path are
    if getattr(sys.flags, "safe_path", False) or folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _lightning(arguments: list[str]) -> int:
    with _current_folder_importable():
        from lightning_ast.commands.fit import CommandLine

        CommandLine(arguments)
    return 0


def _advise(arguments: list[str]) -> int:
    parser = _Parser(
        "lightning-ast advise",
        usage="lightning-ast advise --config FILE [--OPTION VALUE ...] [--budget_seconds 45]",
        description="Measures a run on this machine without training it, and says what each mode would save at fixed "
        "rates and at the rate that a target_coverage needs of the model as it is now. FILE and the options are those "
        "of `lightning-ast fit` (see its --help).",
        allow_abbrev=False,
    )
    parser.add_argument("--budget_seconds", type=float, default=45.0, help="time for all of it (default: 45)")
    options, configuration = parser.parse_known_args(arguments)
    if not 0 < options.budget_seconds < math.inf:
        parser.error(f"--budget_seconds: expected a finite number of seconds above 0, got {options.budget_seconds:g}")
    if not configuration:
        parser.error("expected --config FILE")
    with _current_folder_importable():
        from lightning_ast.advice.command import advise_command

        advise_command(configuration, budget_seconds=options.budget_seconds)
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _report(arguments: list[str]) -> int:
    parser = _Parser("lightning-ast report", description="A page about training runs, from their logs.")
    parser.add_argument("logdir", nargs="+", help="folder with TensorBoard or CSV logs, at any depth")
    parser.add_argument("--out", default="ast-report", help="folder to write to (default: ast-report)")
    options = parser.parse_args(arguments)
    from lightning_ast.errors import MissingPackageError, ReportError
    from lightning_ast.report.write import make_report
    from lightning_ast.words import readable

    try:
        page, left_out = make_report(options.logdir, options.out, progress=True)
    except (MissingPackageError, ReportError) as error:  # what tells other errors apart imports torch
        return _refuse(readable(str(error)))
    for line in left_out:
        _refuse(readable(f"left out: {line}"))
    print(readable(str(page)))
    return 0


def _export(arguments: list[str]) -> int:
    parser = _Parser("lightning-ast export", description="The scores that a run in mode='prune' remembers, as a table.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint of Lightning's")
    parser.add_argument("out", type=Path, help="file to write: Parquet if it ends with .parquet, else CSV")
    parser.add_argument("--trust", action="store_true", help="load objects that can run code, as hyperparameters may")
    options = parser.parse_args(arguments)
    with _current_folder_importable():
        from lightning_ast.commands.export import export_command
        from lightning_ast.words import counted, readable

        samples = export_command(options.checkpoint, options.out, trust=options.trust)
    print(readable(f"{options.out}: {counted(samples, 'sample')}"))
    return 0


def _demo(arguments: list[str]) -> int:
    parser = _Parser("lightning-ast demo", description="Dense against sparse training on real images.")
    parser.add_argument("--data", choices=DATA_SETS, default="digits")
    parser.add_argument("--root", default="data", help="folder (or .npz file) with the images, and to download them to")
    parser.add_argument("--mode", choices=MODES, default="partial")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--coverage", type=float, help="target coverage in (0, 1]; 0.97 where no rate is given")
    target.add_argument("--rate", type=float, help="target activation rate in (0, 1], in place of a coverage")
    parser.add_argument("--epochs", type=int, help="length of the runs (default: by data set)")
    parser.add_argument("--width", type=int, help="channels of the first layer (default: by data set)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-limit", type=int, help="use only the first so many training images")
    options = vars(parser.parse_args(arguments))
    from lightning_ast.demo.compare import run_demo

    targets = {"target_activation_rate": options.pop("rate"), "target_coverage": options.pop("coverage")}
    run_demo(**targets, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
