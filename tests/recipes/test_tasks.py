"""The recipes for regression, two heads, distillation and behaviour cloning: they run, tiny, and measure rightly."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_ast.demo.data import Images, load_images
from tests.helpers.recipes import recipe


@pytest.fixture(scope="module")
def digits() -> Images:
    """Real digits in place of clothes: no data set needs to be installed."""
    images = load_images("digits")
    larger = F.interpolate(images.train_images.float(), size=(28, 28)).byte()
    return Images(larger[:256], images.train_labels[:256], larger[256:356], images.train_labels[256:356])


def is_right_work(method: str, work: float) -> bool:
    return work == 1 if method == "dense" else 0 < work <= 1


@pytest.mark.parametrize("method", ["dense", "shortened", "random", "ours"])
def test_regression_runs(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    regression = recipe("tasks/regression", monkeypatch, runs={"epochs": 6})
    figures = regression.train(method)
    assert is_right_work(method, figures["work"])
    assert 0.1 < figures["explained_variance"] < 0.7  # 0 is the mean of all patients


@pytest.mark.parametrize("method", ["dense", "ours"])
def test_two_heads_run(method: str, monkeypatch: pytest.MonkeyPatch, digits: Images) -> None:
    sizes = {"runs": {"epochs": 3}, "TRAIN_IMAGES": 128, "TEST_IMAGES": 50}
    two_heads = recipe("tasks/two_heads", monkeypatch, load_images=lambda *_: digits, **sizes)
    figures = two_heads.train(method)
    assert is_right_work(method, figures["work"])
    assert 0 <= figures["accuracy"] <= 1
    assert 0 < figures["error_in_pixels"] < 24


def test_the_place_is_the_middle_of_the_box(monkeypatch: pytest.MonkeyPatch, digits: Images) -> None:
    two_heads = recipe("tasks/two_heads", monkeypatch)
    for image, _, middle in two_heads.samples(digits.train_images, digits.train_labels, 5, seed=0):
        rows, columns = (image[0] > 0.35).nonzero(as_tuple=True)  # above the noise
        found = torch.stack([columns.min() + columns.max() + 1, rows.min() + rows.max() + 1]) / 2 / two_heads.SIZE
        assert middle.tolist() == pytest.approx(found.tolist(), abs=0.06)  # dark pixels of a digit are its own too


@pytest.mark.parametrize("method", ["dense", "partial", "ours"])
def test_distillation_trains_the_student_alone(method: str, monkeypatch: pytest.MonkeyPatch, digits: Images) -> None:
    monkeypatch.setattr("lightning_ast.demo.data.load_images", lambda *_: digits)
    distillation = recipe("tasks/distillation", monkeypatch, runs={"epochs": 3}, TEACHER_EPOCHS=1, IMAGES=256)
    teacher = distillation.trained_teacher(0, "data")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    # all but the student's share of a step is the teacher's forward, which partial cannot save
    warns = pytest.warns(
        UserWarning, match="mode='partial'.* the forward is 9.% of a dense step .*mode='prune' would cost"
    )
    with warns if method == "partial" else nullcontext():
        figures = distillation.train(method)
    assert all((value == before[name]).all() for name, value in teacher.state_dict().items())  # BatchNorm's too
    assert is_right_work(method, figures["work"])
    assert 0 <= figures["test_accuracy"] <= 1


@pytest.fixture
def cloning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("gymnasium")
    return recipe("tasks/behaviour_cloning", monkeypatch, runs={"epochs": 3}, DEMONSTRATIONS=2, ROLLOUTS=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "ours"])
def test_behaviour_cloning_runs(method: str, cloning: ModuleType) -> None:
    figures = cloning.train(method)
    assert is_right_work(method, figures["work"])
    assert figures["success"] in (0, 0.5, 1)


@pytest.mark.slow
def test_the_expert_balances_the_pole_and_a_fixed_push_does_not(cloning: ModuleType) -> None:
    states, actions, stood = cloning.rollout(cloning.expert, 0)
    assert (len(states), len(actions), stood) == (500, 500, True)

    def push(state: Any) -> int:
        return 1

    states, _, stood = cloning.rollout(push, 0)
    assert len(states) < 30
    assert not stood
