"""The page: HTML that needs nothing but itself, with a table of the runs and the figures inside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lightning_ast.report.derive import accuracy, activation_rate_when_sparse, epoch_values, is_dense, last_epoch
from lightning_ast.report.series import Run
from lightning_ast.words import readable

__all__ = ["GENERATOR", "Picture", "Summary", "reference", "render", "summarize", "table"]

# the mark by which a later report knows that it may replace a page
GENERATOR = '<meta name="generator" content="lightning-ast report">'

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid #ccc; vertical-align: top; }
th:first-child { text-align: left; overflow-wrap: anywhere; min-width: 8rem; }
thead th { border-bottom: 2px solid #444; vertical-align: bottom; } tbody th { font-weight: 600; }
td small, th small { display: block; color: #555; font-weight: 400; white-space: nowrap; }
figure { margin: 0 0 1.6rem; break-inside: avoid; } img { width: 100%; height: auto; display: block; }
figcaption, .note, footer { color: #444; font-size: .9rem; overflow-wrap: anywhere; }
footer { border-top: 1px solid #ccc; margin-top: 2rem; padding-top: .6rem; }
"""
_GONE = "-"


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    png: bytes
    caption: str  # what is seen, and in what unit
    alt: str  # for those who cannot see it


@dataclass(frozen=True)
class Summary:
    """One row of the table: what is known of the whole run. None is what the log does not tell."""

    name: str
    dense: bool  # whether every logged step trained on all samples
    mode: str | None
    epochs: int | None
    steps: int  # the last step logged
    final_accuracy: float | None  # of the last epoch that has one, in [0, 1]
    best_accuracy: float | None  # of all epochs, in [0, 1]
    activation_rate: float | None  # the mean of the sparse steps, in [0, 1]
    savings: Mapping[str, float | None]  # shares by what was saved: at most 1, negative where it cost more
    seconds: float | None
    joules: float | None


def summarize(run: Run) -> Summary:
    """Make the row of a run."""
    found = accuracy(run)
    seconds = epoch_values(run, "energy/total_seconds")
    joules = epoch_values(run, "energy/total_joules")
    last = last_epoch(run)
    saved = {name: run.series(f"ast/savings_{name}") for name in ("samples", "flops", "seconds", "joules")}
    return Summary(
        name=run.name,
        dense=is_dense(run),
        mode=run.mode,
        epochs=None if last is None else last + 1,
        steps=max((int(series.steps[-1]) for series in run.scalars.values()), default=0),
        final_accuracy=None if found is None else float(found[1].values[-1]),
        best_accuracy=None if found is None else float(found[1].values.max()),
        activation_rate=activation_rate_when_sparse(run),
        savings={name: None if series is None else series.closing for name, series in saved.items()},
        seconds=None if seconds is None else float(seconds.values[-1]),
        joules=None if joules is None else float(joules.values[-1]),
    )


def reference(rows: Sequence[Summary]) -> Summary | None:
    """Find the dense run that the others are held against: the longest; None where none is dense, or for one run."""
    dense = [row for row in rows if row.dense and row.epochs is not None]
    if len(rows) < 2 or not dense:
        return None
    return max(dense, key=lambda row: (row.epochs or 0, row.steps))


def render(
    rows: Sequence[Summary], sections: Sequence[tuple[str, Sequence[Picture]]], foot: str, left_out: Sequence[str]
) -> str:
    """Write the whole page as HTML: the table of runs, and headings with their figures."""
    title = f"Training report: {rows[0].name if len(rows) == 1 else f'{len(rows)} runs'}"
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8">{GENERATOR}',
        f"<title>{_escaped(title)}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_escaped(title)}</h1>",
        table(rows),
        *(f'<p class="note">Left out: {_escaped(line)}.</p>' for line in left_out),
    ]
    for heading, pictures in sections:
        parts.append(f"<section><h2>{_escaped(heading)}</h2>")
        parts += [_figure(picture) for picture in pictures]
        if not pictures:
            parts.append('<p class="note">The log of this run holds no values.</p>')
        parts.append("</section>")
    parts.append(f"<footer>{_escaped(foot)}</footer></body></html>")
    return "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return escape(readable(text))


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{_escaped(picture.alt)}">\n'
        f"<figcaption>{_escaped(picture.caption)}</figcaption></figure>"
    )


def table(rows: Sequence[Summary]) -> str:
    """Write the runs' table as HTML, held against a dense run if there is one; leave empty columns out."""
    dense = reference(rows)
    columns = [(heading, [cell(row, None if row is dense else dense) for row in rows]) for heading, cell in _COLUMNS]
    shown = [(heading, cells) for heading, cells in columns if any(cells)]
    head = "".join(f'<th scope="col">{heading}</th>' for heading, _ in shown)
    lines = []
    for i, row in enumerate(rows):
        kind = "dense, the reference" if row is dense else "dense" if row.dense else ""
        name = _escaped(row.name) + (f"<small>{kind}</small>" if kind else "")
        cells = "".join(f"<td>{cells[i] or _GONE}</td>" for _, cells in shown)
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">run</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        f'</table></div>\n<p class="note">{_legend(rows, dense)}</p>'
    )


def _legend(rows: Sequence[Summary], dense: Summary | None) -> str:
    text = [
        "Savings are those that the run logged last, against dense training of the same batches; the share of samples "
        "skipped is not compute saved. The activation rate is the mean of the logged sparse steps. Epochs are numbered "
        "from 0, as in Lightning's progress bar."
    ]
    if dense is not None:
        text.append(
            f'Small print: against the dense run "{_escaped(dense.name)}", accuracy in points, seconds and joules as '
            "multiples."
        )
    return " ".join([*text, f"{_GONE} stands for what is not in the log."])


def _cost(value: float | None, base: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" + (f"<small>{value / base:,.2f}&times;</small>" if base else "")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _accuracy(value: float | None, base: float | None) -> str:
    if value is None or base is None:
        return _share(value)
    return f"{_share(value)}<small>{100 * (value - base):+,.1f} points</small>"


# a heading each, and the text of a cell from its run and, unless it is this one, the run to compare it with
_COLUMNS: list[tuple[str, Callable[[Summary, Summary | None], str]]] = [
    ("mode", lambda row, _: _escaped(row.mode or "")),
    ("epochs", lambda row, _: "" if row.epochs is None else str(row.epochs)),
    ("final accuracy", lambda row, base: _accuracy(row.final_accuracy, base.final_accuracy if base else None)),
    ("best accuracy", lambda row, base: _accuracy(row.best_accuracy, base.best_accuracy if base else None)),
    ("activation rate, mean of the logged sparse steps", lambda row, _: _share(row.activation_rate)),
    ("samples skipped", lambda row, _: _share(row.savings["samples"])),
    ("saved: FLOPs", lambda row, _: _share(row.savings["flops"])),
    ("saved: seconds", lambda row, _: _share(row.savings["seconds"])),
    ("saved: joules", lambda row, _: _share(row.savings["joules"])),
    ("seconds", lambda row, base: _cost(row.seconds, base.seconds if base else None, 1)),
    ("joules", lambda row, base: _cost(row.joules, base.joules if base else None, 0)),
]
