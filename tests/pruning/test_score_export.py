"""What a run remembers of each sample, written by the callback and by the command, and read again."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ast import SparseSelectionCallback
from tests.helpers.command import run
from tests.helpers.training import quiet_trainer
from tests.pruning.prune_by_hand import SIZE, Indexed, Witness, fit, fresh, loader, pruned

Run = tuple[Witness, SparseSelectionCallback, Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Epochs 0 and 3 are dense; the scores of the last three are kept."""
    folder = tmp_path_factory.mktemp("run")
    module, callback = fresh(), pruned(keep_scores=3)
    saved = ModelCheckpoint(folder, filename="run")
    fit(module, loader(), callback, saved, enable_checkpointing=True)
    callback.export_scores(folder / "scores.csv")
    return module, callback, folder


def read(path: Path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        names, *rows = csv.reader(file)
    return dict(zip(names, map(list, zip(*rows))))


def test_the_columns_are_what_the_run_saw(trained: Run) -> None:
    module, _, folder = trained
    table = read(folder / "scores.csv")
    epochs = [f"significance_epoch_{epoch}" for epoch in (1, 2, 3)]
    assert list(table) == ["index", "label", "times_selected", "significance", *epochs]
    assert [int(value) for value in table["index"]] == list(range(SIZE))
    assert [int(value) for value in table["label"]] == Indexed().y.tolist()
    seen = Counter(i for _, _, indices, _ in module.batches for i in indices)
    assert [int(value) for value in table["times_selected"]] == [seen[i] for i in range(SIZE)]
    for epoch in (1, 2, 3):
        errors = {i: e for number, _, indices, own in module.batches if number == epoch for i, e in zip(indices, own)}
        for index, value in enumerate(table[f"significance_epoch_{epoch}"]):
            assert (value == "") == (index not in errors)
            assert value == "" or float(value) == pytest.approx(errors[index], rel=1e-2, abs=1e-6)
    last = {i: e for _, _, indices, own in module.batches for i, e in zip(indices, own)}
    assert [float(value) for value in table["significance"]] == pytest.approx([last[i] for i in range(SIZE)], rel=1e-4)


def test_the_command_writes_the_same(trained: Run, tmp_path: Path) -> None:
    _, _, folder = trained
    done = run("export", str(folder / "run.ckpt"), "out.csv", cwd=tmp_path)
    assert done.out == "out.csv: 300 samples\n"
    ours, theirs = read(folder / "scores.csv"), read(tmp_path / "out.csv")
    assert ours == theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv"]


def test_parquet_holds_the_same(trained: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    _, callback, folder = trained
    callback.export_scores(tmp_path / "scores.parquet")
    table = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    for name, values in read(folder / "scores.csv").items():
        assert [None if value == "" else float(value) for value in values] == [
            None if value is None else pytest.approx(value, rel=1e-6) for value in table[name]
        ]
    module = fresh()
    fit(module, loader(), pruned(initial_scores=tmp_path / "scores.parquet", gate="topk"), warmup=0)
    scores = torch.tensor([float(value) for value in read(folder / "scores.csv")["significance"]])
    assert set(module.epochs()[0]) == set(scores.topk(120).indices.tolist())


def test_a_run_begins_with_the_scores_and_the_classes_of_another(trained: Run, tmp_path: Path) -> None:
    _, _, folder = trained
    lines = (folder / "scores.csv").read_text().splitlines()
    part = tmp_path / "scores.csv"
    last = lines[-2].split(",")
    last[1] = "nan"  # a class that is not known, as other tools write it
    part.write_text("\n".join([lines[0], ",".join(last), *reversed(lines[1:-2])]) + "\n\n")
    module = fresh()
    fit(module, loader(), pruned(initial_scores=part, gate="topk", class_floor=0.35), warmup=0)
    kept = module.epochs()[0]
    assert SIZE - 1 in kept, "it has no score: it counts as the most significant"
    labels = Indexed().y
    counts = labels[torch.tensor(kept)].bincount(minlength=10)
    others = labels[:-2].bincount(minlength=10)
    assert (counts >= 0.35 * others).all()


def test_what_is_not_kept_has_no_column(tmp_path: Path) -> None:
    callback = pruned()
    fit(fresh(), loader(), callback, max_epochs=3)
    callback.export_scores(tmp_path / "scores.csv")
    assert list(read(tmp_path / "scores.csv")) == ["index", "times_selected", "significance"]


def test_there_may_be_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only mode='prune' remembers"):
        SparseSelectionCallback(mode="prune").export_scores(tmp_path / "scores.csv")
    callback = SparseSelectionCallback(mode="mask", count_flops=False)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(fresh(), loader())
    with pytest.raises(ValueError, match="only mode='prune' remembers"):
        callback.export_scores(tmp_path / "scores.csv")
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    done = run("export", "run.ckpt", "scores.csv", cwd=tmp_path, status=2)
    assert "is of a run in mode='mask'" in done.last
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing of torch's", "cannot be read as a checkpoint"),
        ({"state_dict": {}}, "expected the state of one SparseSelectionCallback among 0 callbacks, got 0"),
        ({"hyper_parameters": {"path": Path("x")}, "callbacks": {}}, "add --trust"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_such_checkpoint(content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "run.ckpt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "run.ckpt")
    done = run("export", "run.ckpt", "out.csv", cwd=tmp_path, status=2)
    assert message in done.last


def test_a_state_of_a_later_release_is_refused(trained: Run, tmp_path: Path) -> None:
    checkpoint = torch.load(trained[2] / "run.ckpt", weights_only=True)
    (state,) = (s for s in checkpoint["callbacks"].values() if "rule" in s)
    state["version"] = 2
    torch.save(checkpoint, tmp_path / "run.ckpt")
    done = run("export", "run.ckpt", "out.csv", cwd=tmp_path, status=2)
    assert "a later release of lightning-ast wrote it: update lightning-ast" in done.err


def test_objects_are_loaded_where_the_file_is_trusted(trained: Run, tmp_path: Path) -> None:
    checkpoint = torch.load(trained[2] / "run.ckpt", weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"path": Path("x")}}, tmp_path / "run.ckpt")
    assert run("export", "--trust", "run.ckpt", "out.csv", cwd=tmp_path).out == "out.csv: 300 samples\n"


CONFIG = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  limit_val_batches: 0
  callbacks:
    - class_path: SparseSelectionCallback
      init_args: {mode: prune, initial_scores: scores.csv, never: [1, 2], always: first.csv, class_floor: 0.1}
    - {class_path: TwoStageScheduler, init_args: {warmup_epochs: 0}}
model: {class_path: lightning_ast.demo.ResNet9, init_args: {in_channels: 1, width: 4}}
data: {class_path: lightning_ast.demo.ImageData, init_args: {data: digits, batch_size: 64, train_limit: 256}}
"""


def test_the_settings_of_samples_in_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "scores.csv").write_text("index,significance\n" + "".join(f"{i},{i % 7}\n" for i in range(256)))
    (tmp_path / "first.csv").write_text("index\n0\n")
    run("fit", "--config", "config.yaml", cwd=tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("always: first.csv", "always: [2]"))
    done = run("fit", "--config", "config.yaml", cwd=tmp_path, status=2)
    assert "got 2 in both" in done.last
    (tmp_path / "config.yaml").write_text(CONFIG.replace("class_floor", "class_flor"))
    assert "class_flor" in run("fit", "--config", "config.yaml", cwd=tmp_path, status=2).err
