"""The figures: every panel shows its series, or one grey line that says what is missing."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_ast.report import read_runs
from lightning_ast.report.comparison import comparison
from lightning_ast.report.costs import costs
from lightning_ast.report.dashboard import dashboard
from lightning_ast.report.series import Run
from lightning_ast.report.style import GREY, drawing, label, new_figure, png, unit_of
from tests.report.conftest import long_run, made

TITLES = ["Accuracy", "Training loss", "Activation rate", "Savings", "Threshold", "Significance"]


def pixels(figure: Figure) -> np.ndarray:
    """What the figure looks like, ``(H, W, 3)`` in [0, 1]; its panels are laid out by then."""
    return mpl.image.imread(BytesIO(png(figure)))[:, :, :3]


def inside(axes: Axes, image: np.ndarray) -> np.ndarray:
    box = axes.get_position()
    height, width, _ = image.shape
    return image[int((1 - box.y1) * height) : int((1 - box.y0) * height), int(box.x0 * width) : int(box.x1 * width)]


def grey_lines(axes: Axes) -> list[str]:
    return [
        text.get_text().replace("\n", " ") for text in axes.texts if text.get_color() == GREY and " " in text.get_text()
    ]


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.lines}


@pytest.fixture(scope="module")
def runs(logs: Path) -> dict[str, Run]:
    return {run.name: run for run in read_runs([logs / "tb"])}


def test_every_panel_of_a_sparse_run_is_drawn(runs: dict[str, Run]) -> None:
    figure = dashboard(runs["partial"])
    image = pixels(figure)
    assert image.shape == (1152, 1980, 3)
    assert len(figure.axes) == 6
    for axes, title in zip(figure.axes, TITLES):
        assert axes.get_title(loc="left").startswith(title)
        panel = inside(axes, image)
        coloured = np.ptp(panel, axis=2) > 0.2
        assert panel.var() > 1e-3, title
        assert coloured.mean() > 1e-3, title  # a curve, not the grid alone


def test_the_panels_show_the_logged_values(runs: dict[str, Run]) -> None:
    run = runs["partial"]
    accuracy, loss, activation, savings, threshold, _ = dashboard(run).axes
    assert accuracy.lines[0].get_ydata().tolist() == run.scalars["val_acc"].values.tolist()
    assert lines(loss)["as logged"].tolist() == run.scalars["train_loss"].values.tolist()
    assert lines(activation)["moving average"].tolist() == run.scalars["ast/activation_rate_ema"].values.tolist()
    samples = next(values for name, values in lines(savings).items() if name.startswith("skipped"))
    assert samples.tolist() == run.scalars["ast/savings_samples"].values.tolist()
    assert threshold.lines[0].get_ydata().tolist() == run.scalars["ast/threshold"].values.tolist()


def test_the_selected_are_a_share_of_all_samples(runs: dict[str, Run]) -> None:
    axes = dashboard(runs["prune"]).axes[5]
    everything, selected = axes.patches
    assert everything.get_data().values.sum() == pytest.approx(1)
    assert selected.get_data().values.sum() == pytest.approx(41 / 101)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["all samples", "selected, 41%"]


@pytest.mark.parametrize(
    ("missing", "panel", "words"),
    [
        ("val_acc", 0, "self.log"),
        ("train_loss", 1, "self.log"),
        ("ast/activation_rate", 2, "add SparseSelectionCallback"),
        ("ast/activation_rate_ema", 2, "moving average (ast/activation_rate_ema)"),
        ("ast/target_activation_rate", 2, "target (ast/target_activation_rate)"),
        ("ast/savings_flops", 3, "FLOPs (not counted in compiled modules)"),
        ("ast/savings_seconds", 3, "TwoStageScheduler"),
        ("ast/savings_joules", 3, "joules (no counter)"),
        ("ast/threshold", 4, "add SparseSelectionCallback"),
        ("ast/significance_p50", 5, "add SparseTrainingMonitor"),
    ],
)
def test_what_is_missing_is_said_in_its_panel(missing: str, panel: int, words: str) -> None:
    run = long_run(3, 4)
    assert not [line for line in grey_lines(dashboard(run).axes[panel]) if words in line]
    without = replace(run, scalars={tag: series for tag, series in run.scalars.items() if tag != missing})
    (line,) = grey_lines(dashboard(without).axes[panel])
    assert words in line
    nan = {"x": [(step, float("nan")) for step in range(3)]}  # only NaN is as good as nothing
    (line,) = grey_lines(dashboard(replace(run, scalars={**run.scalars, missing: made(nan).scalars["x"]})).axes[panel])
    assert words in line


def test_joules_without_a_counter_and_without_the_monitor_are_told_apart() -> None:
    run = long_run(3, 4)
    bare = {tag: series for tag, series in run.scalars.items() if "joules" not in tag and not tag.startswith("energy/")}
    (line,) = grey_lines(dashboard(replace(run, scalars=bare)).axes[3])
    assert "joules (add EnergyMonitor)" in line
    measured = {tag: series for tag, series in run.scalars.items() if "joules" not in tag}
    (line,) = grey_lines(dashboard(replace(run, scalars=measured)).axes[3])
    assert "joules (no counter)" in line


def test_a_run_of_nothing_is_six_grey_lines() -> None:
    figure = dashboard(made({}))
    assert [len(grey_lines(axes)) for axes in figure.axes] == [1] * 6
    assert pixels(figure).var() > 0


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 3), (3, 1), (1000, 100)])
def test_runs_of_any_length_can_be_drawn(epochs: int, steps: int) -> None:
    run = long_run(epochs, steps)
    figure = dashboard(run)
    image = pixels(figure)
    for axes in figure.axes:
        assert inside(axes, image).var() > 1e-4
    shown = figure.axes[0]
    ticks = [text.get_text() for text in shown.get_xticklabels() if seen(shown, text.get_position()[0])]
    assert ticks[0] == "0"
    assert int(ticks[-1]) <= epochs - 1
    assert all(tick.isdigit() for tick in ticks)
    assert figure.axes[4].get_yscale() == ("log" if epochs * steps > 10 else "linear")


def test_no_text_of_the_dashboard_overlaps_another(runs: dict[str, Run]) -> None:
    for run in (runs["partial"], runs["dense"], long_run(1000, 20)):
        figure = dashboard(run)
        figure.canvas.draw()
        texts = []
        for axes in figure.axes:
            ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if axes.axison and seen(axes, tick.get_loc())]
            texts += [axes._left_title, axes.xaxis.label, *axes.texts, *ticks]
        boxes = [text.get_window_extent().padded(-1) for text in texts if text.get_text()]
        assert len(boxes) > 15
        for i, box in enumerate(boxes):
            assert not [other for other in boxes[:i] if box.overlaps(other)]
            assert figure.bbox.x0 <= box.x0
            assert box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0


def seen(axes: Axes, place: float) -> bool:
    low, high = axes.get_xlim()
    return low <= place <= high


def test_every_text_is_readable_on_paper(runs: dict[str, Run]) -> None:
    for figure in (dashboard(runs["partial"]), costs(runs["partial"]), comparison(list(runs.values()))):
        texts = figure.findobj(mpl.text.Text)
        printed = min(277 / (25.4 * figure.get_figwidth()), 165 / (25.4 * figure.get_figheight()))  # A4 across, in mm
        assert min(text.get_fontsize() for text in texts) * printed >= 9


def test_costs_are_stacked_by_epoch(runs: dict[str, Run]) -> None:
    assert costs(runs["dense"]) is None
    figure = costs(runs["partial"])
    seconds, joules = figure.axes
    top = seconds.patches[-1].get_data()
    assert top.values.tolist() == pytest.approx([6.0, 12.0, 18.0, 24.0])
    assert top.baseline.tolist() == pytest.approx([5.75, 11.5, 17.25, 23.0])  # all but "other"
    assert joules.patches[0].get_data().values.tolist() == pytest.approx([100.0, 200.0, 300.0, 400.0])
    assert grey_lines(joules) == ["not measured: CPUs"]
    image = pixels(figure)
    assert all(inside(axes, image).var() > 1e-2 for axes in figure.axes)
    alone = costs(long_run(3, 4))
    assert alone.axes[0].patches[0].get_data().values.tolist() == [
        3.0,
        3.0,
        3.0,
    ]
    assert "joules not measured" in grey_lines(alone.axes[0])[0]


def test_runs_are_compared_by_epoch_and_by_cost(runs: dict[str, Run]) -> None:
    figure = comparison([runs["dense"], runs["partial"], long_run(4, 5)])
    by_epoch, by_seconds, by_joules, loss = figure.axes
    assert by_epoch.lines[0].get_ydata().tolist() == runs["dense"].scalars["val_acc"].values.tolist()
    assert by_seconds.lines[0].get_xdata().tolist() == pytest.approx([6.0, 18.0, 36.0, 60.0])
    assert by_seconds.lines[1].get_xdata().tolist() == pytest.approx([3.0, 6.0, 9.0, 12.0])
    assert grey_lines(by_seconds) == ["not known of dense"]
    assert by_joules.lines[0].get_xdata().tolist() == pytest.approx([100.0, 300.0, 600.0, 1000.0])
    assert grey_lines(by_joules) == ["not known of dense, long"]
    assert loss.get_title(loc="left") == "Training loss by epoch"
    mean = [np.nanmean(runs["dense"].scalars["train_loss"].values[i * 5 : i * 5 + 5]) for i in range(4)]
    assert loss.lines[0].get_ydata().tolist() == pytest.approx(mean)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "partial", "long"]
    image = pixels(figure)
    assert all((np.ptp(inside(axes, image), axis=2) > 0.2).mean() > 1e-4 for axes in figure.axes)


def test_many_runs_look_different_from_each_other() -> None:
    figure = comparison([long_run(2, 2, name=f"run {i}") for i in range(30)])
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines[:30]}
    assert len(looks) == 30


def test_any_name_can_be_drawn() -> None:
    names = ["$x^", "_private", "<b>", "日本語", "x" * 300, r"a\$b"]
    figure = comparison([long_run(2, 2, name=name) for name in names])
    assert pixels(figure).var() > 0
    drawn = [text.get_text() for text in figure.legends[0].get_texts()]
    assert drawn[:3] == [r"\$x^", " _private", "<b>"]
    assert len(drawn[4]) == 34
    assert label("short") == "short"


def test_units_keep_the_numbers_small() -> None:
    assert [unit_of("seconds", s)[0] for s in (1, 299, 301, 10_800)] == ["seconds", "seconds", "minutes", "hours"]
    assert [unit_of("joules", j)[0] for j in (1, 2999, 3000, 5e6)] == ["joules", "joules", "kilojoules", "megajoules"]


@pytest.mark.parametrize("last", [0, 1, 2, 6, 9, 10, 15, 39, 99, 100, 350, 999])
def test_epochs_are_whole_numbers_from_zero(last: int) -> None:
    with drawing():
        axes = new_figure(3, 2)[1][0]
        axes.epoch_axis(np.array([0, last]))
        ticks = [int(tick) for tick in axes.get_xticks() if 0 <= tick <= last]
        assert [axes.xaxis.get_major_formatter()(tick) for tick in ticks] == [str(tick) for tick in ticks]
    assert ticks == sorted(set(ticks))
    assert ticks[0] == 0
    assert len(ticks) <= 11


def test_drawing_leaves_the_users_settings_alone(runs: dict[str, Run]) -> None:
    with mpl.rc_context({"font.size": 30, "axes.titlesize": 50}):
        before = dict(mpl.rcParams)
        figure = dashboard(runs["prune"])
        png(figure)
        assert dict(mpl.rcParams) == before
        assert max(text.get_fontsize() for text in figure.findobj(mpl.text.Text)) < 12
