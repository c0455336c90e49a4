"""The original's set-ups: each configuration runs, says what its row says, and the scripts train what they should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.recipes.configured import callbacks_of, configured, without_selection

pytestmark = pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden")  # as it is meant to be
FOLDER = Path(__file__).parent.parent.parent / "examples" / "original"
QUICK = (
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
)
ROWS = {  # name: epochs, warmup, target, threshold, kp, ki, EMA
    "cifar10_10": (40, 0, 0.10, 0.5, 0.0015, 0.00005, 0.3),
    "cifar10_6": (40, 0, 0.06, 0.5, 0.0008, 0.000002, 0.3),
    "laptop_3": (3, 0, 0.06, 0.5, 0.0008, 0.000002, 0.3),
    "laptop_10": (10, 0, 0.06, 0.5, 0.0008, 0.000002, 0.3),
    "imagenet100_production": (50, 10, 0.40, 3.0, 0.005, 0.0001, 0.1),
    "imagenet100_efficiency": (50, 10, 0.12, 3.0, 0.005, 0.0001, 0.1),
    "imagenet1k_conservative": (100, 10, 0.40, 3.0, 0.005, 0.0001, 0.1),
    "imagenet1k_aggressive": (50, 5, 0.30, 4.0, 0.008, 0.00015, 0.1),
    "imagenet1k_ultra": (30, 0, 0.20, 5.0, 0.010, 0.0002, 0.1),
}
IMAGENET = {  # name: precision, batch, micro-batches, learning rates, epochs between checkpoints, prefetched batches
    "imagenet100_production": ("16-mixed", 128, 1, 0.01, 0.005, 10, 2),
    "imagenet100_efficiency": ("32-true", 128, 1, 0.01, 0.005, 10, 2),
    "imagenet1k_conservative": ("16-mixed", 256, 1, 0.01, 0.005, 10, 2),
    "imagenet1k_aggressive": ("16-mixed", 256, 1, 0.02, 0.01, 5, 2),
    "imagenet1k_ultra": ("16-mixed", 256, 4, 0.015, 0.015, 3, 4),
}
SMALL = [name for name in ROWS if not name.startswith("imagenet")]
LARGE = [name for name in ROWS if name.startswith("imagenet")]
FORMS = ("original", "recommended")


def selection_of(trainer: Any) -> SparseSelectionCallback:
    return next(each for each in callbacks_of(trainer) if isinstance(each, SparseSelectionCallback))


def test_each_row_is_there_in_both_forms_and_nothing_else() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {f"{name}_{form}" for name in ROWS for form in FORMS}


@pytest.mark.parametrize("name", ROWS)
def test_the_settings_are_those_that_the_original_names(name: str) -> None:
    settings = yaml.safe_load((FOLDER / f"{name}_original.yaml").read_text())
    listed = {each["class_path"]: each.get("init_args", {}) for each in settings["trainer"]["callbacks"]}
    rule = listed["lightning_ast.recipes.OriginalRule"]
    read = (
        settings["trainer"]["max_epochs"],
        listed.get("TwoStageScheduler", {}).get("warmup_epochs", 0),
        rule["target_activation_rate"],
        *(rule[each] for each in ("initial_threshold", "kp", "ki", "ema_alpha")),
    )
    assert read == ROWS[name]
    assert rule["score"] == ("loss_entropy" if name in LARGE else "loss_intensity")
    assert rule.get("fallback") == (None if name in LARGE else "random")
    ours = yaml.safe_load((FOLDER / f"{name}_recommended.yaml").read_text())
    assert ours["trainer"]["max_epochs"] == settings["trainer"]["max_epochs"]
    assert ours["data"] == settings["data"]
    assert ours["trainer"].get("accumulate_grad_batches") == settings["trainer"].get("accumulate_grad_batches")


@pytest.mark.parametrize("name", IMAGENET)
def test_the_settings_on_imagenet_are_those_of_its_scripts(name: str) -> None:
    settings = yaml.safe_load((FOLDER / f"{name}_original.yaml").read_text())
    trainer, model, data = settings["trainer"], settings["model"]["init_args"], settings["data"]["init_args"]
    (saved,) = [each["init_args"] for each in trainer["callbacks"] if "every_n_epochs" in each.get("init_args", {})]
    read = (
        trainer.get("precision", "32-true"),
        data["batch_size"],
        trainer.get("accumulate_grad_batches", 1),
        model["lr"],
        model["second_lr"],
        saved["every_n_epochs"],
        data["prefetch_factor"],
    )
    assert read == IMAGENET[name]
    assert (trainer["gradient_clip_val"], data["num_workers"], data["image_size"]) == (1.0, 8, 224)
    assert (model["network"], model["weights"]) == ("resnet50", "IMAGENET1K_V1")
    assert model["num_classes"] == (1000 if "1k" in name else 100)
    assert model.get("fresh_head", False) == ("1k" in name)
    (rule,) = [each["init_args"] for each in trainer["callbacks"] if each["class_path"].endswith("OriginalRule")]
    assert rule.get("fallback", "largest") == "largest"


def test_what_the_page_says_of_the_weights_is_what_torchvision_says() -> None:
    from torchvision.models import ResNet50_Weights

    page = (FOLDER.parent.parent / "docs" / "recipes" / "original-set-ups.md").read_text()
    first, newest = (
        ResNet50_Weights[name].meta["_metrics"]["ImageNet-1K"]["acc@1"] for name in ("IMAGENET1K_V1", "DEFAULT")
    )
    assert f"ResNet-50 have {first:.1f} % on ImageNet-1K" in page
    assert f"weights with {newest:.1f} %" in " ".join(page.split())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_a_small_set_up_runs(name: str, form: str, tiny_cifar10: Path) -> None:
    trainer, model, data = configured(
        FOLDER / f"{name}_{form}.yaml",
        *QUICK,
        "--trainer.max_epochs=3",
        "--trainer.enable_checkpointing=false",
        "--model.init_args.width=4",
        f"--data.init_args.root={tiny_cifar10}",
        seed=0,
    )
    trainer.fit(model, datamodule=data)
    ledger = selection_of(trainer).ledger
    assert ledger.offered == 3 * 128
    assert 0 < ledger.selected <= ledger.offered
    assert float(trainer.callback_metrics["train_loss"]) < 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LARGE)
def test_a_large_set_up_runs_on_folders(
    name: str, form: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    warmup = min(1, ROWS[name][1])  # in place of ten epochs
    epochs = 3 if form == "recommended" else warmup + 1
    trainer, model, data = configured(
        FOLDER / f"{name}_{form}.yaml",
        *QUICK,
        f"--trainer.max_epochs={epochs}",
        "--trainer.limit_train_batches=1",
        f"--trainer.check_val_every_n_epoch={epochs}",
        "--trainer.limit_val_batches=1",
        "--model.init_args.network=squeezenet1_1",
        "--model.init_args.weights=null",
        "--model.init_args.num_classes=10",
        f"--data.init_args.root={folders}",
        "--data.init_args.image_size=32",
        "--data.init_args.batch_size=32",
        "--data.init_args.num_workers=0",
        seed=0,
    )
    if form == "original":
        assert model.second_stage == ROWS[name][1] or name == "imagenet1k_ultra"
        model.second_stage = warmup
        for each in callbacks_of(trainer):
            if isinstance(each, TwoStageScheduler):
                each.warmup_epochs = warmup
    trainer.fit(model, datamodule=data)
    ledger = selection_of(trainer).ledger
    assert ledger.stages["sparse"].offered == 32
    assert 0 < ledger.selected <= ledger.offered
    if form == "original":
        assert trainer.optimizers[0].param_groups[0]["lr"] == model.second_lr
    saved = {path.name.split("-")[0] for path in (tmp_path / "checkpoints").glob("*.ckpt")}
    assert saved == ({"best", "every"} if epochs % IMAGENET[name][5] == 0 else {"best"})


@pytest.mark.parametrize("method", ["dense", "original_10", "ours"])
def test_the_cifar10_script_trains_by_each_method(
    recipe: Callable[[str], ModuleType], method: str, tiny_cifar10: Path
) -> None:
    script = recipe("original/cifar10")
    assert method in get_args(script.Method)
    options = {"images": 128, "width": 4, "precision": "32-true", "root": str(tiny_cifar10)}
    figures = script.train(method, max_steps=8, **options)
    assert 0 <= figures["accuracy"] <= 1
    is_whole = method == "dense" or "original" in method
    assert figures["work"] == pytest.approx(1 if is_whole else figures["activation"], abs=1e-4)
    assert figures["formula"] == pytest.approx(0.99 * (1 - figures["activation"]), abs=1e-3)


def test_shortened_runs_cost_their_share(recipe: Callable[[str], ModuleType], tiny_cifar10: Path) -> None:
    script = recipe("original/cifar10")
    options = {"images": 64, "width": 4, "precision": "32-true", "root": str(tiny_cifar10)}
    assert script.train("tenth", **options)["work"] == pytest.approx(0.1)


@pytest.mark.parametrize("method", ["original_3", "ours_3", "ours_10", "shortened_10"])
def test_the_laptop_script_trains_by_each_method(
    recipe: Callable[[str], ModuleType], method: str, tiny_cifar10: Path
) -> None:
    script = recipe("original/laptop")
    assert method in get_args(script.Method)
    figures = script.train(method, max_steps=6, root=str(tiny_cifar10))
    assert 0 < figures["activation"] <= 1


def test_a_run_without_selection_is_dense(tiny_cifar10: Path) -> None:
    trainer, model, data = configured(
        FOLDER / "laptop_3_recommended.yaml",
        *QUICK,
        "--trainer.max_epochs=1",
        "--trainer.enable_checkpointing=false",
        "--model.init_args.width=4",
        f"--data.init_args.root={tiny_cifar10}",
        seed=3,
    )
    assert selection_of(trainer).seed == 3
    without_selection(trainer)
    trainer.fit(model, datamodule=data)
    assert selection_of(trainer).savings["flops"] == 0
