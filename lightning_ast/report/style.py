"""The look of every figure: colours, axes, stage bands, the grey line that tells what is missing."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

from lightning_ast.report.derive import Span
from lightning_ast.report.series import Floats, Ints
from lightning_ast.schedule import Stage
from lightning_ast.words import readable

__all__ = ["COLOURS", "GREY", "Panel", "drawing", "label", "new_figure", "png", "unit_of"]

# Okabe and Ito's palette with a grey, without its yellow, which white paper swallows
COLOURS = {
    "black": "#000000",
    "grey": "#9A9A9A",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
}
GREY = "#595959"
_DPI = 180
# points of the smallest text: 9 or more where a figure of 11 inches is printed across A4, which takes 1 % off it
SMALL = 9.2
_BANDS: dict[Stage, str] = {"warmup": "#FAEFD8", "sparse": "#FFFFFF", "cooldown": "#E3F1FA"}
_RC: dict[str, Any] = {
    "font.size": 9.5,  # of axes, ticks and legends too
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
}
_CHARACTER_INCHES = 0.085  # of the stage labels, roughly
_UNITS = {
    "seconds": (("hours", 3600.0, 3 * 3600), ("minutes", 60.0, 300)),
    "joules": (("megajoules", 1e6, 3e6), ("kilojoules", 1e3, 3e3)),
}


def unit_of(base: str, most: float) -> tuple[str, float]:
    """Choose the unit, by name and size in seconds or joules, in which an axis up to ``most`` shows small numbers."""
    for name, size, least in _UNITS[base]:
        if most >= least:
            return name, size
    return base, 1.0


@contextmanager
def drawing(*, title_pad: float = 6) -> Iterator[None]:
    """Draw with the figures' own settings, whatever the user's matplotlibrc says; ``title_pad`` is in points."""
    with style.context(["default", {**_RC, "axes.titlepad": title_pad}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script the font lacks
        yield


def new_figure(
    width_inches: float, height_inches: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Panel]]:
    """Make a figure and its panels, by rows."""
    # without pyplot, which would open windows and keep every figure
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)  # type: ignore[call-arg]
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw={"axes_class": Panel}, **options)
    return figure, list(panels.flat)


def png(figure: Figure) -> bytes:
    """Write a PNG, sharp enough for paper."""
    file = BytesIO()
    canvas: Any = figure.canvas  # Agg's, which has no types
    figure.set_dpi(_DPI)
    # not Figure.savefig, which would draw it twice, the first time for its layout alone
    with drawing():
        canvas.print_png(file)
    return file.getvalue()


def label(text: str, *, width: int = 44) -> str:
    """Change a run's name so that it can be drawn: no formulas, no leading underscore (legends leave it out), short."""
    text = readable(text)
    if len(text) > width:
        text = text[: width // 2 - 1] + "…" + text[len(text) - width // 2 :]
    return text.replace("$", r"\$").replace("_", " _", 1) if text.startswith("_") else text.replace("$", r"\$")


class Panel(Axes):
    """Axes of a report: curves, grey text, axes that count or show shares, and the stages behind the curves."""

    def curve(self, x: Floats | Ints, y: Floats, **look: Any) -> None:
        """Draw a line through the finite points; where they are few, the points themselves too."""
        finite = np.isfinite(y)
        x = x[finite]
        y = y[finite]
        look = {"marker": "o" if len(y) < 10 else "", "markersize": 4, **look}
        self.plot(x, y, **look)

    def note(self, text: str) -> None:
        """Write a small grey line below an axis: what is missing, and how to get it."""
        self._grey(textwrap.fill(text, 52), (0.5, 0), (0, -32 if self.get_xlabel() else -6), va="top")

    def missing(self, text: str) -> None:
        """Show nothing but the grey line."""
        self.set_axis_off()
        self._grey(textwrap.fill(text, 44), (0.5, 0.5), (0, 0), va="center")

    def _grey(self, text: str, place: tuple[float, float], offset_points: tuple[float, float], **look: Any) -> None:
        look = {"xycoords": "axes fraction", "ha": "center", "color": GREY, "fontsize": SMALL, **look}
        self.annotate(text, place, offset_points, textcoords="offset points", **look)

    def corner_legend(self, **look: Any) -> None:
        """Show the legend, in a free corner where ``look`` does not place it."""
        self.legend(**{"loc": "best", "handlelength": 2.4, "borderpad": 0.3, "labelspacing": 0.3, **look})

    def percent_axis(self) -> None:
        """Show shares on the y axis as percentages."""
        self.yaxis.set_major_formatter(PercentFormatter(xmax=1))

    def count_axis(self, name: str) -> None:
        """Show a number of things on the x axis: integers, thousands as k."""
        self.set_xlabel(name)
        self.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
        self.xaxis.set_major_formatter(EngFormatter(sep=""))

    def epoch_axis(self, epochs: Ints) -> None:
        """Show epochs, at least one and in order, on the x axis: from 0 as in Lightning's progress bar and the logs."""
        self.set_xlabel("epoch")
        self.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        self.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        self.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))

    def stage_bands(self, spans: Sequence[Span]) -> None:
        """Tint the stages behind the curves, with a dotted line where one ends, and name them where there is room."""
        low, high = self.get_xlim()
        inches = self.get_position().width * self.get_figure(root=True).get_figwidth()  # type: ignore[union-attr]
        for i, span in enumerate(spans):
            self.axvspan(span.start, span.end, color=_BANDS[span.stage], zorder=0, linewidth=0)
            if i:
                self.axvline(span.start, color=GREY, linewidth=0.8, linestyle=":", zorder=0.5)
            start = max(span.start, low)
            end = min(span.end, high)
            if (end - start) / (high - low) * inches > len(span.stage) * _CHARACTER_INCHES:
                self._grey(span.stage, ((start + end) / 2, 1), (0, 2), va="bottom", xycoords=("data", "axes fraction"))
