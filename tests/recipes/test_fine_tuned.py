"""Images in folders and a pretrained network: what is loaded, what is trained, what is told when something is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import lightning.pytorch as pl
import pytest
import torch
from sklearn.metrics import recall_score, top_k_accuracy_score
from torch import nn
from torchvision.models import get_model

from lightning_ast import SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.errors import DataNotFoundError, WeightsNotFoundError
from lightning_ast.recipes import FineTunedClassifier, ImageFolderDataModule, with_new_head
from tests.helpers.training import quiet_trainer

FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11", "vit_b_16", "wide_resnet50_2",
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(get_model("resnet18").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(folders: Path, weights: Path) -> tuple[pl.Trainer, FineTunedClassifier, str]:
    """A sparse run of three epochs from a file of weights, and what it printed."""
    import contextlib
    import io

    pl.seed_everything(0, verbose=False)
    module = FineTunedClassifier("resnet18", str(weights), num_classes=10, lr=0.02, second_lr=0.01, second_stage=1)
    data = ImageFolderDataModule(str(folders), image_size=32, batch_size=16, num_workers=0)
    selection = SparseSelectionCallback(mode="prune", target_coverage=0.5)
    stages = TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1)
    monitor = SparseTrainingMonitor(metrics=["val_top5", "ast/coverage"], details=True)
    trainer = quiet_trainer(max_epochs=3, callbacks=[selection, stages, monitor])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        trainer.fit(module, datamodule=data)
    return trainer, module, shown.getvalue()


def test_only_some_samples_are_trained_on_and_all_are_offered(run: Any) -> None:
    trainer, _, _ = run
    ledger = next(each.ledger for each in trainer.callbacks if isinstance(each, SparseSelectionCallback))
    assert ledger.offered == 3 * 64
    assert 2 * 64 < ledger.selected < 3 * 64


def test_the_line_and_the_report_hold_what_the_original_tracks(run: Any) -> None:
    lines = run[2].splitlines()
    epochs = [line for line in lines if line.startswith("Epoch ")]
    assert len(epochs) == 3
    for name in ("Loss", "Val Acc", "Act", "Skipped", "FLOPs saved", "val_top5", "ast/coverage", "Time"):
        assert all(f"| {name}: " in line for line in epochs), f"{name} is not in {epochs}"
    assert any(line.startswith("  convergence  90% of the best in epoch ") for line in lines)
    (last,) = [line for line in lines if line.startswith("  last epoch   ")]
    assert all(f"{name}: " in last for name in ("val_top5", "ast/coverage", "Time"))
    assert last.split("  last epoch   ")[1] in epochs[-1]
    (by_class,) = [line for line in lines if line.startswith("accuracy by class: ")]
    assert by_class.count("class_") == 10


def test_the_metrics_are_those_of_scikit_learn(run: Any) -> None:
    trainer, module, _ = run
    data = trainer.datamodule
    module.eval()
    with torch.no_grad():
        batches = [(module(images), labels) for images, labels in data.val_dataloader()]
    scores = torch.cat([each[0] for each in batches]).softmax(1).numpy()
    labels = torch.cat([each[1] for each in batches]).numpy()
    recalls = recall_score(labels, scores.argmax(1), labels=range(10), average=None, zero_division=0)
    assert list(module.class_accuracies) == data.classes
    assert list(module.class_accuracies.values()) == pytest.approx(recalls)
    metrics = trainer.callback_metrics
    assert float(metrics["val_acc_worst_class"]) == pytest.approx(recalls.min())
    assert float(metrics["val_acc_of/class_3"]) == pytest.approx(recalls[3])
    assert float(metrics["val_top5"]) == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(10)))


def test_a_test_gives_what_a_validation_gives(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, module, _ = run
    validated = {name.removeprefix("val_"): value for name, value in trainer.callback_metrics.items() if "val_" in name}
    other = quiet_trainer(enable_progress_bar=False)
    (tested,) = other.test(module, datamodule=trainer.datamodule, verbose=False)
    assert set(tested) == {f"test_{name}" for name in validated}
    assert tested == pytest.approx({f"test_{name}": float(value) for name, value in validated.items()}, abs=1e-5)
    assert capsys.readouterr().out.count("class_") == 10


@pytest.mark.parametrize("wrong", [4, 100])
def test_another_number_of_classes_is_refused_before_the_first_batch(folders: Path, wrong: int) -> None:
    data = ImageFolderDataModule(str(folders), image_size=32, batch_size=16, num_workers=0)
    module = FineTunedClassifier("squeezenet1_1", weights=None, num_classes=wrong)
    with pytest.raises(
        ValueError, match=rf"number of classes of the data, 10, got {wrong}: pass --model.init_args.num_"
    ):
        quiet_trainer().fit(module, datamodule=data)


def test_a_folder_without_a_whole_batch_is_refused(folders: Path) -> None:
    data = ImageFolderDataModule(str(folders), batch_size=65, num_workers=0)
    with pytest.raises(DataNotFoundError, match=r"one batch of 65 training images in .*/train, got 64: pass a smaller"):
        data.setup("fit")


def test_two_stages_have_two_learning_rates(run: Any) -> None:
    trainer, _, _ = run
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.02]


def test_the_weights_are_those_of_the_file(weights: Path) -> None:
    module = FineTunedClassifier("resnet18", str(weights), num_classes=10)
    stored = torch.load(weights, weights_only=True)
    assert torch.equal(module.net.conv1.weight, stored["conv1.weight"])
    assert module.net.fc.out_features == 10
    whole = FineTunedClassifier("resnet18", str(weights), num_classes=1000)
    assert torch.equal(whole.net.fc.weight, stored["fc.weight"]), "of ImageNet itself the last layer is wanted too"
    fresh = FineTunedClassifier("resnet18", str(weights), num_classes=1000, fresh_head=True)
    assert not torch.equal(fresh.net.fc.weight, stored["fc.weight"])


@pytest.mark.parametrize("name", FAMILIES)
def test_any_network_of_torchvision_gets_a_new_head(name: str) -> None:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNets compute their widths with tensors
        net = with_new_head(get_model(name, **options), 7)
        module = FineTunedClassifier(nn.Sequential(nn.Linear(1, 1000)), weights=None, num_classes=7)
        module.net = net
        pixels = 299 if name == "inception_v3" else 224
        assert module(torch.empty(2, 3, pixels, pixels)).shape == (2, 7)


def test_a_network_without_such_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a layer with 1000 outputs to replace, found none in Sequential"):
        FineTunedClassifier(nn.Sequential(nn.Linear(4, 10)), weights=None)


def test_a_failed_download_tells_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    wanted = r"no route to host(.|\n)*resnet18-f37072fd.pth(.|\n)*checkpoints(.|\n)*FILE.pth(.|\n)*weights null"
    with pytest.raises(WeightsNotFoundError, match=wanted):
        FineTunedClassifier("resnet18", "DEFAULT", num_classes=10)


def test_weights_that_cannot_be_used_are_named(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"there is no absent\.pth"):
        FineTunedClassifier("resnet18", "absent.pth")
    with pytest.raises(WeightsNotFoundError, match=r"does not hold the weights of torchvision's resnet34"):
        FineTunedClassifier("resnet34", str(weights))
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsNotFoundError, match="does not hold the weights"):
        FineTunedClassifier("resnet18", str(tmp_path / "damaged.pth"))
    with pytest.raises(WeightsNotFoundError, match=r"expected one of IMAGENET1K_V1, .*got 'V7' for resnet18"):
        FineTunedClassifier("resnet18", "V7")


def test_folders_that_are_missing_are_named(tmp_path: Path, folders: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"train/<class>/(.|\n)*--data.init_args.root FOLDER"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")
    (tmp_path / "train").symlink_to(folders / "train")
    (tmp_path / "val" / "class_0").mkdir(parents=True)
    image = next((folders / "val" / "class_0").iterdir())
    (tmp_path / "val" / "class_0" / image.name).symlink_to(image)
    with pytest.raises(DataNotFoundError, match="the same classes"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


def test_training_images_differ_from_time_to_time_and_validation_images_do_not(folders: Path) -> None:
    data = ImageFolderDataModule(str(folders), image_size=32, num_workers=0)
    data.setup("fit")
    (train, _), (val, _) = data._train[0], data._val[0]
    assert train.shape == val.shape == (3, 32, 32)
    assert not torch.equal(data._train[0][0], data._train[0][0])
    assert torch.equal(val, data._val[0][0])
