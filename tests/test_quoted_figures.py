"""Figures that the pages on theory, migration, troubleshooting and the original quote are those of the records."""

from __future__ import annotations

import json
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "records"
C20 = "cifar10-n20000-resnet16-e24-b128"
C50 = "cifar10-n50000-resnet32-e16-b128"
F20 = "fashion_mnist-n20000-resnet16-e24-b128"
F60 = "fashion_mnist-n60000-resnet16-e16-b128"


@cache
def runs(place: str, setting: str) -> dict[tuple[int, str], dict[str, Any]]:
    """The runs of a setting, by seed and hardware."""
    found = [json.loads(path.read_text()) for path in RECORDS.glob(f"regimes*/{place}-{setting}-s*.json")]
    return {(run["seed"], run["hardware"]): run for run in found}


def text_of(page: str) -> str:
    return " ".join((ROOT / "docs" / page).read_text().replace("**", "").split())


def differences(place: str, setting: str) -> list[float]:
    """The points above dense training by seed: the mean where two machines have run one."""
    dense = runs(place, "dense")
    by_seed: dict[int, list[float]] = {}
    for key, run in runs(place, setting).items():
        if key in dense:
            by_seed.setdefault(key[0], []).append(100 * (run["accuracy"] - dense[key]["accuracy"]))
    return [statistics.mean(found) for found in by_seed.values()]


def mean(place: str, setting: str, value: str) -> float:
    return statistics.mean(run[value] for run in runs(place, setting).values())


@pytest.mark.parametrize(
    ("page", "place", "setting", "said"),
    [
        ("theory.md", C20, "prune-coverage0.9-weightingunbiased-gatesoft-stepskeep", "-8.10 ± 1.25 points on CIFAR-10"),
        ("theory.md", F20, "prune-coverage0.9-weightingunbiased-gatesoft-stepskeep", "-5.42 ± 0.26 on Fashion-MNIST"),
        ("theory.md", C20, "prune-coverage0.9-lr0.12-gatetopk-stepskeep", "gave -0.78 ± 0.22"),
        ("theory.md", C20, "prune-coverage0.9-gatetopk-stepskeep", "against -0.88 ± 0.13 on CIFAR-10"),
        ("theory.md", F20, "prune-coverage0.9-lr0.12-gatetopk-stepskeep", "-0.18 ± 0.11 against"),
        ("theory.md", F20, "prune-coverage0.9-gatetopk-stepskeep", "-0.28 ± 0.16 on Fashion-MNIST"),
        ("theory.md", C50, "prune-coverage0.95-gatetopk-stepskeep", "hard -0.52 ± 0.11 at 0.65 of the work"),
        ("theory.md", C50, "prune-coverage0.95-gatesoft-stepskeep", "soft -0.55 ± 0.11 at 0.68"),
        ("theory.md", C50, "prune-rate0.6-gatetopk-stepskeep", "hard -0.42 ± 0.07"),
        ("theory.md", C50, "prune-rate0.6-gatesoft-stepskeep", "soft -0.58 ± 0.10, both at 0.65"),
        ("theory.md", C50, "random-likeprune-rate0.6-gatetopk-stepskeep-stepskeep", "-1.47 ± 0.12"),
        ("migrating.md", C50, "infobatch", "-0.50 ± 0.09 at 0.71"),
        ("migrating.md", C50, "prune-coverage0.97-gatesoft-stepskeep", "-0.26 ± 0.12 at 0.72"),
        ("migrating.md", C50, "prune-coverage0.95-gatesoft-stepskeep", "-0.55 ± 0.11 at 0.68"),
        ("migrating.md", C50, "selective-backprop", "-0.54 ± 0.11 points at 0.96"),
        ("original.md", C50, "original-rate0.4", "-5.22 ± 0.31"),
    ],
)
def test_a_difference_to_dense_is_on_record(page: str, place: str, setting: str, said: str) -> None:
    found = differences(place, setting)
    digits = len(said.split("±", maxsplit=1)[0].strip().split(".")[-1])
    error = statistics.stdev(found) / math.sqrt(len(found))
    assert said in text_of(page)
    assert f"{statistics.mean(found):.{digits}f} ± {error:.{digits}f}" in said
    if " at 0." in said:
        share = mean(place, setting, "work_epochs") / mean(place, "dense", "work_epochs")
        assert f"at {share:.2f}" in said


def test_what_coverage_cost_where_the_network_fits_and_where_not_is_on_record() -> None:
    text = text_of("theory.md")
    for place, said in (
        (F20, "reaches 95 % on the training images, 0.44 of the work cost 0.31 ± 0.04 points"),
        (C20, "reaches 86 %, 0.68 of the work were needed, for 0.77 ± 0.11 points"),
    ):
        setting = "prune-coverage0.9-gatesoft-stepskeep"
        found = differences(place, setting)
        share = mean(place, setting, "work_epochs") / mean(place, "dense", "work_epochs")
        error = statistics.stdev(found) / math.sqrt(len(found))
        assert said in text
        assert f"{share:.2f} of the work" in said
        assert f"{-statistics.mean(found):.2f} ± {error:.2f} points" in said
        assert f"reaches {100 * mean(place, 'dense', 'train_accuracy'):.0f} %" in said


def test_what_is_said_of_the_original_on_cifar10_is_on_record() -> None:
    def of(method: str) -> tuple[str, str, str]:
        found = (RECORDS / "recipes").glob(f"original-cifar10-{method}-s*.json")
        runs = [json.loads(path.read_text()) for path in found]
        assert len(runs) == 3
        accuracy, work = (statistics.mean(run["figures"][name] for run in runs) for name in ("accuracy", "work"))
        return f"{100 * accuracy:.1f} %", f"{work:.2f}", f"{statistics.mean(run['cpu_seconds'] for run in runs):.0f} s"

    text = text_of("original.md")
    for method, wanted in (("original_10", "at {1} of the work, {2}"), ("original_6", "at {1} of the work, {2}")):
        assert f"{of(method)[0]} {wanted.format(*of(method))}" in text
    (adam, _, its), (dense, _, whole) = of("dense_adam"), of("dense")
    assert f"(dense with the same optimizer: {adam}, {its})" in text
    ours = [f"Ours: {accuracy} at {work}, {seconds}" for accuracy, work, seconds in map(of, ("ours", "ours_6"))]
    assert f"{ours[0]} (dense: {dense}, {whole})" in text
    assert ours[1] in text


def test_the_seconds_that_are_quoted_are_on_record() -> None:
    text = text_of("troubleshooting.md")
    for said, place, settings in (
        (
            "took 128 s with `partial` at coverage 0.9 where the dense run took 57 s",
            C50,
            ("partial-coverage0.9", "dense"),
        ),
        (
            'a dense run took 25 s, `"keep"` 36 s and `"follow"` 15 s',
            F20,
            ("dense", "prune-coverage0.9-gatesoft-stepskeep", "prune-coverage0.9-gatesoft-stepsfollow"),
        ),
    ):
        assert said in text
        shared = {
            setting: [run for run in runs(place, setting).values() if run["runs_at_once"] == 15] for setting in settings
        }
        means = [statistics.mean(run["seconds"] for run in found) for found in shared.values()]
        assert all(f"{seconds:.0f} s" in said for seconds in means), means


def test_what_is_said_of_the_original_is_on_record() -> None:
    text = text_of("original.md")
    found = list(runs(C50, "original-rate0.4").values())
    others = [run["rate_by_epoch"] for run in runs(F60, "original-rate0.4").values()]
    assert f"{100 * mean(C50, 'original-rate0.4', 'accuracy'):.1f} % where dense training reaches 87.7 %" in text
    assert f"{100 * mean(C50, 'dense', 'accuracy'):.1f}" == "87.7"
    assert f"reports {mean(C50, 'original-rate0.4', 'claimed_energy_savings_percent'):.1f} % saved" in text
    share = mean(C50, "original-rate0.4", "work_epochs") / mean(C50, "dense", "work_epochs")
    assert f"{share:.2f} times" in text
    first, second = (statistics.mean(run["rate_by_epoch"][epoch] for run in found) for epoch in (0, 1))
    assert f"{first:.2f} and {second:.2f} in the first two epochs" in text
    later = [rate for run in found for rate in run["rate_by_epoch"][4:]]
    assert f"from the fifth on {min(later):.2f} to {max(later):.2f}" in text
    highest, last = (
        statistics.mean(rates) for rates in ([max(each) for each in others], [each[-1] for each in others])
    )
    seeds = len({seed for seed, _ in runs(F60, "original-rate0.4")})
    assert f"Fashion-MNIST ({seeds} seeds): falls from {highest:.2f} to {last:.2f}" in text


def test_the_rates_that_readme_quotes_are_those_of_the_pruned_epochs() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    said = []
    for place in (C50, F60):
        by_epoch = zip(
            *(run["rate_by_epoch"] for run in runs(place, "prune-coverage0.97-gatesoft-stepskeep").values()),
            strict=True,
        )
        pruned = [rate for rate in map(statistics.mean, by_epoch) if rate < 1]
        said.append(f"from {pruned[0]:.2f} to {pruned[-1]:.2f} on")
    assert f"{said[0]} CIFAR-10, and {said[1]} the easier Fashion-MNIST" in text


def test_the_host_costs_that_are_quoted_are_on_record() -> None:
    record = json.loads((RECORDS / "overhead-cpu.json").read_text())
    share = {row["variant"]: f"{row['share_of_plain']:.2f}" for row in record["rows"]}
    assert f"took {share['mask']} times as long" in text_of("modes/mask.md")
    assert f"took {share['prune']} (`prune`) to {share['subset']} (`subset`) times" in text_of("which-mode.md")


def test_what_is_said_of_the_laptop_set_ups_is_on_record() -> None:
    runs_of: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((RECORDS / "recipes").glob("original-laptop-*.json")):
        record = json.loads(path.read_text())
        runs_of.setdefault(record["method"], []).append(record)
    assert {len(records) for records in runs_of.values()} == {3}
    seconds = {name: statistics.mean(each["cpu_seconds"] for each in records) for name, records in runs_of.items()}
    accuracy, activation = (
        {name: 100 * statistics.mean(each["figures"][kind] for each in records) for name, records in runs_of.items()}
        for kind in ("accuracy", "activation")
    )
    text = " ".join(text_of("original.md").split())
    shown = {name: f"{value:.1f} %" for name, value in accuracy.items()}
    assert f"{shown['original_10']} where that has {shown['dense_adam_10']} after 10" in text
    assert f"{shown['original_3']} where it has {shown['dense_adam_3']} after 3" in text
    assert f"{seconds['original_10']:.0f} s where dense training takes {seconds['dense_adam_10']:.0f}" in text
    assert f"end {accuracy['dense_adam_3'] - accuracy['original_10']:.0f} points above ten of the rule" in text
    assert f"{activation['original_10']:.1f} % of the samples in 10 epochs and {activation['original_3']:.1f} %" in text
    assert f"{accuracy['shortened_10'] - accuracy['ours_10']:.1f} points below a shortened dense run" in text
    assert f"{accuracy['dense_10'] - accuracy['ours_10']:.1f} points below the whole one" in text


def test_the_seeds_of_fine_tuning() -> None:
    def accuracies(method: str) -> list[float]:
        paths = [RECORDS / "recipes" / f"fine_tuning-efficientnet-{method}-s{seed}.json" for seed in range(3)]
        return [100 * json.loads(path.read_text())["figures"]["accuracy"] for path in paths]

    ours = accuracies("ours")
    dense, shortened = ([own - other for own, other in zip(ours, accuracies(each))] for each in ("dense", "shortened"))
    page = text_of("recipes/fine-tuning.md")
    assert (
        f"it ends {-dense[0]:.1f} points below the dense run, {dense[1]:.1f} above it, and {-dense[2]:.1f} below"
        in page
    )
    assert f"({-shortened[0]:.1f} points below it, {shortened[1]:.1f} above, {shortened[2]:.1f} above)" in page
