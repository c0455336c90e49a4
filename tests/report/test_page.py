"""The page: well-formed, complete in itself, every number where it belongs."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_ast.errors import MissingPackageError, ReportError
from lightning_ast.report import read_runs, write_report
from lightning_ast.report.derive import clip_to_training
from lightning_ast.report.page import summarize, table
from tests.report.conftest import made

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that every tag is closed, and collects what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append({key: value or "" for key, value in attrs})
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def report(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([logs / "tb"], tmp_path_factory.mktemp("out") / "deep" / "report")


def test_the_page_is_well_formed_and_holds_each_figure_once(report: Path) -> None:
    page = Page(report.read_text())
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]
    assert len(page.images) == len(page.texts["figcaption"]) == 6
    for image, caption in zip(page.images, page.texts["figcaption"], strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert len(image["alt"]) > 40
        assert caption.startswith("What each epoch cost") == ("cost: seconds" in image["alt"])
    assert page.texts["h2"] == ["The runs side by side", "dense", "partial", "prune"]
    assert any("share of samples skipped is not compute saved" in text for text in page.texts["figcaption"])


def test_the_page_needs_nothing_else(report: Path) -> None:
    text = report.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.texts)
    links = [value for _, key, value in page.attributes if key in ("src", "href", "srcset", "data", "action")]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"https?://|@import|url\(|file:", re.sub(r"base64,[^\"]*", "", text))


def test_the_foot_says_from_what_and_by_what(logs: Path, report: Path) -> None:
    (foot,) = Page(report.read_text()).texts["footer"]
    assert str(logs / "tb") in foot
    assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d [+-]\d{4} by lightning-ast \d+\.\d+", foot)


def test_the_table_holds_the_runs_numbers(report: Path, logs: Path) -> None:
    page = Page(report.read_text())
    rows = {summary.name: summary for summary in map(summarize, read_runs([logs / "csv"]))}
    assert page.texts["th"][0] == "run"
    heads = [head for head in page.texts["th"] if not head.startswith(tuple(rows))]
    cells = page.texts["td"]
    width = len(heads) - 1
    partial = dict(zip(heads[1:], cells[width : 2 * width]))
    dense = dict(zip(heads[1:], cells[:width]))
    row, base = rows["partial"], rows["dense"]
    assert page.texts["th"][len(heads)] == "densedense, the reference"
    assert partial["epochs"] == dense["epochs"] == "4"
    assert row.final_accuracy is not None
    assert base.final_accuracy is not None
    points = 100 * (row.final_accuracy - base.final_accuracy)
    assert partial["final accuracy"] == f"{row.final_accuracy:.1%}{points:+.1f} points"
    assert dense["final accuracy"] == f"{base.final_accuracy:.1%}"
    assert partial["samples skipped"] == f"{row.savings['samples']:.1%}"
    assert partial["saved: FLOPs"] == f"{row.savings['flops']:.1%}"
    assert dense["samples skipped"] == "-"
    assert partial["seconds"] == "60.0"
    assert dense["seconds"] == "-", "nobody measured them"
    assert partial["joules"] == "1,000"  # the dense run's are not known
    assert "mode" not in heads  # of no run


def test_the_validation_after_the_fit_is_not_an_epoch(logs: Path, report: Path) -> None:
    prune = next(run for run in read_runs([logs / "csv"]) if run.name == "prune")
    assert int(prune.scalars["epoch"].values[-1]) == 4  # trainer.validate logged as if in a fifth epoch
    assert len(prune.scalars["val_acc"]) == 5
    assert summarize(prune).epochs == 5
    assert summarize(clip_to_training(prune)).epochs == 4
    assert "<td>5</td>" not in report.read_text()


def test_relative_columns_are_against_the_dense_run() -> None:
    epoch = [(0, 0), (1, 1)]
    rows = [
        summarize(made({"epoch": epoch, "val_acc": [(1, 0.9)], "energy/total_seconds": [(1, 200.0)], "energy/total_joules": [(1, 4000.0)]}, name="dense")),
        summarize(made({"epoch": epoch, "val_acc": [(1, 0.88)], "ast/activation_rate": [(1, 0.4)], "energy/total_seconds": [(1, 150.0)], "energy/total_joules": [(1, 1000.0)]}, name="sparse")),
    ]  # fmt: skip
    page = Page(table(rows))
    assert page.texts["small"] == [
        "dense, the reference",
        "-2.0 points",
        "-2.0 points",
        "0.75\N{MULTIPLICATION SIGN}",
        "0.25\N{MULTIPLICATION SIGN}",
    ]
    assert "small" not in Page(table(rows[1:])).texts


def test_names_are_escaped(tmp_path: Path) -> None:
    for name in ("<b>bold</b>", "a&b", 'quote"s'):
        folder = tmp_path / "logs" / name.replace("/", "_")
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("epoch,step,val_acc\n0,1,0.5\n")
    page = Page(write_report([tmp_path / "logs"], tmp_path / "out").read_text())
    assert "b" not in page.texts
    assert page.texts["h2"][1:] == ["<b>bold<_b>", "a&b", 'quote"s']
    assert any('quote"s' in image["alt"] for image in page.images)


def test_a_dense_run_alone_and_a_run_of_nothing_work(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "metrics.csv").write_text("epoch,step,train_loss,val_acc\n0,1,1.0,\n0,1,,0.5\n")
    page = Page(write_report([alone], tmp_path / "out").read_text())
    assert page.texts["title"] == ["Training report: alone"]
    assert len(page.images) == 1
    assert page.texts["td"] == ["1", "50.0%", "50.0%"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.csv").write_text("")
    page = Page(write_report([alone, empty], tmp_path / "out").read_text())
    assert page.texts["h2"] == ["The runs side by side", "alone", "empty"]
    assert page.texts["p"][-1] == "The log of this run holds no values."


def test_the_page_names_what_was_left_out(tmp_path: Path) -> None:
    for name, text in (("run", "epoch,step,val_acc\n0,1,0.5\n"), ("<data>", "name,score\na,1\n")):
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "metrics.csv").write_text(text)
    page = Page(write_report([tmp_path / "logs"], tmp_path / "out").read_text())
    (line,) = [text for text in page.texts["p"] if text.startswith("Left out: ")]
    assert line.endswith(
        "/<data>/metrics.csv: cannot be read (it has no column 'step', so CSVLogger did not write it)."
    )
    assert page.texts["title"] == ["Training report: run"]


def test_a_place_that_cannot_be_written_to_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,val_acc\n0,1,0.5\n")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ReportError, match=r"cannot write the report to .*file"):
            write_report([tmp_path], out)
    assert (tmp_path / "file").read_text() == "mine"


def test_without_matplotlib_the_error_says_what_to_install(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("comparison", "costs", "dashboard", "style"):
        monkeypatch.delitem(sys.modules, f"lightning_ast.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"matplotlib.*pip install 'lightning-ast\[report\]'"):
        write_report([logs / "csv"], tmp_path)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_a_browser_shows_every_figure_and_caption(report: Path, tmp_path: Path) -> None:
    probe = "<script>document.title = [...document.images].map(i => i.complete ? i.naturalWidth : 0).join(' ')</script>"
    page = tmp_path / "probed.html"
    page.write_text(report.read_text().replace("</body>", f"{probe}</body>"))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    seen = Page(re.sub(r"<script>.*?</script>", "", shown, flags=re.DOTALL))
    assert seen.texts["title"] == [" ".join(["1980"] * 6)]
    assert seen.texts["figcaption"] == Page(report.read_text()).texts["figcaption"]
