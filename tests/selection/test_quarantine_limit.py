"""How many samples may be left out, what is saved and said of them, and what the processes agree on."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import QuarantineError
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import BATCH_MODES, SaveAt, fit, gloo, quiet_trainer, weights
from tests.selection.bad_samples import BadLoss, finite, marked, spoiled

pytestmark = pytest.mark.filterwarnings(
    "ignore:lightning-ast. NaN or infinity",
    "ignore:lightning-ast. the run ended after",  # within the warmup
)


@pytest.mark.parametrize("mode", [*BATCH_MODES, "prune"])
def test_more_than_the_limit_stops_the_run(digits: Digits, mode: str) -> None:
    bad = [1, 65, 130, 195, 260, 325, 390]
    callback = SparseSelectionCallback(mode=mode)
    with pytest.raises(QuarantineError) as error:
        fit(fresh(), loader(spoiled(digits, where=bad)), callback, TwoStageScheduler(warmup_epochs=1), max_epochs=2)
    assert "6 samples of epoch 0, more than quarantine_limit=0.01 of its 512" in str(error.value)
    assert ("dataset index 1, 65, 130" if mode == "prune" else "(batch 0, position 1), (batch 1, position 1)") in str(
        error.value
    )
    assert "quarantine_limit=None" in str(error.value)


def test_a_limit_of_zero_and_one(digits: Digits) -> None:
    with pytest.raises(QuarantineError, match="1 sample of"):
        fit(fresh(), loader(spoiled(digits)), SparseSelectionCallback(quarantine_limit=0))
    module = fresh()
    fit(module, loader(spoiled(digits, where=list(range(0, 512, 2)))), SparseSelectionCallback(quarantine_limit=1.0))
    assert finite(module)


def test_a_diverged_model_is_told_so(digits: Digits) -> None:
    class Net(PlainNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e30)

    with pytest.raises(QuarantineError, match="the model has diverged: lower the learning rate"):
        fit(fresh(Net, batchnorm=False), loader(digits), SparseSelectionCallback(), max_epochs=3)


def test_state_of_the_quarantine_is_saved(digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"

    counts = []
    for ckpt_path, callbacks in ((None, [SaveAt(path, "batch end", 0, 2)]), (path, [])):
        callback = SparseSelectionCallback()
        trainer = quiet_trainer(callbacks=[callback, *callbacks], max_epochs=1, log_every_n_steps=1)
        trainer.fit(fresh(), loader(spoiled(digits)), ckpt_path=ckpt_path)
        counts.append([len(callback.quarantined), int(trainer.callback_metrics["ast/quarantined"])])
    assert counts == [[3, 3], [5, 5]], "two before the checkpoint; Lightning starts a plain loader anew for the rest"


class Alternating(pl.LightningDataModule):
    """Two ranks take turns, in the order of the data."""

    def __init__(self, digits: Digits) -> None:
        super().__init__()
        self.digits = digits

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = DistributedSampler(range(512), num_replicas=2, rank=self.trainer.global_rank, shuffle=False)
        return loader(self.digits, batch_size=32, sampler=sampler)


class Ends(pl.Callback):
    """Writes down what each rank ended with."""

    def __init__(self, folder: Path, callback: SparseSelectionCallback) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = [(s.epoch, s.batch, s.position) for s in self.callback.quarantined]
        torch.save({"weights": weights(pl_module), "found": found}, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize(
    ("mode", "stage", "where"),
    [
        # every pair of two of them
        ("mask", "warmup", "a whole batch"),
        ("mask", "sparse", "one rank"),
        ("subset", "warmup", "one rank"),
        ("subset", "sparse", "a whole batch"),
        ("partial", "warmup", "one rank"),
        ("partial", "sparse", "a whole batch"),
        ("partial", "sparse", "one rank"),
        ("prune", "warmup", "a whole batch"),
        ("prune", "sparse", "one rank"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_stay_in_step(digits: Digits, tmp_path: Path, mode: str, stage: str, where: str) -> None:
    """Bad samples in one rank alone: nobody waits for ever, and the ranks agree on finite weights."""
    bad = [0, 2, 130] if where == "one rank" else list(range(0, 64, 2))  # rank 0 has the even samples
    module = fresh(dropout=0.0)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.5)
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[callback, TwoStageScheduler(warmup_epochs=2 if stage == "warmup" else 1), Ends(tmp_path, callback)],
        max_epochs=3 if stage == "warmup" else 2,
    )
    trainer.fit(module, Alternating(spoiled(digits, where=bad)))
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in (0, 1)]
    for name, value in ranks[0]["weights"].items():
        assert "running" in name or torch.equal(value, ranks[1]["weights"][name]), name
        assert value.isfinite().all(), name
    assert ranks[1]["found"] == []
    assert len([f for f in ranks[0]["found"] if f[0] == 0]) == len(bad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_limit_holds_over_all_ranks(digits: Digits) -> None:
    """Twelve of 512, all of them in one rank: both stop at the end of the epoch."""
    callback = SparseSelectionCallback()
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[callback],
    )
    with pytest.raises(
        ProcessRaisedException, match=r"12 samples of epoch 0, more than quarantine_limit=0.01 of its 512"
    ):
        trainer.fit(fresh(), loader(spoiled(digits, where=list(range(0, 480, 40))), batch_size=32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_rank_that_logs_over_all_ranks_does_not_wait_for_ever(digits: Digits, tmp_path: Path) -> None:
    class Net(BadLoss):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores, y = self.losses(batch)
            loss = F.cross_entropy(scores, y)
            self.log("loss", loss, on_step=True, sync_dist=True)
            return loss

    module, callback = fresh(Net, dropout=0.0), SparseSelectionCallback(quarantine_limit=0.5)
    trainer = quiet_trainer(
        devices=2,
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60)),
        callbacks=[callback, TwoStageScheduler(warmup_epochs=1), Ends(tmp_path, callback)],
        max_epochs=2,
    )
    trainer.fit(module, Alternating(marked(digits, [64, 66, 130])))
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in (0, 1)]
    for name, value in ranks[0]["weights"].items():
        assert "running" in name or torch.equal(value, ranks[1]["weights"][name]), name
