"""Two real processes (gloo): ranks that keep different numbers of samples weight every selected sample alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast import PIController, SparseSelectionCallback
from tests.helpers.data import loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import gloo, quiet_trainer, weights


class Record(pl.Callback):
    """Writes what each rank kept and ended with."""

    def __init__(self, folder: Path, selection: SparseSelectionCallback) -> None:
        self.folder, self.selection, self.kept, self.batches = folder, selection, [], []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.gradients = [p.grad.clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, *_: Any) -> None:
        self.kept.append(self.selection.last_selection.indices)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(
            {"kept": self.kept, "batch": self.batches[0], "weights": weights(pl_module), "gradients": self.gradients},
            self.folder / f"rank{trainer.global_rank}.pt",
        )


class TwoHeads(PlainNet):
    """Two losses, one of them by hand, and a learned weight between them."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batchnorm=False)
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.side = nn.Linear(64, 1)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        side = (self.side(x.flatten(1)).squeeze(1) - y).abs()
        return F.cross_entropy(self(x), y, reduction="none") + self.weight * side

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        side = (self.side(x.flatten(1)).squeeze(1) - y).abs().mean()
        return F.cross_entropy(self(x), y) + self.weight * side


def norms(module: TwoHeads, x: Tensor, y: Tensor) -> Tensor:
    """The norm of each sample's gradient at the outputs of both heads."""
    with torch.no_grad():
        one = (module(x).softmax(1) - F.one_hot(y, 10)).norm(dim=1)
        return (one.square() + module.weight.square()).sqrt()


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_equal_one_process_on_the_union(digits: Any, tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    module, reference = TwoHeads(), TwoHeads()
    reference.load_state_dict(module.state_dict())
    cut = norms(reference, *digits).median().item()
    fixed = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=cut)
    selection = SparseSelectionCallback(mode=mode, gate="threshold", controller=fixed)
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
    kept = norms(reference, x, y) > cut
    counts = [int(rows.sum()) for rows in kept.split(64)]
    assert [len(ranks[r]["kept"][0]) for r in (0, 1)] == counts
    assert counts[0] != counts[1], "the ranks keep different numbers: the test can fail"
    network = [(n, p) for n, p in reference.named_parameters() if n != "weight"]  # the loss's own sees every sample
    expected = torch.autograd.grad(reference.losses(x, y)[kept].mean(), [p for _, p in network])
    got = dict(zip((name for name, _ in reference.named_parameters()), ranks[0]["gradients"], strict=True))
    for (name, _), want in zip(network, expected, strict=True):
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-6)
