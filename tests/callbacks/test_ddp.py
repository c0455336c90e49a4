"""Two real processes (gloo): ranks that keep different numbers of samples weight every selected sample alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from lightning_ast import PIController, SparseSelectionCallback
from tests.conftest import PlainNet, gloo, loader, quiet_trainer, weights


class Record(pl.Callback):
    """Writes what each rank kept and ended with."""

    def __init__(self, folder: Path, selection: SparseSelectionCallback) -> None:
        self.folder, self.selection, self.kept, self.batches = folder, selection, [], []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.kept.append(self.selection._fit.step.plan.selection.indices)
        if trainer.global_step == 0 and len(self.kept) == 1:
            self.gradients = [p.grad.clone() for p in pl_module.parameters()]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(
            {"kept": self.kept, "batch": self.batches[0], "weights": weights(pl_module), "gradients": self.gradients},
            self.folder / f"rank{trainer.global_rank}.pt",
        )


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_equal_one_process_on_the_union(digits: Any, tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    module = PlainNet(dropout=0.0, batchnorm=False)
    reference = PlainNet(dropout=0.0, batchnorm=False)
    reference.load_state_dict(module.state_dict())
    cut = F.cross_entropy(reference(digits[0]), digits[1], reduction="none").median().item()
    fixed = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=cut)
    selection = SparseSelectionCallback(mode=mode, gate="threshold", significance="loss", controller=fixed)
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[selection, Record(tmp_path, selection)],
        max_steps=2,
    )
    trainer.fit(module, loader(digits, batch_size=64))

    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1)]
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(tensor, ranks[1]["weights"][name]), f"the ranks agree on {name}"
    x, y = (torch.cat([ranks[r]["batch"][part] for r in (0, 1)]) for part in (0, 1))
    losses = F.cross_entropy(reference(x), y, reduction="none")
    kept = losses > cut
    counts = [int(rows.sum()) for rows in kept.split(64)]
    assert [len(ranks[r]["kept"][0]) for r in (0, 1)] == counts
    assert counts[0] != counts[1], "the ranks keep different numbers: the test can fail"
    expected = torch.autograd.grad(losses[kept].mean(), list(reference.parameters()))
    for got, want in zip(ranks[0]["gradients"], expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
