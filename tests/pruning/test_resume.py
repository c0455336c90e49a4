"""A resumed run trains on exactly the samples that the uninterrupted one does, and ends with its weights, bit by bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset

from lightning_ast import SparseSelectionCallback
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.prune_by_hand import SIZE, Cycle, Indexed, Witness, fit, fresh, loader, pruned


def training(save: SaveAt | None, *, ckpt_path: Any = None, seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    """Epochs of 10, 4, 4 and 10 batches; a resumed run starts from other weights and another random state."""
    loading = options.pop("loading", {})
    module, callback = fresh(Cycle, seed=seed), pruned()
    torch.manual_seed(seed + 100)
    random.seed(seed)
    data = loader(**{"shuffle": True, "dataset": Indexed(noise=0.0 if loading.get("num_workers") else 0.1), **loading})
    trainer = fit(module, data, callback, *([save] if save else []), ckpt_path=ckpt_path, **options)
    return module, trainer, callback


def assert_resumes(path: Path, save: SaveAt, **options: Any) -> None:
    straight, trainer, callback = training(save, **options)
    after = torch.rand(1)
    done = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    again, resumed_trainer, resumed = training(None, ckpt_path=path, seed=7, **options)
    assert [b[:3] for b in again.batches] == [b[:3] for b in straight.batches[done:]], "samples, order and batches"
    assert_same_weights(weights(straight), weights(again))
    assert torch.equal(after, torch.rand(1)), "the global generator"
    assert resumed_trainer.global_step == trainer.global_step == straight.steps == again.steps
    before, now = callback.state_dict(), resumed.state_dict()
    assert torch.equal(before["epochs"]["history"]["scores"], now["epochs"]["history"]["scores"])
    assert torch.equal(before["epochs"]["plan"]["indices"], now["epochs"]["plan"]["indices"])
    for stage, totals in before["ledger"]["stages"].items():
        counted = {k: v for k, v in totals.items() if "timed" not in k}
        assert counted == {k: v for k, v in now["ledger"]["stages"][stage].items() if "timed" not in k}
    momentum = [s["momentum_buffer"] for s in trainer.optimizers[0].state.values()]
    for ours, theirs in zip(momentum, resumed_trainer.optimizers[0].state.values(), strict=True):
        assert torch.equal(ours, theirs["momentum_buffer"])


POINTS = [
    ("epoch end", 0, None),
    ("epoch end", 1, None),
    ("epoch end", 2, None),
    ("batch end", 0, 4),
    ("batch end", 0, 9),
    ("batch end", 1, 0),
    ("batch end", 1, 3),
    ("batch end", 2, 1),
    ("batch end", 2, 3),
    ("batch end", 3, 5),
]


@pytest.mark.parametrize("limits", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 28}], ids=["epochs", "steps"])
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_resume(tmp_path: Path, point: tuple[str, int, int | None], limits: dict[str, int]) -> None:
    path = tmp_path / "run.ckpt"
    assert_resumes(path, SaveAt(path, *point), **limits)


@pytest.mark.parametrize(
    "loading",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"drop_last": True},
        {"shuffle": None, "sampler": RandomSampler(range(SIZE), replacement=True)},
    ],
    ids=["workers", "persistent workers", "drop_last", "sampler"],
)
@pytest.mark.parametrize("point", [("epoch end", 1, None), ("batch end", 2, 1)], ids=str)
def test_resume_with_other_loaders(tmp_path: Path, point: Any, loading: dict[str, Any]) -> None:
    path = tmp_path / "run.ckpt"
    assert_resumes(path, SaveAt(path, *point), loading=loading)


@pytest.mark.parametrize("point", [("epoch end", 1, None), ("batch end", 2, 1), ("batch end", 1, 3)], ids=str)
def test_resume_with_the_users_own_generator(tmp_path: Path, point: Any) -> None:
    path = tmp_path / "run.ckpt"

    def run(**options: Any) -> Any:
        return training(loading={"generator": torch.Generator().manual_seed(3)}, **options)[0]

    straight, again = run(save=SaveAt(path, *point)), run(save=None, ckpt_path=path, seed=7)
    assert [b[2] for b in again.batches] == [b[2] for b in straight.batches][-len(again.batches) :]
    assert_same_weights(weights(straight), weights(again))


@pytest.mark.parametrize(
    "point",
    [
        ("validation end", 0, 4),
        ("validation end", 1, 3),
        ("validation end", 2, 1),
        ("batch end", 2, 0),
        ("epoch end", 2, None),
    ],
    ids=str,
)
def test_resume_around_validation(tmp_path: Path, point: Any) -> None:
    path, images = tmp_path / "run.ckpt", Indexed()
    val = DataLoader(TensorDataset(images.x, images.y), batch_size=150)
    assert_resumes(path, SaveAt(path, *point), val=val, val_check_interval=0.5, num_sanity_val_steps=0)


def test_checkpoint_holds_tensors_and_primitives_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    training(SaveAt(path, "batch end", 2, 1))
    state = torch.load(path, weights_only=True)["callbacks"]
    (epochs,) = [s["epochs"] for key, s in state.items() if "SparseSelectionCallback" in key]

    def leaves(value: Any) -> Any:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return [leaf for part in value for leaf in leaves(part)]
        return [value]

    assert {type(leaf) for leaf in leaves(epochs)} <= {torch.Tensor, int, float, str, type(None)}
    assert epochs["plan"]["indices"].dtype == torch.int32
    assert epochs["history"]["scores"].shape == (SIZE,)


@pytest.mark.parametrize(
    ("point", "every", "workers"),
    [
        (("epoch end", 1, None), 1, 1),
        (("epoch end", 1, None), 2, 0),
        (("batch end", 1, 3), 1, 0),
        (("batch end", 1, 3), 2, 1),
        (("batch end", 2, 1), 1, 1),
        (("batch end", 2, 1), 2, 0),
        (("batch end", 3, 4), 1, 0),
        (("batch end", 3, 4), 2, 0),
    ],
    ids=str,
)
def test_resume_where_loaders_are_reloaded(tmp_path: Path, point: Any, every: int, workers: int) -> None:
    path = tmp_path / "run.ckpt"
    loading = {"num_workers": workers}
    assert_resumes(path, SaveAt(path, *point), loading=loading, reload_dataloaders_every_n_epochs=every)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [64, 120, SIZE]),
        ({"rate": 0.7}, [64, 210, SIZE]),
        ({"rate": 1.0}, [64, SIZE, SIZE]),
        ({"warmup": 2}, [64, 120, SIZE]),
        ({"max_epochs": 3}, [64, SIZE]),
        ({"max_epochs": 6}, [64, 120, 120, 120, SIZE]),
        ({"limit_train_batches": 5}, [64, 64, 160]),
    ],
    ids=str,
)
def test_the_running_epoch_ends_as_it_began(tmp_path: Path, change: dict[str, Any], expected: list[int]) -> None:
    """Settings that changed count from the next epoch on; validation and schedules by epoch come as ever."""
    path, images, ended = tmp_path / "run.ckpt", Indexed(), []
    val = DataLoader(TensorDataset(images.x, images.y), batch_size=150)
    fit(fresh(), loader(shuffle=True), pruned(), SaveAt(path, "batch end", 1, 1), val=val)

    class Ends(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            ended.append((trainer.current_epoch, trainer.fit_loop.epoch_loop._num_ready_batches_reached()))

    module, options = fresh(), dict(change)
    rate = options.pop("rate", 0.4)
    callback = pruned(target_activation_rate=rate)
    fit(module, loader(shuffle=True), callback, Ends(), val=val, ckpt_path=path, num_sanity_val_steps=0, **options)
    sizes = [len(indices) for indices in module.epochs().values()]
    assert sizes == [120 - 64, *expected[1:]]
    assert ended == [(epoch, True) for epoch in range(1, 1 + len(expected))]


def test_resume_with_a_generator_that_the_sampler_keeps(tmp_path: Path) -> None:
    class Own(Sampler[int]):
        def __init__(self) -> None:
            self.source = torch.Generator().manual_seed(5)

        def __iter__(self) -> Any:
            return iter(torch.randperm(SIZE, generator=self.source).tolist())

        def __len__(self) -> int:
            return SIZE

    for point in (("epoch end", 1, None), ("batch end", 2, 1)):
        path = tmp_path / "run.ckpt"
        runs = [
            training(save, ckpt_path=start, seed=seed, loading={"shuffle": None, "sampler": Own()})[0]
            for save, start, seed in ((SaveAt(path, *point), None, 0), (None, path, 7))
        ]
        assert_same_weights(*map(weights, runs))


@pytest.mark.parametrize(
    ("point", "loading", "message"),
    [
        (("batch end", 2, 1), {"batch_size": 30}, "in the middle of an epoch: batch_size was 32 and is 30"),
        (("batch end", 2, 1), {"drop_last": True}, "in the middle of an epoch: drop_last was 0 and is 1"),
        (("batch end", 2, 1), {"dataset": Indexed(290)}, "remembered significance of 290 samples, got that of 300"),
        (("epoch end", 1, None), {"dataset": Indexed(290)}, "remembered significance of 290 samples, got that of 300"),
    ],
)
def test_checkpoints_of_another_set_up_are_refused(tmp_path: Path, point: Any, loading: Any, message: str) -> None:
    path = tmp_path / "run.ckpt"
    training(SaveAt(path, *point))
    with pytest.raises(ConfigurationError, match=message):
        training(None, ckpt_path=path, loading=loading)


def test_another_weighting_in_mid_epoch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    fit(fresh(), loader(), pruned(weighting="sqrt"), SaveAt(path, "batch end", 2, 1))
    with pytest.raises(ConfigurationError, match="weighting was sqrt and is unbiased"):
        fit(fresh(), loader(), pruned(weighting="unbiased"), ckpt_path=path)
    fit(fresh(), loader(), pruned(weighting="sqrt"), SaveAt(path, "batch end", 3, 1))
    fit(fresh(), loader(), pruned(weighting="unbiased"), ckpt_path=path)  # a dense epoch has no weights


def test_another_batch_size_from_an_epochs_end_on(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    module = fresh(Witness)
    fit(module, loader(shuffle=True), pruned(), SaveAt(path, "epoch end", 1))
    module.batches.clear()
    fit(module, loader(shuffle=True, batch_size=20), pruned(), ckpt_path=path, max_epochs=5)
    assert [len(v) for v in module.epochs().values()] == [120, 120, SIZE]


@pytest.mark.parametrize("point", [("batch start", 2, 2), ("batch start", 1, 0)], ids=str)
def test_resume_between_loading_and_training(tmp_path: Path, point: Any) -> None:
    """The batch is loaded again: the same samples, with newly drawn noise."""
    path = tmp_path / "run.ckpt"
    straight, again = training(SaveAt(path, *point))[0], training(None, ckpt_path=path, seed=7)[0]
    assert [b[2] for b in again.batches][:2] == [b[2] for b in straight.batches][-len(again.batches) :][:2]
    assert [len(b[2]) for b in again.batches] == [len(b[2]) for b in straight.batches][-len(again.batches) :]


@pytest.mark.parametrize(
    ("point", "expected"), [(("batch end", 1, 1), [56, 120, SIZE]), (("epoch end", 0, None), [120, 120, SIZE])]
)  # from the midst of an epoch in another mode it is refused: test_resume
def test_from_a_run_without_this_callback_or_in_another_mode(
    tmp_path: Path, point: Any, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is remembered then: the first pruned epoch is a random share."""
    caplog.set_level("INFO")
    for callbacks in ([], [SparseSelectionCallback(mode="partial")])[: 1 if point[0] == "batch end" else 2]:
        path = tmp_path / f"{len(callbacks)}.ckpt"
        trainer = quiet_trainer(callbacks=[*callbacks, SaveAt(path, *point)], max_epochs=4)
        trainer.fit(fresh(), loader(shuffle=True))
        resumed = fresh()
        fit(resumed, loader(shuffle=True), pruned(), ckpt_path=path)
        assert [len(v) for v in resumed.epochs().values()] == expected
        assert ("mode was 'partial' and is 'prune'" in caplog.text) == bool(callbacks)
