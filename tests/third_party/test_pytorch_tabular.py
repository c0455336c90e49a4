"""pytorch-tabular: unmodified LightningModules, made by its TabularModel."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, rows

pytest.importorskip("pytorch_tabular")
pandas = pytest.importorskip("pandas")
pytorch_lightning = pytest.importorskip("pytorch_lightning")
from pytorch_tabular import TabularModel  # noqa: E402
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig  # noqa: E402
from pytorch_tabular.models import CategoryEmbeddingModelConfig, FTTransformerConfig  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
    pytest.mark.filterwarnings("ignore:You called `self.log"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def frame() -> Any:
    rng = np.random.default_rng(0)
    table = pandas.DataFrame(rng.normal(size=(512, 4)), columns=list("abcd"))
    table["kind"] = rng.choice(["x", "y", "z"], 512)
    table["target"] = (table["a"] + table["b"] > 0).astype(int)
    table["other"] = table["c"] * 2
    return table


@functools.cache
def made(config: Any, task: str, *targets: str) -> Any:
    kinds = {"embedding": (CategoryEmbeddingModelConfig, {"layers": "16-8"}),
             "ft": (FTTransformerConfig, {"num_heads": 2, "num_attn_blocks": 1, "input_embed_dim": 8,
                                          "attn_dropout": 0.0, "add_norm_dropout": 0.0, "ff_dropout": 0.0})}  # fmt: skip
    kind, options = kinds[config]
    model = TabularModel(
        data_config=DataConfig(target=list(targets), continuous_cols=list("abd"), categorical_cols=["kind"]),
        model_config=kind(task=task, **options),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=32, accelerator="cpu", progress_bar="none"),
        verbose=False,
        suppress_lightning_logger=True,
    )
    return model, model.prepare_dataloader(train=frame(), validation=frame()[:64], seed=0)


def case(*how: str) -> Case:
    def module() -> Any:
        model, data = made(*how)
        return model.prepare_model(data)

    def data() -> Any:
        return made(*how)[1].train_dataloader()

    return Case(module, data, trainer=pytorch_lightning.Trainer)


CASES = {
    "CategoryEmbeddingModel, classification": case("embedding", "classification", "target"),
    "CategoryEmbeddingModel, regression": case("embedding", "regression", "other"),
    "CategoryEmbeddingModel, two targets": case("embedding", "regression", "other", "a"),
    "FTTransformerModel": case("ft", "classification", "target"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes a folder of its own where it runs."""
    monkeypatch.chdir(tmp_path)


@rows("pytorch-tabular")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
