"""What TensorBoard and other loggers are given: histograms, pictures, a page."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast import (
    EnergyMonitor,
    SparseSelectionCallback,
    SparseTrainingMonitor,
    TwoStageScheduler,
)
from lightning_ast.monitoring import tensorboard as _writers
from lightning_ast.monitoring.tensorboard import LAYOUT
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer
from tests.monitoring.monitored_run import EPOCHS, WARMUP, Numbered, chain, events, run


def test_the_event_file_holds_what_was_counted(digits: Digits, tmp_path: Path) -> None:
    _, spy, _ = run(digits, tmp_path, "partial")
    read = events(tmp_path)
    tags = read.Tags()
    steps = [event.step for event in read.Scalars("val_acc")][WARMUP:]
    assert steps == [8 * epoch - 1 for epoch in range(WARMUP + 1, EPOCHS + 1)]
    for tag in ("ast/significance", "ast/significance_selected", "ast/times_selected", "ast/selected_share"):
        assert [event.step for event in read.Histograms(tag)] == steps, tag
    last = {tag: read.Histograms(tag)[-1].histogram_value for tag in tags["histograms"]}
    assert last["ast/significance"].num == 512
    assert last["ast/times_selected"].sum == float(spy.selected.sum())
    assert last["ast/significance_selected"].sum / last["ast/significance_selected"].num > (
        last["ast/significance"].sum / last["ast/significance"].num
    ), "what is selected is worth more"
    percentiles = [[e.value for e in read.Scalars(f"ast/significance_p{p}")] for p in (10, 50, 90)]
    assert all(low <= middle <= high for low, middle, high in zip(*percentiles, strict=True))
    assert len(percentiles[0]) == EPOCHS - WARMUP
    targets = [e.value for e in read.Scalars("ast/target_activation_rate")]
    assert targets == pytest.approx([1.0] * 8 * WARMUP + [0.3] * 8 * (EPOCHS - WARMUP))
    for tag in ("ast/class_activation", "ast/threshold_by_epoch", "ast/most_and_least_selected"):
        image = np.asarray(Image.open(io.BytesIO(read.Images(tag)[-1].encoded_image_string)))
        assert image.std() > 10, f"{tag} is not blank"
        assert read.Images(tag)[-1].step == steps[-1]


def test_the_custom_scalars_page_names_what_is_logged(digits: Digits, tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    monitor = SparseTrainingMonitor()

    class Meter:
        name, kind, identity, longest_interval_seconds, joules = "a meter", "gpu", "one", float("inf"), 0.0

        def read_joules(self) -> float:
            self.joules += 1.0
            return self.joules

    _, callbacks = chain("subset", monitor, EnergyMonitor(meters=[Meter(), type("Cpu", (Meter,), {"kind": "cpu"})()]))
    trainer = quiet_trainer(
        max_epochs=EPOCHS, callbacks=callbacks, logger=TensorBoardLogger(str(tmp_path), name=""), log_every_n_steps=1
    )
    trainer.fit(PlainNet(), loader(digits, batch_size=32), loader(digits, batch_size=512))
    read = events(tmp_path)
    proto = layout_pb2.Layout.FromString(read.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in proto.category[0].chart}
    assert proto.category[0].title == "AST"
    assert charts == {title: tags for title, (_, tags) in LAYOUT["AST"].items()}
    logged = read.Tags()["scalars"]
    for title, (pattern,) in charts.items():
        choices = re.search(r"\((.*\|.*)\)", pattern)
        for choice in choices[1].split("|") if choices else [""]:
            tags = pattern.replace(choices[0], choice) if choices else pattern
            assert any(re.match(tags, tag) for tag in logged), f"{title}: nothing is logged as {tags}"


def test_the_samples_shown_are_those_of_the_extremes(digits: Digits, tmp_path: Path) -> None:
    dataset = Numbered(digits)
    _, spy, _ = run(digits, tmp_path, "partial", dataset=dataset)
    shown = dataset.asked[-8:]
    share = spy.selected / spy.offered
    assert share[shown[:4]].min() == share.max()
    assert share[shown[4:]].max() == share.min()


def test_a_data_set_that_fails_beside_the_training_does_not_stop_it(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(_writers, "rank_zero_info", said.append)

    class OnlyInTraining(Numbered):
        trainer: Any = None

        def __getitem__(self, index: int) -> Any:
            if len(self.asked) >= EPOCHS * 512:
                raise RuntimeError("closed")
            return super().__getitem__(index)

    run(digits, tmp_path, "partial", dataset=OnlyInTraining(digits))
    assert said == ["lightning-ast: no pictures of samples: RuntimeError: closed"]
    assert "ast/class_activation" in events(tmp_path).Tags()["images"]


def test_without_matplotlib_there_are_no_pictures_and_it_is_said(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(_writers, "rank_zero_info", said.append)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run(digits, tmp_path, "partial")
    tags = events(tmp_path).Tags()
    assert tags["images"] == []
    assert "ast/significance" in tags["histograms"]
    assert said == ["lightning-ast: heatmaps and samples need matplotlib: pip install 'lightning-ast[report]'."]


def test_a_logger_is_asked_for_what_it_has(digits: Digits, tmp_path: Path) -> None:
    class Shy:
        """Takes histograms, and nothing else."""

        def __init__(self) -> None:
            self.tags: list[str] = []

        def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
            self.tags.append(tag)

    class ShyLogger(CSVLogger):
        shy = Shy()

        @property
        def experiment(self) -> Any:
            return self.shy

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def save(self) -> None: ...

        def finalize(self, status: str) -> None: ...

    csv, shy = CSVLogger(str(tmp_path), name="csv"), ShyLogger(str(tmp_path), name="shy")
    _, callbacks = chain("partial", SparseTrainingMonitor())
    trainer = quiet_trainer(max_epochs=4, callbacks=callbacks, logger=[csv, shy], log_every_n_steps=1)
    trainer.fit(PlainNet(), DataLoader(torch.utils.data.TensorDataset(*digits), batch_size=64))
    assert set(shy.shy.tags) == {
        "ast/significance", "ast/significance_selected", "ast/times_selected", "ast/selected_share"
    }  # fmt: skip
    assert "ast/significance_p50" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


class Clock:
    """Stands for the module ``time``; the test moves it."""

    def __init__(self) -> None:
        self.now = 1.0

    def perf_counter(self) -> float:
        return self.now


def test_pictures_wait_for_their_share_of_the_time(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, drawn = Clock(), []

    class EndsOfEpochs(pl.Callback):
        """The sparse epochs end 99, 101, 110 and 250 seconds after the start."""

        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            clock.now = 1.0 + [10, 99, 101, 110, 250][trainer.current_epoch]

    def histograms(writers: Any, *_: Any) -> None:
        clock.now += 2.0 if clock.now == 102.0 else 0.0  # in the second sparse epoch watching takes two seconds

    monkeypatch.setattr("lightning_ast.callbacks.monitor.time", clock)
    monkeypatch.setattr("lightning_ast.monitoring.progress.time", clock)
    monkeypatch.setattr(_writers.Writers, "histograms", histograms)
    monkeypatch.setattr(_writers.Writers, "pictures", lambda writers, history, step: drawn.append(step))
    selection = SparseSelectionCallback()
    callbacks = [EndsOfEpochs(), selection, TwoStageScheduler(warmup_epochs=1), SparseTrainingMonitor()]
    logger = TensorBoardLogger(str(tmp_path), name="")
    quiet_trainer(max_epochs=5, callbacks=callbacks, logger=logger).fit(PlainNet(), loader(digits, batch_size=512))
    # the first is taken for a second, 1 % of 101 s and not of 99; what was spent counts; then the pictures are quick
    assert drawn == [2, 4]


def test_a_logger_that_is_not_what_it_seems_does_not_end_the_training(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_ast.monitoring.guard.rank_zero_warn", said.append)

    class Foreign:
        def add_histogram(self, name: str) -> None: ...

    class Odd(CSVLogger):
        foreign: Any = Foreign()

        @property
        def experiment(self) -> Any:
            if self.foreign is None:
                raise AttributeError("experiment")
            return self.foreign

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def save(self) -> None: ...

        def finalize(self, status: str) -> None: ...

    class Bare(Odd):
        foreign = None

    _, callbacks = chain("partial", SparseTrainingMonitor())
    loggers = [Odd(str(tmp_path)), Bare(str(tmp_path))]
    trainer = quiet_trainer(max_epochs=4, callbacks=callbacks, logger=loggers)
    trainer.fit(PlainNet(), loader(digits))
    assert len(said) == 1, "told once, in two sparse epochs"
    assert said[0].startswith("lightning-ast: writing pages and pictures to a logger failed")
