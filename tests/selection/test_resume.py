"""Runs that are killed, and resumed: they end as the uninterrupted run does, in every mode and in every part."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import BATCH_MODES, SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.prune_by_hand import Cycle, Indexed, fresh, loader
from tests.selection.killed_run import TIMED
from tests.selection.killed_run import run as killed_run

FORK = multiprocessing.get_context(
    "fork"
)  # a fresh interpreter would import torch and Lightning anew, three times a test
EPOCH = 10  # batches of a dense epoch

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:.set_vital. is deprecated", "ignore:You're resuming"
)


def untimed(value: Any) -> Any:
    """Without what a clock or a path says."""
    if isinstance(value, dict):
        return {
            k: untimed(v)
            for k, v in value.items()
            if k != "fit" and not any(t in str(k) for t in TIMED) and "ModelCheck" not in str(k)
        }
    return [untimed(part) for part in value] if isinstance(value, (list, tuple)) else value


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Bit for bit, through nested states."""
    assert type(left) is type(right), path
    if isinstance(left, Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert left == right, path


def lines(folder: Path) -> dict[tuple[int, str], float]:
    """The last value that was logged under each name and step."""
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {(row["step"], name): value for row in logged for name, value in row.items() if name != "step"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked process waits for ever for threads of torch that were not forked with it, on torch 2.6."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "mode", ["partial", "prune", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("mask", "subset"))]
)
def test_killed_three_times(tmp_path: Path, mode: str) -> None:
    """SIGKILL at three random steps of ten epochs: parameters, optimizer, controller, history, generators and logs."""
    folders = [tmp_path / name for name in ("straight", "killed")]
    for folder in folders:
        folder.mkdir()
    killed_run(mode, folders[0], -1)
    steps = 4 * EPOCH + 6 * (4 if mode == "prune" else EPOCH)
    for step in sorted(random.Random(tmp_path.name).sample(range(4, steps), 3)):
        killed = FORK.Process(target=killed_run, args=(mode, folders[1], step))
        killed.start()
        killed.join(timeout=300)
        assert killed.exitcode == -signal.SIGKILL
        assert not (folders[1] / "end.pt").exists()
    killed_run(mode, folders[1], -1)

    ends = [torch.load(folder / "end.ckpt", weights_only=True) for folder in folders]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "epoch"):
        assert_same(*(untimed(end[part]) for end in ends), path=part)
    (state,) = [v for k, v in ends[0]["callbacks"].items() if "SparseSelectionCallback" in k]
    assert state["selector"]["controller"]["activation_rate_ema"] is not None
    assert state["ledger"]["stages"]["sparse"]["steps"] == steps - 4 * EPOCH
    assert_same(*(torch.load(folder / "end.pt")["random"] for folder in folders))
    straight, again = (lines(folder) for folder in folders)
    assert_same(straight, again)
    assert {"loss", "ast/activation_rate", "ast/savings_flops"} <= {name for _, name in straight}


POINTS = [("epoch end", 0, None), ("epoch end", 1, None), ("batch end", 0, 9), ("batch end", 1, 9), ("batch end", 2, 9)]


@pytest.mark.parametrize("sampler", ["shuffled", "with replacement"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_plain_loader_resumes_at_an_epochs_end(tmp_path: Path, point: Any, workers: int, sampler: str) -> None:
    """Dropout, noise in the data, the order of the samples: from the same random state, whatever the script drew."""
    path, ends = tmp_path / "run.ckpt", []
    for callbacks, ckpt_path, seed in (([SaveAt(path, *point)], None, 0), ([], path, 7)):
        module, callback = fresh(Cycle, seed=seed), SparseSelectionCallback()
        torch.manual_seed(seed + 100)
        dataset = Indexed(noise=0.0 if workers else 0.1)
        order = {"shuffle": True} if sampler == "shuffled" else {"sampler": RandomSampler(dataset, replacement=True)}
        data = loader(dataset=dataset, num_workers=workers, **order)
        schedule = TwoStageScheduler(warmup_epochs=1)
        trainer = quiet_trainer(callbacks=[callback, schedule, *callbacks], max_epochs=4)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        ends.append((weights(module), module.batches, torch.get_rng_state(), callback.ledger.selected, module.steps))
    assert_same_weights(ends[0][0], ends[1][0])
    assert [b[:3] for b in ends[1][1]] == [b[:3] for b in ends[0][1]][-len(ends[1][1]) :]
    assert len(ends[1][1]) == 4 * EPOCH - (point[1] + 1) * EPOCH
    assert torch.equal(ends[0][2], ends[1][2])
    assert ends[0][3:] == ends[1][3:]


def resumed(tmp_path: Path, point: Any, callback: SparseSelectionCallback, data: DataLoader[Any], **first: Any) -> Any:
    path = tmp_path / "run.ckpt"
    settings = {"mode": "partial", **first}
    trainer = quiet_trainer(callbacks=[SparseSelectionCallback(**settings), SaveAt(path, *point)], max_epochs=3)
    trainer.fit(fresh(), loader(shuffle=True))
    module = fresh()
    quiet_trainer(callbacks=[callback], max_epochs=3).fit(module, data, ckpt_path=path)
    return module


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 16}, "batch size was 32 and is 16"),
        ({"dataset": Indexed(200)}, "data set length was 300 and is 200"),
        (
            {"batch_size": 16, "dataset": Indexed(200)},
            "batch size was 32 and is 16, data set length was 300 and is 200",
        ),
    ],
)
def test_other_data(tmp_path: Path, options: Any, named: str, caplog: pytest.LogCaptureFixture) -> None:
    """Refused in the midst of an epoch, where a place would mean another; adapted to at its end."""
    caplog.set_level("INFO")
    with pytest.raises(ConfigurationError, match=named):
        resumed(tmp_path, ("batch end", 1, 3), SparseSelectionCallback(), loader(shuffle=True, **options))
    module = resumed(tmp_path, ("epoch end", 1, None), SparseSelectionCallback(), loader(shuffle=True, **options))
    assert named in caplog.text
    assert len(module.epochs()[2]) == (200 if "dataset" in options else 300)


@pytest.mark.parametrize(
    ("settings", "named", "keeps"),
    [
        ({"mode": "subset"}, "mode was 'partial' and is 'subset'", False),
        ({"gate": "topk"}, "gate was 'soft' and is 'topk'", False),
        ({"significance": "loss"}, "significance was 'gradient' and is 'loss'", False),
        ({"target_activation_rate": 0.2}, "", True),
    ],
)
def test_other_settings(
    tmp_path: Path, settings: Any, named: str, keeps: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    callback = SparseSelectionCallback(**settings)
    started: list[Any] = []

    class Spy(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            started.append(callback.session.selector.controller.activation_rate_ema)

    path = tmp_path / "run.ckpt"
    trainer = quiet_trainer(callbacks=[SparseSelectionCallback(), SaveAt(path, "epoch end", 0)], max_epochs=2)
    trainer.fit(fresh(), loader())
    quiet_trainer(callbacks=[callback, Spy()], max_epochs=2).fit(fresh(), loader(), ckpt_path=path)
    assert (named in caplog.text) if named else ("other settings" not in caplog.text)
    assert (started[0] is not None) == keeps
    assert callback.ledger.offered == 600


@pytest.mark.parametrize("mode", [*BATCH_MODES, "prune"])
def test_a_checkpoint_holds_tensors_and_primitives_alone(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "run.ckpt"
    callback = SparseSelectionCallback(mode=mode)
    schedule = TwoStageScheduler(warmup_epochs=1)
    quiet_trainer(callbacks=[callback, schedule, SaveAt(path, "batch end", 1, 2)], max_epochs=2).fit(fresh(), loader())
    state = torch.load(path, weights_only=True)["callbacks"]["SparseSelectionCallback"]

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            value = list(value.values())
        return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]

    assert {type(leaf) for leaf in leaves(state)} <= {Tensor, int, float, bool, str, type(None)}


def test_a_run_without_the_callback_can_go_on_from_its_checkpoint(tmp_path: Path) -> None:
    """And has nothing of ours in its own."""
    path = tmp_path / "run.ckpt"
    quiet_trainer(callbacks=[SparseSelectionCallback(), SaveAt(path, "epoch end", 0)], max_epochs=2).fit(
        fresh(), loader()
    )
    trainer = quiet_trainer(max_epochs=2)
    with pytest.warns(UserWarning, match="SparseSelectionCallback"):
        trainer.fit(fresh(), loader(), ckpt_path=path)
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"] == {}


@pytest.mark.parametrize(("then", "now"), [("partial", "prune"), ("prune", "partial")])
def test_the_midst_of_an_epoch_in_another_mode(tmp_path: Path, then: str, now: str) -> None:
    """One of the two plans its epochs: it cannot go on with the other's."""
    path = tmp_path / "run.ckpt"
    schedule = TwoStageScheduler(warmup_epochs=1)
    trainer = quiet_trainer(
        callbacks=[SparseSelectionCallback(mode=then), schedule, SaveAt(path, "batch end", 1, 1)], max_epochs=3
    )
    trainer.fit(fresh(), loader())
    with pytest.raises(
        ConfigurationError, match=f"in the middle of an epoch in mode='{then}', and mode='{now}' cannot"
    ):
        quiet_trainer(callbacks=[SparseSelectionCallback(mode=now), schedule], max_epochs=3).fit(
            fresh(), loader(), ckpt_path=path
        )


@pytest.mark.parametrize("mode", [*BATCH_MODES, "prune"])
def test_a_checkpoint_to_test_with_changes_nothing(tmp_path: Path, mode: str) -> None:
    class Net(Cycle):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", float(len(batch[0])))

    path = tmp_path / "run.ckpt"
    schedule = TwoStageScheduler(warmup_epochs=1)
    other = SparseSelectionCallback(mode=mode)
    quiet_trainer(callbacks=[other, schedule, SaveAt(path, "epoch end", 0)], max_epochs=2).fit(fresh(Net), loader())
    callback = SparseSelectionCallback(mode=mode)
    trainer = quiet_trainer(callbacks=[callback, schedule], max_epochs=3)
    module = fresh(Net)
    trainer.fit(module, loader())
    parts = ("selector", "ledger", "quarantine")
    before = {part: callback.state_dict()[part] for part in parts}
    scores = callback.state_dict()["epochs"]["history"] if mode == "prune" else None
    trainer.test(module, loader(), ckpt_path=path, verbose=False)
    assert_same(before, {part: callback.state_dict()[part] for part in parts})
    if scores is not None:
        assert_same(scores, callback.state_dict()["epochs"]["history"])
