"""chemprop: an unmodified LightningModule on batches of graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ast import SparseLossMixin
from tests.third_party.outcomes import Outcome
from tests.third_party.trained import MODES, Case, check_outcome, check_same_gradients, check_trained, rows

pytest.importorskip("chemprop")
from chemprop import data, models, nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]

SMILES = ["C" * n + tail for n in range(1, 17) for tail in ("O", "N", "C(=O)O", "c1ccccc1", "Cl", "Br", "F", "S")]


def molecules() -> Any:
    points = [data.MoleculeDatapoint.from_smi(s, [float(len(s)) / 10]) for s in SMILES]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=32)


def mpnn(**options: Any) -> Any:
    return models.MPNN(
        nn.BondMessagePassing(d_h=16), nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=16), **options
    )


CASES = {"MPNN": Case(mpnn, molecules)}


@rows("chemprop")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)


class ExplicitMPNN(SparseLossMixin, models.MPNN):
    def count_samples(self, batch: Any) -> int:
        return len(batch.bmg)

    def select_batch(self, batch: Any, indices: Tensor) -> Any:
        """The molecules' atoms and bonds, counted anew."""
        whole, part = batch.bmg, copy.copy(batch.bmg)
        keep = torch.zeros(len(batch.Y), dtype=torch.bool)
        keep[indices] = True
        atoms = keep[whole.batch]
        bonds = atoms[whole.edge_index[0]]
        part.V, part.E = whole.V[atoms], whole.E[bonds]
        part.edge_index = (atoms.cumsum(0) - 1)[whole.edge_index[:, bonds]]
        part.rev_edge_index = (bonds.cumsum(0) - 1)[whole.rev_edge_index[bonds]]
        part.batch = (keep.cumsum(0) - 1)[whole.batch[atoms]]
        rows = {name: value[keep] for name, value in batch._asdict().items() if isinstance(value, Tensor)}
        return batch._replace(bmg=part, **rows)

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        predicted = self.predictor.train_step(self.fingerprint(batch.bmg, batch.V_d, batch.X_d))
        return (predicted - batch.Y).square().mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch, batch_idx).mean()


def explicit() -> Any:
    passing = nn.BondMessagePassing(d_h=16)
    return ExplicitMPNN(passing, nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=16))


REMEDIES = {"MPNN": Case(explicit, molecules)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("module", sorted(REMEDIES))
def test_the_remedy_that_the_refusal_names_works(module: str, mode: str) -> None:
    check_trained(REMEDIES[module], mode)
    if mode in ("subset", "partial"):
        check_same_gradients(REMEDIES[module], mode)
