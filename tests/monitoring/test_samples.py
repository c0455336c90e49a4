"""What the monitor knows of the samples, against what a spy in the user's own step saw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast import (
    EnergyMonitor,
    SparseLossMixin,
    SparseTrainingMonitor,
)
from lightning_ast.core.state import known_fields
from lightning_ast.monitoring.samples import BINS, EpochSamples, SampleHistory
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import SaveAt, gloo, quiet_trainer
from tests.monitoring.monitored_run import EPOCHS, WARMUP, Net, Numbered, Spy, chain, events, run


def history_of(monitor: SparseTrainingMonitor) -> SampleHistory:
    """What a monitor knows of the samples, as it is saved."""
    return known_fields(SampleHistory, monitor.state_dict()["history"])


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
    history = history_of(monitor)
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
    history = history_of(monitor)
    assert torch.equal(history.selected, spy.selected)
    assert torch.equal(history.offered, torch.full_like(history.offered, EPOCHS - WARMUP)), "every sample, each epoch"
    labels = digits[1]
    for epoch, shares in history.classes.items():
        loaded = spy.classes[epoch]  # what was in the batches: all of it selected
        assert loaded.nan_to_num(1.0).eq(1).all()
        assert len(shares) == 10
    total = torch.stack(list(history.classes.values())).mean(0) * labels.bincount() * (EPOCHS - WARMUP)
    assert total == pytest.approx(torch.zeros(10).index_add(0, labels, spy.selected.float()), rel=1e-5)


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
    again = known_fields(SampleHistory, history.state_dict())
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
    assert len(history_of(monitor).classes) == EPOCHS - WARMUP, "labels are known without indices"


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
        assert int(history_of(monitor).offered.sum()) == 2 * 512
        assert set(history_of(monitor).thresholds) == {2, 3, 4}


class Gone(Dropping):
    """A whole batch is missing now and then: Lightning skips None."""

    def __call__(self, rows: list[Any]) -> Any:
        return None if rows[0][2] % 3 == 0 else torch.utils.data.default_collate(rows)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_skipped_batches_do_not_shift_what_is_known(digits: Digits, tmp_path: Path) -> None:
    class Skips(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            (watcher,) = selection.session.watchers
            taken.append((watcher.indices(len(batch[2])), batch[2]))

    for collate in (Gone(), None):
        taken: list[Any] = []
        monitor = SparseTrainingMonitor()
        selection, callbacks = chain("partial", monitor)
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
    assert len(history_of(monitor).offered) == 0
    assert history_of(monitor).classes.keys() == {2}


def test_a_resumed_run_goes_on_counting(digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for path in (None, tmp_path / "epoch.ckpt"):
        torch.manual_seed(0)
        monitor = SparseTrainingMonitor()
        _, callbacks = chain("partial", monitor, SaveAt(tmp_path / "epoch.ckpt", "epoch end", 3))
        logger = TensorBoardLogger(str(tmp_path), name="")
        trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=callbacks, logger=logger)
        trainer.fit(PlainNet(dropout=0.0), loader(digits, shuffle=True), loader(digits), ckpt_path=path)
        found.append((history_of(monitor), capsys.readouterr().out.splitlines()))
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
                torch.save((monitor.state_dict()["history"], spy.selected), tmp_path / "history.pt")

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
