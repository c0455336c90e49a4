"""``write_report``, which reads the logs, draws the figures and writes the page over none but an earlier report."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from lightning_ast import __version__
from lightning_ast.errors import ReportError
from lightning_ast.extras import needs
from lightning_ast.report.derive import clip_to_training
from lightning_ast.report.page import GENERATOR, Picture, render, summarize
from lightning_ast.report.runs import read_logs
from lightning_ast.report.series import Run

__all__ = ["make_report", "write_report"]

_PAGE = "report.html"
_HEAD_BYTES = 1024
_MANY_RUNS = 10  # from so many on, the command shows how far it is


def write_report(log_dirs: Sequence[str | Path], out: str | Path) -> Path:
    r"""Write ``report.html`` about every run at or below some folders, with its figures in it; return its path.

    It reads the logs alone: TensorBoard's event files and CSVLogger's ``metrics.csv``. The page needs no other file.
    It names the logs that could not be read. The page of an earlier report in ``out`` is replaced; no other file is.

    Args:
        log_dirs: The folders with logs in them, at any depth.
        out: The folder to write to; made where it is not there.

    Raises:
        ReportError: A folder holds no logs, none can be read, ``out`` cannot be written to, or a ``report.html`` of
            another origin stands in the way.
        MissingPackageError: Matplotlib or, where there are event files, TensorBoard is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.csv").write_text("epoch,step,train_loss,val_acc\n0,9,1.5,0.8\n1,19,0.7,0.9\n")
        >>> write_report([folder], folder / "report").name
        'report.html'
    """
    page, _ = make_report(log_dirs, out)
    return page


def make_report(log_dirs: Sequence[str | Path], out: str | Path, *, progress: bool = False) -> tuple[Path, list[str]]:
    """Write a report as ``write_report`` does; return the page, and a line for each log that was left out of it."""
    page = Path(out).expanduser() / _PAGE
    with _writing(out):
        _refuse_foreign(page)  # before what takes time
    read, left_out = read_logs(log_dirs)
    runs = [clip_to_training(run) for run in read]
    sections = _sections(runs, progress=progress)
    text = render([summarize(run) for run in runs], sections, _foot(log_dirs), left_out)
    with _writing(out):
        page.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(page, text.encode("utf-8"))
    return page, left_out


@contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReportError(f"cannot write the report to {out}: {error}.") from error


def _refuse_foreign(page: Path) -> None:
    """Raise an error where a file stands that no report wrote."""
    if not page.is_file():
        return
    with page.open("rb") as file:
        if GENERATOR.encode() in file.read(_HEAD_BYTES):
            return
    raise ReportError(
        f"expected to write {page}, but it is a file that no report wrote: move it away, or give another folder with "
        "--out."
    )


def _sections(runs: Sequence[Run], *, progress: bool) -> list[tuple[str, list[Picture]]]:
    """Draw the figures of the page, by sections: a heading and its figures each."""
    # without this extra, importing the package and reading runs must work
    with needs("report", "matplotlib"):
        from lightning_ast.report.comparison import comparison
        from lightning_ast.report.costs import costs
        from lightning_ast.report.dashboard import dashboard
        from lightning_ast.report.style import png

    sections: list[tuple[str, list[Picture]]] = []
    logged = [run for run in runs if run.scalars]
    if len(runs) > 1 and logged:
        sections.append(("The runs side by side", [Picture(png(comparison(logged)), _COMPARISON, _ALT_COMPARISON)]))
    for run in tqdm(runs, "Drawing", unit="run", disable=not progress or len(runs) < _MANY_RUNS):
        pictures = []
        if run.scalars or run.histograms:
            pictures.append(Picture(png(dashboard(run)), _DASHBOARD, _ALT_DASHBOARD.format(run.name)))
        if (spent := costs(run)) is not None:
            pictures.append(Picture(png(spent), _COSTS, _ALT_COSTS.format(run.name)))
        sections.append((run.name, pictures))
    return sections


_COMPARISON = (
    "Accuracy against epochs, and against seconds and (where measured) joules spent up to the end of each epoch; the "
    "training loss by epoch: the mean of the whole epoch where that was logged (on_epoch=True), otherwise that of what "
    "was logged in it, for the runs named below the panel; in mode prune it is that of the loaded samples alone."
)
_DASHBOARD = (
    "Accuracy by epoch with its stages (tinted: warmup and cooldown, on all samples), loss and activation rate by "
    "step, savings so far as shares of a dense run (the share of samples skipped is not compute saved), the gate's "
    "threshold, and how significance was spread when last logged."
)
_COSTS = "What each epoch cost: wall seconds by what they went into, and joules where there was a counter to read."
_ALT_COMPARISON = "Panels that compare the runs: accuracy by epochs, by seconds and by joules, and the training loss."
_ALT_DASHBOARD = "Six panels about {}: accuracy, loss, activation, savings, threshold, significance."
_ALT_COSTS = "What {} cost: seconds of each epoch, by what they went into, and joules, where measured."


def _foot(log_dirs: Sequence[str | Path]) -> str:
    packages = [f"lightning-ast {__version__}", f"matplotlib {version('matplotlib')}"]
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return f"Written {when} by {', '.join(packages)} from {', '.join(str(given) for given in log_dirs)}."


def _write_whole(path: Path, content: bytes) -> None:
    """Write to a second file and rename it: even on a full disk, the old file or the new one is there as a whole.

    A hard link to the file that was there keeps the old content.
    """
    # In the same folder: a rename is one step within a file system alone.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
