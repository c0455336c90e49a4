"""The recipes for segmentation and detection: they run, tiny, and their figures are right."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from lightning_ast.demo.data import Images, load_images
from lightning_ast.recipes import make_scenes
from tests.helpers.recipes import recipe

SMALL = {"runs": {"epochs": 3}, "TRAIN_IMAGES": 48, "TEST_IMAGES": 8}


@pytest.fixture(scope="module")
def digits() -> Images:
    """Real digits in place of clothes: no data set needs to be installed."""
    images = load_images("digits")
    larger = F.interpolate(images.train_images.float(), size=(28, 28)).byte()
    return Images(larger, images.train_labels, larger, images.train_labels)


def test_scenes_know_their_masks_and_boxes(digits: Images) -> None:
    for scene in make_scenes(digits.train_images, digits.train_labels, count=20, seed=0, most_objects=1):
        rows, columns = scene.mask.nonzero(as_tuple=True)
        sides = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert scene.boxes.tolist() == [[float(side) for side in sides]]
        assert scene.mask.unique().tolist() == [0, 1 + int(scene.labels[0])]
        assert scene.image.max() > 0.9


def test_the_same_seed_makes_the_same_scenes(digits: Images) -> None:
    first, again, other = (make_scenes(*digits[:2], count=3, seed=seed) for seed in (1, 1, 2))
    assert all((a.image == b.image).all() for a, b in zip(first, again))
    assert not (first[0].image == other[0].image).all()


@pytest.fixture
def segmentation(digits: Images, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = recipe("dense_prediction/segmentation", monkeypatch, load_images=lambda *_: digits, **SMALL)
    monkeypatch.setattr(module, "UNet", lambda net=module.UNet: net(width=4))
    return module


@pytest.mark.parametrize("method", ["dense", "random", "ours"])
def test_segmentation_runs(segmentation: ModuleType, method: str) -> None:
    figures = segmentation.train(method)
    assert figures["work"] == 1 if method == "dense" else 0 < figures["work"] <= 1
    assert method != "random" or figures["work"] < 1
    assert 0 < figures["mean_iou"] < 1


def test_the_overlap_is_that_of_scikit_learn(segmentation: ModuleType) -> None:
    from sklearn.metrics import jaccard_score

    draw = torch.Generator().manual_seed(0)
    masks = torch.randint(segmentation.CLASSES, (4, 8, 8), generator=draw)
    guess = torch.where(torch.rand(masks.shape, generator=draw) < 0.5, masks, masks.flip(0))
    model = segmentation.Segmenter()
    model.net = torch.nn.Identity()
    model.test_step((F.one_hot(guess, segmentation.CLASSES).movedim(-1, 1), masks), 0)
    assert model.mean_overlap() == pytest.approx(jaccard_score(masks.flatten(), guess.flatten(), average="macro"))


def test_the_dice_loss_is_zero_for_a_perfect_answer(segmentation: ModuleType) -> None:
    masks = torch.arange(segmentation.CLASSES).repeat(2, 6, 1)
    sure = 100 * F.one_hot(masks, segmentation.CLASSES).movedim(-1, 1).float()
    assert segmentation.dice_loss(sure, masks) == pytest.approx(0, abs=1e-6)
    mirrored = segmentation.dice_loss(sure.flip(1), masks)
    assert mirrored == pytest.approx(0.8)  # one class of five is its own mirror image


@pytest.fixture
def detection(digits: Images, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = recipe("dense_prediction/detection", monkeypatch, load_images=lambda *_: digits, **SMALL)
    monkeypatch.setattr(module, "backbone", lambda make=module.backbone: make(width=8))
    return module


@pytest.mark.parametrize("method", ["dense", "random", "ours"])
def test_detection_runs(detection: ModuleType, method: str) -> None:
    figures = detection.train(method)
    assert figures["work"] == 1 if method == "dense" else 0 < figures["work"] <= 1
    assert 0 <= figures["f1_at_half_overlap"] <= 1


def test_a_run_can_be_cut_off_to_see_whether_it_works(detection: ModuleType) -> None:
    steps = []
    trainer_of = detection.RUNS.trainer

    class Recording(type(detection.RUNS)):  # type: ignore[misc]
        def trainer(self, *arguments: object, **options: object) -> object:
            steps.append(trainer_of(*arguments, **options))
            return steps[-1]

    detection.RUNS = Recording(**vars(detection.RUNS))
    detection.train("ours", max_steps=8)
    assert [trainer.global_step for trainer in steps] == [8]


def test_found_boxes_need_the_class_and_half_of_the_overlap(detection: ModuleType) -> None:
    model = detection.Detector()
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([1, 2])}
    boxes = torch.tensor([[0.0, 0, 10, 6], [20, 20, 30, 30], [20, 20, 30, 24], [0, 0, 10, 10]])
    given = {"boxes": boxes, "labels": torch.tensor([1, 3, 2, 1]), "scores": torch.tensor([0.9, 0.9, 0.9, 0.1])}
    model.model.forward = lambda images: [given]
    model.test_step(([None], [target]), 0)
    assert (model.found, model.boxes) == (1, 2 + 3)  # one of three sure detections, two true boxes
