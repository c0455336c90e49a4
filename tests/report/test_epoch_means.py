"""What stands behind a point of the loss by epoch: the whole epoch, or the steps that were logged."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.report import Run, read_runs
from lightning_ast.report.comparison import comparison
from lightning_ast.report.derive import clip_to_training, epoch_means, training_loss_tag
from lightning_ast.report.style import GREY
from tests.helpers.modules import Trained
from tests.helpers.training import quiet_trainer
from tests.report.conftest import made

EPOCH = [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (8, 2)]


class Losses(Trained):
    """Its loss is the number of the step, so that every mean is known; logged in each way there is."""

    lr = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.weight * 0 + self.global_step
        self.log("steps/train_loss", loss)
        self.log("both/train_loss", loss, on_step=True, on_epoch=True)
        self.log("epochs/train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.weight)


@pytest.fixture(scope="module", params=["TensorBoard", "CSV"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs of 7 steps, of which every fifth is logged: 4; 9; 14, 19."""
    folder = tmp_path_factory.mktemp("means")
    logger = CSVLogger(folder) if request.param == "CSV" else TensorBoardLogger(folder)
    data = DataLoader(TensorDataset(torch.zeros(7)))
    trainer = quiet_trainer(max_epochs=3, logger=logger, log_every_n_steps=5, limit_val_batches=1)
    trainer.fit(Losses(), data, data)
    return clip_to_training(read_runs([folder])[0])


@pytest.mark.parametrize(
    ("kind", "means", "whole"), [("both", [3.0, 10.0, 17.0], True), ("epochs", [3.0, 10.0, 17.0], False), ("steps", [4.0, 9.0, 16.5], False)]
)  # fmt: skip
def test_the_mean_of_the_whole_epoch_is_taken_where_it_was_logged(
    run: Run, kind: str, means: list[float], whole: bool
) -> None:
    tags = [tag for tag in run.scalars if tag.startswith(f"{kind}/")]
    found = epoch_means(run, training_loss_tag(tags))
    assert found is not None
    assert found[0].epochs.tolist() == [0, 1, 2]
    assert (found[0].values.tolist(), found[1]) == (means, whole)


def test_values_that_are_not_finite_are_not_behind_a_mean() -> None:
    run = made({"epoch": EPOCH, "loss": [(0, 1), (1, 2), (2, float("nan")), (4, 7)]})
    found = epoch_means(run, "loss")
    assert found is not None
    assert found[0].values.tolist() == [1.5, 7.0]
    assert epoch_means(run, None) is epoch_means(run, "nothing") is None


def loss_panel(*runs: Run) -> tuple[str, str]:
    axes = comparison(runs).axes[-1]
    texts = [text.get_text().replace("\n", " ") for text in axes.texts if text.get_color() == GREY]
    return axes.get_title(loc="left"), " ".join(texts)


def test_the_comparison_says_what_stands_behind_its_points() -> None:
    steps = [(step, 1.0) for step, _ in EPOCH]
    whole = made(
        {"epoch": EPOCH, "train_loss_step": steps, "train_loss_epoch": [(2, 4.0), (5, 2.0), (8, 1.0)]}, name="whole"
    )
    without = made({"epoch": EPOCH, "val_loss": steps}, name="without")
    logged = [made({"epoch": EPOCH, "train_loss": steps}, name=str(n)) for n in range(4)]
    assert loss_panel(whole, whole) == ("Training loss by epoch (means)", "")
    title, below = loss_panel(whole, *logged, without)
    assert title == "Training loss by epoch"
    assert below == "not known of without; mean of what was logged in an epoch: 0, 1, 2 and 1 more"
