"""``write_report``, which reads the logs, draws the figures and writes the page over none but a report's own files."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from lightning_ast import __version__
from lightning_ast.errors import ReportError
from lightning_ast.report.derive import clip_to_training
from lightning_ast.report.page import GENERATOR, SOFTWARE, Picture, render, summarize
from lightning_ast.report.runs import read_logs
from lightning_ast.report.series import Run

__all__ = ["file_stems", "make_report", "write_files", "write_report"]

_PAGE = "report.html"
_MARKS = {".html": GENERATOR.encode(), ".png": b"Software\0" + SOFTWARE.encode()}
_HEAD_BYTES = 1024
_MANY_RUNS = 10  # from so many on, the command shows how far it is


def write_report(log_dirs: Sequence[str | Path], out: str | Path) -> Path:
    r"""Write ``report.html`` about every run at or below some folders, with its figures as PNG files; return its path.

    It reads the logs alone: TensorBoard's event files and CSVLogger's ``metrics.csv``. The page needs no other file.
    It names the logs that could not be read. The page and the pictures of an earlier report in ``out`` are replaced or
    removed; no other file is.

    Args:
        log_dirs: The folders with logs in them, at any depth.
        out: The folder to write to; made where it is not there.

    Raises:
        ReportError: A folder holds no logs, none can be read, ``out`` cannot be written to, a file of another origin
            stands in the way, or a package is missing.

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
    with _errors(out):
        _refuse_foreign(page)  # before what takes time
    read, left_out = read_logs(log_dirs)
    runs = [clip_to_training(run) for run in read]
    with _errors(out):
        sections = _sections(runs, progress=progress)
        text = render([summarize(run) for run in runs], sections, _foot(log_dirs), left_out)
        pictures = {picture.name: picture.png for _, own in sections for picture in own}
        write_files(page.parent, {**pictures, _PAGE: text.encode("utf-8")})
    return page, left_out


@contextmanager
def _errors(out: str | Path) -> Iterator[None]:
    """Name what is missing, or where writing failed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ReportError(f"figures need matplotlib ({error}): pip install 'lightning-ast[report]'.") from error
    except OSError as error:
        raise ReportError(f"cannot write the report to {out}: {error}.") from error


def file_stems(names: Sequence[str]) -> list[str]:
    """Make file names without an ending for the runs' figures: plain characters, no two the same."""
    stems = [re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:80] or "run" for name in names]
    # some file systems do not tell capitals from small letters
    lowered = [stem.lower() for stem in stems]
    return [f"{stem}-{i}" if lowered.count(stem.lower()) > 1 else stem for i, stem in enumerate(stems)]


def _sections(runs: Sequence[Run], *, progress: bool) -> list[tuple[str, list[Picture]]]:
    """Draw the figures of the page, by sections: a heading and its figures each."""
    # matplotlib is an extra: without it, importing the package and reading runs must work
    from lightning_ast.report.comparison import comparison
    from lightning_ast.report.costs import costs
    from lightning_ast.report.dashboard import dashboard
    from lightning_ast.report.style import png

    sections: list[tuple[str, list[Picture]]] = []
    logged = [run for run in runs if run.scalars]
    if len(runs) > 1 and logged:
        whole = Picture("comparison.png", png(comparison(logged)), _COMPARISON, _ALT_COMPARISON)
        sections.append(("The runs side by side", [whole]))
    stems = file_stems([run.name for run in runs])
    bar = tqdm(runs, "Drawing", unit="run", disable=not progress or len(runs) < _MANY_RUNS)
    for run, stem in zip(bar, stems, strict=True):
        overview = dashboard(run) if run.scalars or run.histograms else None
        figures = (("dashboard", overview, _DASHBOARD, _ALT_DASHBOARD), ("costs", costs(run), _COSTS, _ALT_COSTS))
        pictures = [
            Picture(f"{kind}-{stem}.png", png(figure), caption, alt.format(run.name))
            for kind, figure, caption, alt in figures
            if figure is not None
        ]
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


def _refuse_foreign(path: Path) -> None:
    """Raise an error where a file stands that no report wrote."""
    if path.exists() and not _is_own(path):
        raise ReportError(
            f"expected to write {path}, but it is a file that no report wrote: move it away, or give another folder "
            "with --out."
        )


def _is_own(path: Path) -> bool:
    """Tell whether a report wrote a file."""
    with path.open("rb") as file:
        return _MARKS[path.suffix] in file.read(_HEAD_BYTES)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a page and its pictures, by name, and remove the pictures of an earlier page."""
    for name in files:
        _refuse_foreign(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _write_whole(folder / name, content)
    for kind in ("comparison", "dashboard-*", "costs-*"):
        for path in folder.glob(f"{kind}.png"):
            if path.name not in files and _is_own(path):
                path.unlink()


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
