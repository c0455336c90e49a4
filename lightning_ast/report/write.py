"""``write_report``, which reads the logs, draws the figures and writes the page over none but a report's own files."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_ast import __version__
from lightning_ast.errors import ReportError
from lightning_ast.report.derive import clip_to_training
from lightning_ast.report.page import GENERATOR, SOFTWARE, Picture, Summary, reference, render, summarize
from lightning_ast.report.runs import MANY_RUNS, read_logs
from lightning_ast.report.series import Run
from lightning_ast.whole_file import write_whole
from lightning_ast.words import percent

__all__ = ["file_stems", "make_report", "write_files", "write_report"]

_PAGE = "report.html"
_MARKS = {".html": GENERATOR.encode(), ".png": b"Software\0" + SOFTWARE.encode()}
_HEAD_BYTES = 1024


def write_report(log_dirs: Sequence[str | Path], out: str | Path) -> Path:
    r"""Write ``report.html`` about every run at or below some folders, with its figures as PNG files; return its path.

    It reads the logs alone: TensorBoard's event files and CSVLogger's ``metrics.csv``. The page needs no other file.
    It names the logs that could not be read. The page and the pictures of an earlier report in ``out`` are replaced or
    removed; no other file is, and none is written through a link.

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
    folder = Path(out).expanduser()
    with _errors(out):
        _check_files(folder, [_PAGE])  # before what takes time
    read, left_out = read_logs(log_dirs, progress=progress)
    runs = [clip_to_training(run) for run in read]
    rows = [summarize(run) for run in runs]
    with _errors(out):
        sections = _sections(runs, rows)
        pictures = [picture for _, own in sections for picture in own]
        # the names of the pictures are known only now; drawing them is what takes the time
        _check_files(folder, [picture.name for picture in pictures])
        drawn = tqdm(sections, "Drawing", unit="run", disable=not progress or len(sections) < MANY_RUNS)
        page = render(rows, reference(rows), drawn, _foot(log_dirs), left_out)
        write_files(folder, {picture.name: picture.png for picture in pictures}, (_PAGE, page.encode("utf-8")))
    return folder / _PAGE, left_out


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
    stems: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:80] or "run"
        unique = stem
        count = 1
        # some file systems do not tell capitals from small letters
        while unique.lower() in {taken.lower() for taken in stems}:
            count += 1
            unique = f"{stem}-{count}"
        stems.append(unique)
    return stems


def _sections(runs: Sequence[Run], rows: Sequence[Summary]) -> list[tuple[str, list[Picture]]]:
    """Plan the sections of the page: a heading and its figures each, drawn when their PNGs are asked for."""
    # matplotlib is an extra: without it, importing the package and reading runs must work
    from lightning_ast.report.comparison import comparison
    from lightning_ast.report.costs import costs, has_costs
    from lightning_ast.report.dashboard import dashboard, has_samples, samples

    sections: list[tuple[str, list[Picture]]] = []
    if len(runs) > 1 and any(run.scalars for run in runs):
        logged = [run for run in runs if run.scalars]
        whole = Picture("comparison.png", partial(_drawn, comparison, logged), _COMPARISON, _alt_comparison(rows))
        sections.append(("The runs side by side", [whole]))
    for run, row, stem in zip(runs, rows, file_stems([run.name for run in runs]), strict=True):
        kinds = (
            ("dashboard", dashboard, bool(run.scalars or run.histograms), _DASHBOARD, _alt_dashboard(row)),
            ("samples", samples, has_samples(run), _SAMPLES, _ALT_SAMPLES.format(run.name)),
            ("costs", costs, has_costs(run), _COSTS, _ALT_COSTS.format(run.name)),
        )
        figures = [
            Picture(f"{kind}-{stem}.png", partial(_drawn, figure, run), caption, alt)
            for kind, figure, wanted, caption, alt in kinds
            if wanted
        ]
        sections.append((run.name, figures))
    return sections


_COMPARISON = (
    "Accuracy against epochs, and against seconds and (where measured) joules spent up to the end of each epoch; the "
    "training loss by epoch: the mean of the whole epoch where that was logged (on_epoch=True), otherwise that of the "
    "steps counted below the panel; in mode prune it is that of the loaded samples alone."
)
_DASHBOARD = (
    "Accuracy by epoch with its stages (tinted: warmup and cooldown, on all samples), loss and activation rate by "
    "step, savings so far as shares of a dense run (the share of samples skipped is not compute saved), the gate's "
    "threshold, and how significance was spread when last logged."
)
_SAMPLES = (
    "Significance of the samples by epoch, which is the score that the gate compares with its threshold, and how many "
    "times samples were selected, as shares of all samples."
)
_COSTS = "What each epoch cost: wall seconds by what they went into, and joules where there was a counter to read."
_ALT_SAMPLES = "Two panels about {}: significance by epoch, and how often samples were selected."
_ALT_COSTS = "What {} cost: seconds of each epoch, by what they went into, and joules, where measured."


def _drawn(draw: Callable[[Any], Any], shown: Run | Sequence[Run]) -> bytes:
    from lightning_ast.report.style import png

    return png(draw(shown))


def _alt_dashboard(row: Summary) -> str:
    accuracy = row.final_accuracy
    facts = ["no accuracy was logged" if accuracy is None else f"accuracy ends at {percent(accuracy)}"]
    known = {name: percent(share) for name, share in row.savings.items() if share is not None}
    facts += [f"{name} {'skipped' if name == 'samples' else 'saved'} {share}" for name, share in known.items()]
    panels = "accuracy, loss, activation, savings, threshold, significance"
    return f"Six panels about {row.name}: {panels}; {', '.join(facts)}"


def _alt_comparison(rows: Sequence[Summary]) -> str:
    ends = [f"{row.name} {percent(row.final_accuracy)}" for row in rows if row.final_accuracy is not None]
    return "Panels that compare the runs; final accuracies: " + (", ".join(ends) or "none logged")


def _foot(log_dirs: Sequence[str | Path]) -> str:
    packages = [f"lightning-ast {__version__}", f"matplotlib {version('matplotlib')}"]
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return f"Written {when} by {', '.join(packages)} from {', '.join(str(given) for given in log_dirs)}."


def _check_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse to write where something stands that is not a report's own file; the folder need not be there."""
    for path in (folder / name for name in names):
        if what := _fault(path):
            raise ReportError(
                f"expected to write {path}, but it is {what}: move it away, or give another folder with --out."
            )


def _fault(path: Path) -> str | None:
    """Describe what stands in the place of a report's own file, if anything does."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    # through a link a file elsewhere would be replaced, or would no longer be the same file
    if stat.S_ISLNK(status.st_mode):
        return "a link"
    if not stat.S_ISREG(status.st_mode):
        return "no file"
    if status.st_nlink > 1:
        return "a file with a second name (a hard link)"
    with path.open("rb") as file:
        return None if _MARKS[path.suffix] in file.read(_HEAD_BYTES) else "a file that no report wrote"


def write_files(folder: Path, pictures: Mapping[str, bytes], page: tuple[str, bytes]) -> None:
    """Write a page (name and content) and its pictures (contents by name), and remove those of an earlier page."""
    files = {**pictures, page[0]: page[1]}
    _check_files(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    for kind in ("comparison", "dashboard-*", "samples-*", "costs-*"):
        for path in folder.glob(f"{kind}.png"):
            if path.name not in pictures and _fault(path) is None:
                path.unlink()
