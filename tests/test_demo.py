"""The demo: three runs of equal work, one table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_ast.demo.compare import equal_work_epochs, run_demo
from lightning_ast.errors import MissingPackageError
from tests.helpers.command import Done, run

ROW = re.compile(
    r"^ *(dense|AST, partial, r = 0.4|dense, shortened) +(\d+) +(\S+)% +(\S+) +(\S+) +(\S+) +(\S+)% ", re.MULTILINE
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Done:
    small = ("--epochs", "10", "--width", "4", "--train-limit", "256", "--rate", "0.4")
    return run("demo", *small, cwd=tmp_path_factory.mktemp("demo"))


def test_the_table(shown: Done) -> None:
    for column in ("accuracy", "seconds", "samples", "GFLOPs", "activation", "skipped", "saved"):
        assert column in shown.out
    rows = ROW.findall(shown.out)
    assert [row[0] for row in rows] == ["dense", "AST, partial, r = 0.4", "dense, shortened"]
    assert [float(row[6]) for row in rows] == [100.0, pytest.approx(40 * 0.8 + 20, abs=6), 100.0]
    assert "Epoch 9/9 | Loss:" in shown.out


def test_the_shortened_run_has_the_work_of_the_sparse_run_to_half_an_epoch(shown: Done) -> None:
    rows = ROW.findall(shown.out)
    epochs = [int(row[1]) for row in rows]
    _, sparse, dense = (float(row[5].replace(",", "")) for row in rows)
    assert abs(dense - sparse) <= dense / epochs[2] / 2 + 1  # the table has whole GFLOPs
    assert "baseline to beat" in shown.out
    assert f"dense, shortened: {epochs[2]} epochs" in shown.out


def test_the_summaries_and_the_table_have_the_same_seconds(shown: Done) -> None:
    summaries = re.findall(r"lightning-ast: \d+ epochs in (\S+)s", shown.out)
    assert summaries == [row[3] for row in ROW.findall(shown.out)]


@pytest.mark.parametrize(
    ("flops", "epochs"),
    [(4.003, 4), (4.4999, 4), (4.5001, None), (5.0, None), (7.0, None), (0.2, 1), (None, None)],
)
def test_work_in_epochs_is_rounded_to_the_nearest(flops: float | None, epochs: int | None) -> None:
    assert equal_work_epochs(5, flops, 5.0) == epochs
    assert equal_work_epochs(5, flops, None) is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--epochs", "0"), "epochs: expected an int from 1 to 10000, got 0."),
        (("--epochs", str(10**30)), f"epochs: expected an int from 1 to 10000, got {10**30}."),
        (("--mode", "prune", "--epochs", "2"), "epochs: expected an int from 3 to 10000, got 2."),
        (("--seed", "-1"), "seed: expected an int from 0 to 4294967295, got -1."),
        (("--seed", str(10**30)), "seed: expected an int from 0"),
        (("--width", "0"), "width: expected an int from 1 to 1024, got 0."),
        (("--train-limit", "1"), "train_limit: expected an int of at least 128, got 1."),
        (("--train-limit", "-5"), "train_limit: expected an int of at least 128, got -5."),
        (("--rate", "5"), "target_activation_rate: expected a rate in (0, 1], got 5.0."),
        (("--rate", "nan"), "target_activation_rate: expected a rate in (0, 1], got nan."),
        (("--rate", "much"), "invalid float value: 'much'"),
        (("--coverage", "90"), "target_coverage: expected a coverage in (0, 1], got 90.0. Did you mean 0.9?"),
        (("--rate", "0.4", "--coverage", "0.9"), "not allowed with argument"),
    ],
)
def test_arguments_out_of_range(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run("demo", *arguments, cwd=tmp_path, status=2)
    assert told in done.err
    assert done.err.count("\n") == 1
    assert done.out == "", "before the dense run, not after it"


def test_least_arguments_run(tmp_path: Path) -> None:
    done = run("demo", "--mode=prune", "--epochs=3", "--width=1", "--train-limit=128", cwd=tmp_path)
    assert "AST, prune, coverage 0.97: 3 epochs" in done.out
    run("demo", "--epochs=1", "--width=1", "--train-limit=256", cwd=tmp_path)
    done = run("demo", "--epochs=1", "--width=1", "--train-limit=128", cwd=tmp_path, status=2)
    assert "leave no sparse step in a run of 1 epoch and 1 optimizer step" in done.err
    done = run("demo", "--epochs=1", "--width=1", "--train-limit=256", "--rate=1", cwd=tmp_path)
    assert "dense: 1 epoch\n" in done.out
    assert "baseline to beat" not in done.out, "nothing was saved that a shorter run could match"


def test_a_run_of_four_steps(tmp_path: Path) -> None:
    """A one-cycle schedule that would rise for exactly one step."""
    run("demo", "--epochs=4", "--width=1", "--train-limit=128", cwd=tmp_path)


def test_every_choice_is_named_when_there_are_no_images(tmp_path: Path) -> None:
    done = run("demo", "--data", "cifar10", "--root", str(tmp_path / "none" / "such.npz" / "x"), cwd=tmp_path, status=2)
    for choice in ("cifar10.npz", "cifar10-batches-py", "--root FOLDER", "--data digits"):
        assert choice in done.err.replace("cifar-10", "cifar10")


def test_scikit_learn_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    done = run("demo", cwd=tmp_path, status=2)
    assert done.err == "lightning-ast: sklearn is missing: pip install 'lightning-ast[vision]'\n"
    with pytest.raises(MissingPackageError, match="sklearn is missing"):
        run_demo()
