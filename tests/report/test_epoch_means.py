"""What stands behind a point of the loss by epoch: the whole epoch, or the steps that were logged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.report import Run, read_runs
from lightning_ast.report.comparison import comparison
from lightning_ast.report.derive import EpochMeans, behind_each, clip_to_training, epoch_means, training_loss_tag
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


def only(run: Run, kind: str) -> EpochMeans:
    tags = [tag for tag in run.scalars if tag.startswith(f"{kind}/")]
    found = epoch_means(run, training_loss_tag(tags))
    assert found is not None
    assert found.means.epochs.tolist() == [0, 1, 2]
    return found


@pytest.mark.parametrize("kind", ["both", "epochs"])
def test_the_mean_of_the_whole_epoch_is_taken_where_it_was_logged(run: Run, kind: str) -> None:
    found = only(run, kind)
    assert found.means.values.tolist() == [3.0, 10.0, 17.0]
    assert found.logged is behind_each(found) is None


def test_of_steps_alone_it_is_known_how_many_there_are(run: Run) -> None:
    found = only(run, "steps")
    assert found.means.values.tolist() == [4.0, 9.0, 16.5]
    assert found.logged is not None
    assert found.logged.tolist() == [1, 1, 2]
    assert behind_each(found) == "mean of 1 to 2 logged steps an epoch"


def test_what_is_logged_once_an_epoch_and_nothing_else_may_be_a_step() -> None:
    ends = [(2, 4.0), (5, 2.0), (8, 1.0)]
    found = epoch_means(made({"epoch": [(2, 0), (5, 1), (8, 2)], "train_loss": ends}), "train_loss")
    assert found is not None
    assert behind_each(found) == "one value an epoch, at its last step"
    with_steps = epoch_means(
        made({"epoch": EPOCH, "ast/stage": [(s, 1) for s, _ in EPOCH], "train_loss": ends}), "train_loss"
    )
    assert with_steps is not None
    assert behind_each(with_steps) is None
    # the last values that a callback writes when the run ends are no steps inside an epoch
    closed = made(
        {"epoch": [(2, 0), (5, 1), (8, 2)], "ast/stage": [(2, 1), (5, 1), (8, 1), (9, 1)], "train_loss": ends}
    )
    found = epoch_means(closed, "train_loss")
    assert found is not None
    assert found.logged is not None


def test_a_validation_inside_the_epoch_does_not_make_a_step_a_mean() -> None:
    run = made({"epoch": EPOCH, "val_loss": [(1, 0.1), (4, 0.1)], "train_loss": [(2, 4.0), (5, 2.0), (8, 1.0)]})
    found = epoch_means(run, "train_loss")
    assert found is not None
    assert behind_each(found) == "one value an epoch, at its last step"


def test_values_that_are_not_finite_are_not_behind_a_mean() -> None:
    run = made({"epoch": EPOCH, "loss": [(0, 1), (1, 2), (2, float("nan")), (4, 7)]})
    found = epoch_means(run, "loss")
    assert found is not None
    assert found.logged is not None
    assert (found.means.values.tolist(), found.logged.tolist()) == ([1.5, 7.0], [2, 1])
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
    three = made({"epoch": EPOCH, "train_loss": steps}, name="three")
    varies = made({"epoch": EPOCH, "train_loss": steps[:4]}, name="varies")
    without = made({"epoch": EPOCH, "val_loss": steps}, name="without")
    assert loss_panel(whole, whole) == ("Training loss by epoch (means)", "")
    title, below = loss_panel(whole, three, varies, without)
    assert title == "Training loss by epoch"
    for words in (
        "mean of 3 logged steps an epoch: three",
        "mean of 1 to 3 logged steps an epoch: varies",
        "not known of without",
    ):
        assert words in below
    assert "whole" not in below
    many = [
        replace(varies, name=str(n), scalars={**varies.scalars, "train_loss": made({"a": steps[: n + 1]}).scalars["a"]})
        for n in range(4)
    ]
    assert "not of whole epochs, but of the steps that were logged: 0, 1, 2 and 1 more" in loss_panel(*many)[1]
