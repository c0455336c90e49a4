"""``write_report``: reads the logs, draws the figures, writes the page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from lightning_ast import __version__
from lightning_ast.report.derive import clip_to_training
from lightning_ast.report.page import Picture, render
from lightning_ast.report.runs import read_logs
from lightning_ast.report.series import ReportError, Run
from lightning_ast.report.summary import Summary, reference, summarize

__all__ = ["file_stems", "write_report"]


def write_report(log_dirs: Sequence[str | Path], out: str | Path) -> Path:
    r"""Write ``report.html`` about every run at or below some folders, and its figures as PNG files beside it.

    It reads the logs alone: TensorBoard's event files and CSVLogger's ``metrics.csv``. The page needs no other file.
    It names the logs that could not be read. Pictures of an earlier page in ``out`` are replaced or removed.

    Args:
        log_dirs: folders with logs in them, at any depth.
        out: folder to write to; made where it is not there.

    Returns:
        The path of the page.

    Raises:
        ReportError: a folder holds no logs, none can be read, ``out`` cannot be written to, or a package is missing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.csv").write_text("epoch,step,train_loss,val_acc\n0,9,1.5,0.8\n1,19,0.7,0.9\n")
        >>> write_report([folder], folder / "report").name
        'report.html'
    """
    read, left_out = read_logs(log_dirs)
    runs = [clip_to_training(run) for run in read]
    rows = [summarize(run) for run in runs]
    folder = Path(out).expanduser()
    page = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = _pictures_of(page)
        sections = _draw(runs, rows, folder)
        page.write_text(render(rows, reference(rows), sections, _foot(log_dirs), left_out), encoding="utf-8")
        for path in old - {picture.path for _, pictures in sections for picture in pictures}:
            path.unlink(missing_ok=True)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ReportError(f"figures need matplotlib ({error}): pip install 'lightning-ast[report]'.") from error
    except OSError as error:
        raise ReportError(f"cannot write the report to {out}: {error}.") from error
    return page


def _pictures_of(page: Path) -> set[Path]:
    """The files beside an earlier page that hold its pictures: what is not on it may be somebody else's."""
    if not page.is_file():
        return set()
    shown = set(re.findall(r'src="data:image/png;base64,([^"]*)"', page.read_text(encoding="utf-8", errors="replace")))
    return {
        path
        for kind in ("comparison", "dashboard-*", "samples-*", "costs-*")
        for path in page.parent.glob(f"{kind}.png")
        if path.is_file() and base64.b64encode(path.read_bytes()).decode("ascii") in shown
    }


def file_stems(names: Sequence[str]) -> list[str]:
    """File names without an ending for the runs' figures: plain characters, no two the same.

    Example:
        >>> file_stems(["a/b", "a:b", "c"])
        ['a-b', 'a-b-2', 'c']
    """
    stems: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:80] or "run"
        unique, count = stem, 1
        while unique.lower() in {taken.lower() for taken in stems}:
            count += 1
            unique = f"{stem}-{count}"
        stems.append(unique)
    return stems


def _draw(runs: Sequence[Run], rows: Sequence[Summary], folder: Path) -> list[tuple[str, list[Picture]]]:
    from lightning_ast.report.comparison import comparison
    from lightning_ast.report.costs import costs, has_costs
    from lightning_ast.report.dashboard import dashboard
    from lightning_ast.report.samples import has_samples, samples
    from lightning_ast.report.style import save

    sections: list[tuple[str, list[Picture]]] = []
    if len(runs) > 1 and any(run.scalars for run in runs):
        path = folder / "comparison.png"
        save(comparison([run for run in runs if run.scalars]), path)
        sections.append(("The runs side by side", [Picture(path, _COMPARISON, _alt_comparison(rows))]))
    for run, row, stem in zip(runs, rows, file_stems([run.name for run in runs]), strict=True):
        kinds = (
            ("dashboard", dashboard, bool(run.scalars or run.histograms), _DASHBOARD, _alt_dashboard(row)),
            ("samples", samples, has_samples(run), _SAMPLES, _alt_samples(run)),
            ("costs", costs, has_costs(run), _COSTS, _alt_costs(run)),
        )
        pictures: list[Picture] = []
        for kind, draw, wanted, caption, alt in kinds:
            if wanted:
                path = folder / f"{kind}-{stem}.png"
                save(draw(run), path)
                pictures.append(Picture(path, caption, alt))
        sections.append((run.name, pictures))
    return sections


_COMPARISON = (
    "Accuracy against epochs, seconds and joules spent up to the end of each epoch, and the mean training loss of each "
    "epoch, which in mode prune is that of the loaded samples alone."
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


def _alt_dashboard(row: Summary) -> str:
    facts = [
        f"accuracy ends at {row.final_accuracy:.1%}" if row.final_accuracy is not None else "no accuracy was logged",
        *(f"{name} saved {share:.1%}" for name, share in row.savings.items() if share is not None),
    ]
    return f"Six panels about {row.name}: accuracy, loss, activation, savings, threshold, significance; " + ", ".join(
        facts
    )


def _alt_samples(run: Run) -> str:
    return f"Two panels about {run.name}: significance by epoch, and how often samples were selected."


def _alt_costs(run: Run) -> str:
    return f"Two panels about {run.name}: seconds of each epoch, by what they went into, and joules."


def _alt_comparison(rows: Sequence[Summary]) -> str:
    ends = [f"{row.name} {row.final_accuracy:.1%}" for row in rows if row.final_accuracy is not None]
    return "Four panels that compare the runs; final accuracies: " + (", ".join(ends) or "none logged")


def _foot(log_dirs: Sequence[str | Path]) -> str:
    packages = [f"lightning-ast {__version__}", f"matplotlib {version('matplotlib')}"]
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return f"Written {when} by {', '.join(packages)} from {', '.join(str(given) for given in log_dirs)}."
