"""scvi-tools: its training plans are LightningModules; their loss is an ELBO written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import (
    Case,
    check_outcome,
    rows,
)

scvi = pytest.importorskip("scvi")
from scvi.dataloaders import AnnDataLoader  # noqa: E402
from scvi.train import SemiSupervisedTrainingPlan, TrainingPlan  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]


def cells(kind: Any, **options: Any) -> Any:
    scvi.settings.seed = 0
    adata = scvi.data.synthetic_iid(batch_size=128, n_genes=30, generate_coordinates=False)
    kind.setup_anndata(adata, **options)
    return adata


def scvi_model() -> Any:
    return scvi.model.SCVI(cells(scvi.model.SCVI, batch_key="batch"), n_hidden=16, n_latent=4, dropout_rate=0.0)


def scanvi_model() -> Any:
    kind = scvi.model.SCANVI
    adata = cells(kind, labels_key="labels", unlabeled_category="unknown", batch_key="batch")
    return kind(adata, n_hidden=16, n_latent=4, dropout_rate=0.0)


def scanvi_plan() -> Any:
    model = scanvi_model()
    return SemiSupervisedTrainingPlan(model.module, n_classes=model.summary_stats.n_labels - 1)


def loader_of(model: Any) -> Any:
    return AnnDataLoader(model.adata_manager, batch_size=32, shuffle=True)


def labelled(model: Any) -> Any:
    from scvi.dataloaders import ConcatDataLoader

    every = list(range(model.adata.n_obs))
    return ConcatDataLoader(model.adata_manager, [every, every], batch_size=32, shuffle=True)


CASES = {
    "SCVI TrainingPlan": Case(lambda: TrainingPlan(scvi_model().module), lambda: loader_of(scvi_model())),
    "SCANVI SemiSupervisedTrainingPlan": Case(scanvi_plan, lambda: labelled(scanvi_model())),
}


@rows("scvi-tools")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
