"""What TensorBoard and a person are shown, against what a spy in the user's own step saw."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning_utilities.core.imports import RequirementCache
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ast import (
    EnergyMonitor,
    SparseLossMixin,
    SparseSelectionCallback,
    SparseTrainingMonitor,
    TwoStageScheduler,
)
from lightning_ast.core.ledger import FlopsPerSample, Ledger
from lightning_ast.monitoring import tensorboard as _writers
from lightning_ast.monitoring.samples import BINS, EpochSamples, SampleHistory
from lightning_ast.monitoring.tensorboard import LAYOUT
from lightning_ast.monitoring.text import RunSummary, best_flops_savings, format_summary, seconds_left
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import assert_same_weights, gloo, quiet_trainer, weights

EPOCHS, WARMUP = 5, 2


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    """Digits as images, each with its own index: the truth that the noted indices are compared with."""

    def __init__(self, digits: Digits) -> None:
        self.images, self.labels = digits
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        self.asked.append(index)
        torch.rand(1)  # an augmentation
        return self.images[index], self.labels[index], index


class Net(PlainNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        return super().training_step((images, labels), batch_idx)


class Spy(pl.Callback):
    """Counts from outside what was offered and selected in sparse epochs, by the indices in the batches."""

    def __init__(self, selection: SparseSelectionCallback, size: int) -> None:
        self.selection = selection
        self.offered, self.selected = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
        self.classes: dict[int, Tensor] = {}
        self.scores: list[Tensor] = []
        self.thresholds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.by_class = torch.zeros(2, 10)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.selection.stage != "sparse":
            return
        labels, indices = batch[1], batch[2]
        kept = self.selection.last_selection.indices
        self.offered[indices] += 1
        self.selected[indices[kept]] += 1
        self.by_class[0] += labels.bincount(minlength=10)
        self.by_class[1] += labels[kept].bincount(minlength=10)
        self.classes[trainer.current_epoch] = self.by_class[1] / self.by_class[0]
        self.thresholds.append(self.selection.threshold)


def chain(mode: str, *extra: pl.Callback, **options: Any) -> tuple[SparseSelectionCallback, list[pl.Callback]]:
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.3, **options)
    return selection, [selection, TwoStageScheduler(warmup_epochs=WARMUP), *extra]


def run(
    digits: Digits, folder: Path, mode: str, *, dataset: Any = None, trainer_options: Any = None, **loading: Any
) -> tuple[SparseTrainingMonitor, Spy, pl.Trainer]:
    dataset = Numbered(digits) if dataset is None else dataset
    monitor = SparseTrainingMonitor(images=4)
    selection, callbacks = chain(mode, monitor)
    spy = Spy(selection, len(dataset))
    trainer = quiet_trainer(
        max_epochs=EPOCHS,
        callbacks=[*callbacks, spy],
        logger=TensorBoardLogger(str(folder), name=""),
        log_every_n_steps=1,
        **(trainer_options or {}),
    )
    torch.manual_seed(0)
    options = {"batch_size": 64, "shuffle": True, **loading}
    trainer.fit(Net(), DataLoader(dataset, **options), loader(digits, batch_size=512))
    return monitor, spy, trainer


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    accumulator = EventAccumulator(str(folder / "version_0"), size_guidance=everything)
    accumulator.Reload()
    return accumulator


DROPPED: dict[str, Any] = {"batch_size": 60, "drop_last": True}
WORKERS: dict[str, Any] = {"num_workers": 2, "persistent_workers": True}


@pytest.mark.parametrize(
    ("mode", "loading", "options"),
    [
        *((mode, {}, {}) for mode in ("partial", "subset", "mask")),
        *((mode, DROPPED, {"limit_train_batches": 5}) for mode in ("partial", "subset", "mask")),
        ("partial", WORKERS, {}),  # the loader does not know the mode
    ],
)
def test_each_sample_is_counted_as_the_step_saw_it(
    digits: Digits, tmp_path: Path, mode: str, loading: dict[str, Any], options: dict[str, Any]
) -> None:
    monitor, spy, _ = run(digits, tmp_path, mode, trainer_options=options, **loading)
    history = monitor._history
    size = len(history.offered)
    assert torch.equal(history.offered, spy.offered[:size])
    assert spy.offered[size:].sum() == 0
    assert torch.equal(history.selected, spy.selected[:size])
    assert 0.2 < history.selected.sum() / history.offered.sum() < 0.4
    assert history.classes.keys() == spy.classes.keys() == set(range(WARMUP, EPOCHS))
    for epoch, shares in history.classes.items():
        assert shares == pytest.approx(spy.classes[epoch][: len(shares)], nan_ok=True)
    mean = torch.stack([history.thresholds[epoch].nanmean() for epoch in sorted(history.thresholds)]).mean()
    assert float(mean) == pytest.approx(np.mean(spy.thresholds), rel=0.05)


def test_prune_counts_what_it_leaves_out(digits: Digits, tmp_path: Path) -> None:
    monitor, spy, _ = run(digits, tmp_path, "prune")
    history = monitor._history
    assert torch.equal(history.selected, spy.selected)
    assert torch.equal(history.offered, torch.full_like(history.offered, EPOCHS - WARMUP)), "every sample, each epoch"
    labels = digits[1]
    for epoch, shares in history.classes.items():
        loaded = spy.classes[epoch]  # what was in the batches: all of it selected
        assert loaded.nan_to_num(1.0).eq(1).all()
        assert len(shares) == 10
    total = torch.stack(list(history.classes.values())).mean(0) * labels.bincount() * (EPOCHS - WARMUP)
    assert total == pytest.approx(torch.zeros(10).index_add(0, labels, spy.selected.float()), rel=1e-5)


@pytest.mark.parametrize("mode", ["partial", "subset", "prune"])
def test_watching_changes_nothing(digits: Digits, tmp_path: Path, mode: str) -> None:
    ends = []
    for watched in (False, True):
        dataset = Numbered(digits)
        extra = [SparseTrainingMonitor(), EnergyMonitor(meters=[])] if watched else []
        _, callbacks = chain(mode, *extra)
        logger = TensorBoardLogger(str(tmp_path), name=mode) if watched else False
        torch.manual_seed(1)
        trainer = quiet_trainer(max_epochs=4, callbacks=callbacks, logger=logger)
        module = Net()
        given = DataLoader(dataset, batch_size=64, shuffle=True)
        trainer.fit(module, given)
        assert trainer.train_dataloader is given
        ends.append((weights(module), torch.get_rng_state(), type(trainer.fit_loop)))
    assert_same_weights(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1]), "the data set's random numbers are put back"
    assert ends[0][2] is ends[1][2]


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
    for title, patterns in charts.items():
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in logged), f"{title}: nothing is logged as {pattern}"


def test_the_samples_shown_are_those_of_the_extremes(digits: Digits, tmp_path: Path) -> None:
    dataset = Numbered(digits)
    _, spy, _ = run(digits, tmp_path, "partial", dataset=dataset)
    shown = dataset.asked[-8:]
    share = spy.selected / spy.offered
    assert share[shown[:4]].min() == share.max()
    assert share[shown[4:]].max() == share.min()


def test_extremes_are_ordered_by_share_and_then_by_significance() -> None:
    history = SampleHistory()
    for scores, selected in (([4.0, 3.0, 2.0, 1.0], [1, 1, 0, 0]), ([1.0, 9.0, 2.0, 0.5], [0, 1, 1, 0])):
        kept = torch.tensor(selected).bool()
        samples = EpochSamples(torch.tensor(scores), kept, None, torch.tensor([7, 2, 3, 5]), torch.full((BINS,), 1.0))
        history.add(len(history.thresholds), samples)
    most, least = history.extremes(2)
    assert most.tolist() == [2, 7]  # 2 of 2; 7 and 3 were 1 of 2, and 7 was worth more
    assert least.tolist() == [5, 3]
    assert history.offered.tolist() == [0, 0, 2, 2, 0, 2, 0, 2]
    again = SampleHistory.from_state_dict(history.state_dict())
    assert [each.tolist() for each in again.extremes(4)] == [each.tolist() for each in history.extremes(4)]


class Dropping:
    """Leaves samples out, as some collate functions do."""

    def __call__(self, rows: list[Any]) -> Any:
        return torch.utils.data.default_collate([row for row in rows if row[2] % 7])


def test_where_indices_are_not_known_nothing_is_made_up(digits: Digits, tmp_path: Path) -> None:
    monitor, _, _ = run(digits, tmp_path, "partial", collate_fn=Dropping())
    tags = events(tmp_path).Tags()
    assert "ast/significance" in tags["histograms"]
    assert "ast/times_selected" not in tags["histograms"]
    assert "ast/most_and_least_selected" not in tags["images"]
    assert len(monitor._history.classes) == EPOCHS - WARMUP, "labels are known without indices"


def test_regression_has_no_classes(digits: Digits, tmp_path: Path) -> None:
    class Regression(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.mse_loss(self(batch[0]).mean(1), batch[1].float() / 10)

    monitor = SparseTrainingMonitor()
    _, callbacks = chain("partial", monitor)
    logger = TensorBoardLogger(str(tmp_path), name="")
    flat = (digits[0].flatten(1), digits[1])
    module = Regression()
    module.net = torch.nn.Linear(64, 10)
    data = DataLoader(torch.utils.data.TensorDataset(*flat), batch_size=64)
    quiet_trainer(max_epochs=3, callbacks=callbacks, logger=logger).fit(module, data)
    tags = events(tmp_path).Tags()
    assert "ast/class_activation" not in tags["images"]
    assert "ast/threshold_by_epoch" in tags["images"]
    assert "ast/most_and_least_selected" not in tags["images"], "64 numbers are no picture"
    assert "ast/times_selected" in tags["histograms"]


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


def test_quarantined_samples_are_named(digits: Digits, tmp_path: Path) -> None:
    dataset = Numbered((digits[0].clone(), digits[1]))
    dataset.images[[5, 77]] = torch.nan
    monitor = SparseTrainingMonitor()
    selection, callbacks = chain("partial", monitor)
    logger = TensorBoardLogger(str(tmp_path), name="")
    trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        trainer.fit(Net(), DataLoader(dataset, batch_size=64, shuffle=True))
    assert {sample.index for sample in selection.quarantined} == {5, 77}, "the monitor knows the indices"
    read = events(tmp_path)
    text = read.Tensors("ast/quarantined_samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert len(re.findall(r"\| (5|77) \|$", text, re.M)) == 6
    assert [e.value for e in read.Scalars("ast/quarantined")][-1] == 2.0


def test_pictures_wait_for_their_share_of_the_time(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Fake:
        def __bool__(self) -> bool:
            return True

        def histograms(self, *_: Any) -> None: ...

        def pictures(self, history: Any, step: int) -> None:
            drawn.append(step)

    monitor = SparseTrainingMonitor()
    monitor._writers = Fake()  # type: ignore[assignment]
    samples = EpochSamples(torch.ones(4), torch.ones(4).bool(), None, None, torch.full((BINS,), 1.0))
    elapsed = [0.0]
    monkeypatch.setattr(type(monitor._progress), "elapsed", property(lambda self: elapsed[0]))

    class At:
        current_epoch = 0
        fit_loop = None

    step = [0]
    monkeypatch.setattr("lightning_ast.callbacks.monitor.logged_step", lambda loop: step[0])

    class Module:
        def log_dict(self, *args: Any, **kwargs: Any) -> None: ...

    for now, spent in ((99.0, 0.0), (101.0, 0.0), (101.0, 2.0), (250.0, 2.0)):
        step[0] += 1
        elapsed[0], monitor._progress.monitoring_seconds = now, spent
        monitor._show(samples, At(), Module())  # type: ignore[arg-type]
    # a second is 1 % of 101 s, not of 99; what was spent counts; then the pictures were quick
    assert drawn == [2, 4]


class Ramp(pl.Callback):
    """Larger batches and another collate_fn from epoch to epoch, as a curriculum does."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.train_dataloader.batch_sampler.batch_size *= 2
        if trainer.current_epoch == 3:
            trainer.train_dataloader.collate_fn = Sorting()


class Sorting:
    """Orders a batch by its labels."""

    def __call__(self, rows: list[Any]) -> Any:
        return torch.utils.data.default_collate(sorted(rows, key=lambda row: int(row[1])))


@pytest.mark.parametrize("watched", [False, True])
def test_a_loader_that_is_changed_on_the_way_is_the_users_own(digits: Digits, tmp_path: Path, watched: bool) -> None:
    monitor = SparseTrainingMonitor()
    selection, callbacks = chain("partial", *([monitor] if watched else []))
    spy = Spy(selection, 512)
    sizes: list[int] = []

    class Sizes(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            sizes.append(len(batch[1]))

    logger = TensorBoardLogger(str(tmp_path), name="")
    trainer = quiet_trainer(max_epochs=5, callbacks=[*callbacks, spy, Sizes(), Ramp()], logger=logger)
    trainer.fit(Net(), DataLoader(Numbered(digits), batch_size=16, shuffle=True))
    assert [sizes.count(size) for size in (16, 32, 64, 128, 256)] == [32, 16, 8, 4, 2]
    if watched:  # the last epoch is in an order that is not known, and is not counted
        assert int(monitor._history.offered.sum()) == 2 * 512
        assert set(monitor._history.thresholds) == {2, 3, 4}


class Gone(Dropping):
    """A whole batch is missing now and then: Lightning skips None."""

    def __call__(self, rows: list[Any]) -> Any:
        return None if rows[0][2] % 3 == 0 else torch.utils.data.default_collate(rows)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_skipped_batches_do_not_shift_what_is_known(digits: Digits, tmp_path: Path) -> None:
    class Skips(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            taken.append((None if monitor._drawn is None else monitor._drawn.take(len(batch[2])), batch[2]))

    for collate in (Gone(), None):
        taken: list[Any] = []
        monitor = SparseTrainingMonitor()
        _, callbacks = chain("partial", monitor)
        logger = TensorBoardLogger(str(tmp_path), name="")
        trainer = quiet_trainer(max_epochs=3, callbacks=[*callbacks, Skips()], logger=logger)
        trainer.fit(Net(), DataLoader(Numbered(digits), batch_size=64, shuffle=True, collate_fn=collate))
        if collate is None:
            assert len(taken) == 24
            assert all(torch.equal(known, truth) for known, truth in taken)
        else:
            assert all(known is None for known, _ in taken), "a collate_fn of one's own may do anything"


def test_names_of_samples_are_not_places(digits: Digits, tmp_path: Path) -> None:
    class Named(SparseLossMixin, Net):
        def sample_indices(self, batch: Any) -> Tensor:
            return batch[2] + 10**11

    monitor = SparseTrainingMonitor()
    _, callbacks = chain("partial", monitor)
    logger = TensorBoardLogger(str(tmp_path), name="")
    trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, logger=logger)
    trainer.fit(Named(), DataLoader(Numbered(digits), batch_size=64))
    assert len(monitor._history.offered) == 0
    assert monitor._history.classes.keys() == {2}


def test_a_logger_that_is_not_what_it_seems_does_not_end_the_training(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(_writers, "rank_zero_warn", said.append)

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
    assert len(said) == 1, "asked once, in two sparse epochs"
    assert said[0].startswith("lightning-ast: Foreign.add_histogram failed and is not asked again")


# ---------------------------------------------------------------------- the terminal


def test_an_epoch_without_validation_shows_no_accuracy(digits: Digits, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = quiet_trainer(callbacks=[SparseTrainingMonitor()], max_epochs=4, check_val_every_n_epoch=2)
    trainer.fit(PlainNet(), loader(digits), loader(digits))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert ["Val Acc" in line for line in lines] == [False, True, False, True]


@pytest.mark.parametrize(("name", "found"), [("retrieval_acc", False), ("val_acc", True), ("valid/accuracy", True)])
def test_which_name_is_a_validation_accuracy(
    digits: Digits, capsys: pytest.CaptureFixture[str], name: str, found: bool
) -> None:
    class Named(PlainNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(name, 93.2)

    quiet_trainer(callbacks=[SparseTrainingMonitor()]).fit(Named(), loader(digits), loader(digits))
    assert ("Val Acc: 93.20%" in capsys.readouterr().out) is found


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_the_line_starts_anew_where_the_first_batch_is_skipped(
    digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    class First(pl.Callback):
        def __init__(self) -> None:
            self.lines: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            if outputs:
                self.lines.append(float(outputs["loss"]))

        def on_train_epoch_start(self, *_: Any) -> None:
            self.lines.clear()

    class Missing:
        calls = 0

        def __call__(self, rows: list[Any]) -> Any:
            self.calls += 1
            return None if self.calls == 9 else torch.utils.data.default_collate(rows)

    spy = First()
    trainer = quiet_trainer(callbacks=[SparseTrainingMonitor(), spy], max_epochs=2)
    data = DataLoader(torch.utils.data.TensorDataset(*digits), batch_size=64, collate_fn=Missing())
    trainer.fit(PlainNet(), data)
    line = re.search(r"Epoch 1/1 \| Loss: (\S+)", capsys.readouterr().out)
    assert len(spy.lines) == 7
    assert float(line[1]) == pytest.approx(np.mean(spy.lines), abs=1e-4)


def test_a_checkpoint_without_the_monitor_or_of_an_older_one(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 20:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    _, callbacks = chain("partial", Save())
    quiet_trainer(max_epochs=4, callbacks=callbacks).fit(PlainNet(), loader(digits, batch_size=64))
    checkpoint = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    for older in (False, True):
        if older:
            key = str(SparseTrainingMonitor().state_key)
            checkpoint["callbacks"][key] = {"loss_sum": 3.0, "steps": 4, "before": [1024, 900, 0.0, 0.0]}
            torch.save(checkpoint, tmp_path / "mid.ckpt")
        _, callbacks = chain("partial", SparseTrainingMonitor())
        trainer = quiet_trainer(max_epochs=4, callbacks=callbacks)
        trainer.fit(PlainNet(), loader(digits, batch_size=64), ckpt_path=tmp_path / "mid.ckpt")
        (rate,) = re.findall(r"Epoch 2/3 .* Act: (\S+)%", capsys.readouterr().out)
        assert float(rate) < 40, "of the epoch's rest, and not of the run"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_lines_and_summary_with_each_progress_bar(
    digits: Digits, capfd: pytest.CaptureFixture[str], bar: Any, first: bool
) -> None:
    if bar is RichProgressBar and not RequirementCache("lightning>=2.6"):
        pytest.skip("Lightning's bar of then does not work with the Rich of now")
    selection, callbacks = chain("partial", SparseTrainingMonitor(), EnergyMonitor(meters=[]))
    extra = [] if bar is None else [bar()]
    ordered = [*extra, *callbacks] if first else [*callbacks, *extra]
    trainer = quiet_trainer(max_epochs=4, callbacks=ordered, enable_progress_bar=bar is not None)
    trainer.fit(PlainNet(), loader(digits, batch_size=32), loader(digits, batch_size=512))
    out = capfd.readouterr().out
    lines = re.findall(r"Epoch (\d)/3 \| Loss: .* \| Val Acc: .* \| Act: .* \| FLOPs saved: \S+(.*)", out)
    assert [number for number, _ in lines] == ["0", "1", "2", "3"]
    assert [bool(re.match(r" \| ETA: \d+\.\ds", rest)) for _, rest in lines] == [True, True, True, False]
    samples, flops = (f"{selection.savings[name]:.1%}" for name in ("samples", "flops"))
    assert re.search(
        rf"saved        FLOPs {flops} \| seconds -?\d+\.\d% \| joules not known.*\n  skipped      samples {samples}\n",
        out,
    )
    assert f"(mode='partial' at best: FLOPs {flops})" in out
    assert re.search(r"lightning-ast: 4 epochs in \d+\.\ds \| Val Acc: \S+%, best \S+% in epoch \d", out)
    assert re.search(r"activation   \S+% of all samples, \S+% in the sparse stage \(target 30.0%\)", out)
    assert re.search(
        r"time         loading \d+% \| scoring \d+% \| forward backward \d+% \| .* \| monitoring \S+%", out
    )


def test_the_closing_summary() -> None:
    run = RunSummary(
        40, 7384.0, accuracy=0.9212, best_accuracy=0.93, best_epoch=38, mode="subset", activation_rate=0.46,
        sparse_rate=0.4012, target_rate=0.4, savings={"samples": 0.54, "flops": 0.21, "seconds": -0.031, "joules": None},
        best_savings=0.24, sections={"loading": 738.4, "scoring": 1476.8}, joules=3_600_000.0, measured=["NVIDIA H200 (NVML)"],
        quarantined=3, monitoring_seconds=7.384, closing_seconds=1.3,
    )  # fmt: skip
    assert format_summary(run).splitlines() == [
        "lightning-ast: 40 epochs in 2h 03m | Val Acc: 92.12%, best 93.00% in epoch 38",
        "  activation   46.0% of all samples, 40.1% in the sparse stage (target 40.0%)",
        "  saved        FLOPs 21.0% | seconds -3.1% | joules not known (mode='subset' at best: FLOPs 24.0%)",
        "  skipped      samples 54.0%",
        "  time         loading 10% | scoring 20% | monitoring 0.10% | pictures at the end 1.3s",
        "  energy       3.6 MJ (NVIDIA H200 (NVML))",
        "  quarantined  3 samples that are not finite",
    ]


def test_time_left_by_stage() -> None:
    assert seconds_left({}, ["sparse"]) is None
    assert seconds_left({"warmup": [10.0, 14.0]}, ["warmup", "sparse"]) == 24.0, "an unseen stage takes the last mean"
    assert seconds_left({"warmup": [10.0], "sparse": [4.0, 6.0]}, ["sparse", "cooldown", "warmup"]) == 5 + 5 + 10


@pytest.mark.parametrize(
    ("mode", "share"), [("mask", 1.0), ("subset", 0.25 + 0.4), ("partial", 0.25 + 0.75 * 0.4), ("prune", 0.4)]
)
def test_the_best_a_mode_could_do(mode: Any, share: float) -> None:
    ledger = Ledger(flops=FlopsPerSample(forward=1.0, backward=3.0))
    ledger.record("warmup", mode=None, offered=100, selected=100)
    ledger.record("sparse", mode=mode, offered=300, selected=120, dense_share=0.5 if mode == "partial" else 0.0)
    assert best_flops_savings(ledger, mode) == pytest.approx(1 - (100 + 300 * share) / 400)
    if mode == "partial":
        assert best_flops_savings(ledger, mode) > ledger.savings()["flops"], "a backward that went dense is not at best"
    assert best_flops_savings(Ledger(), mode) is None


def test_a_resumed_run_goes_on_counting(digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 3:
                trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    found = []
    for path in (None, tmp_path / "epoch.ckpt"):
        torch.manual_seed(0)
        monitor = SparseTrainingMonitor()
        _, callbacks = chain("partial", monitor, Save())
        logger = TensorBoardLogger(str(tmp_path), name="")
        trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=callbacks, logger=logger)
        trainer.fit(PlainNet(dropout=0.0), loader(digits, shuffle=True), loader(digits), ckpt_path=path)
        found.append((monitor._history, capsys.readouterr().out.splitlines()))
        assert type(trainer.fit_loop) is _FitLoop, "both that led it have let go"
    (whole, first), (resumed, second) = found
    assert whole.thresholds.keys() == resumed.thresholds.keys()
    assert torch.equal(whole.offered, resumed.offered)
    assert torch.equal(whole.selected, resumed.selected)
    assert whole.classes.keys() == resumed.classes.keys()
    assert [line for line in second if line.startswith("Epoch")] == [
        line for line in first if line.startswith("Epoch 4")
    ]
    assert any(line.startswith("lightning-ast: 5 epochs") for line in second)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_show_the_first_ones_part(digits: Digits, tmp_path: Path) -> None:
    class Check(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.global_rank == 0:
                torch.save((monitor._history.state_dict(), spy.selected), tmp_path / "history.pt")

    monitor = SparseTrainingMonitor()
    selection, callbacks = chain("partial", monitor, EnergyMonitor())
    spy = Spy(selection, 512)
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[*callbacks, spy, Check()],
        logger=TensorBoardLogger(str(tmp_path), name=""),
        max_epochs=3,
    )
    trainer.fit(Net(), DataLoader(Numbered(digits), batch_size=64, shuffle=True))
    history, selected = torch.load(tmp_path / "history.pt")
    assert history["offered"].sum() == 256, "one of two ranks, one sparse epoch"
    assert torch.equal(history["selected"], selected[: len(history["selected"])])
    assert "ast/times_selected" in events(tmp_path).Tags()["histograms"]
