"""The tables of the regime map, from records that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def write(folder: Path, run: Any, accuracy: float, work: float, rates: list[float] | None = None, **facts: Any) -> None:
    record = {
        "name": run.name,
        **run.facts(),
        "accuracy": accuracy,
        "best_accuracy": accuracy + 0.001,
        "train_accuracy": 0.95,
        "work_epochs": work,
        "optimizer_steps": 100,
        "cpu_seconds": 10 * work,
        "seconds": 99.0,
        "rate_by_epoch": rates or [1.0],
        "hardware": "CPU x86_64, 1 thread(s)",
        "runs_at_once": 2,
        "date": "2026-11-26",
        "precision": "32-true",
        "versions": {"torch": "2.6.0"},
        "commit": "abc1234",
        **facts,
    }
    (folder / f"{run.name}.json").write_text(json.dumps(record))


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line[:1] == "|"]


def pick(benchmark: Any, plan: str, setting: str, data: str = "fashion_mnist") -> list[Any]:
    """The runs of a setting at the first place of a plan with this data, by seed."""
    runs = [run for run in benchmark("regime_plans").plan(plan) if run.regime.data == data]
    return [run for run in runs if run.setting == setting and run.regime == runs[0].regime]


def test_differences_are_paired_over_seeds(benchmark: Any, tmp_path: Path) -> None:
    for seed, run in enumerate(pick(benchmark, "headline", "dense")[:3]):
        write(tmp_path, run, 0.90 + 0.01 * seed, 24.0)
    for run, accuracy in zip(pick(benchmark, "headline", "infobatch"), (0.899, 0.907, 0.918), strict=False):
        write(tmp_path, run, accuracy, 16.0)
    table = benchmark("regime_tables").headline_table(tmp_path)
    _, _, dense, infobatch = rows(table)
    assert dense[:5] == ["dense", "3 (3)", "91.00 ± 1.00", "-", "-"]
    # -0.1, -0.3, -0.2: the mean is 2 * sqrt(3) standard errors below 0
    assert infobatch[:6] == ["InfoBatch's rule", "3 (3)", "90.80 ± 0.95", "-0.20 ± 0.06", "0.074", "16.0"]
    assert "commits abc1234" in table


def test_nothing_is_claimed_from_two_seeds(benchmark: Any, tmp_path: Path) -> None:
    for setting in ("dense", "seta"):
        for run in pick(benchmark, "headline", setting)[:2]:
            write(tmp_path, run, 0.9, 24.0)
    _, _, *found = rows(benchmark("regime_tables").headline_table(tmp_path))
    assert [row[3:5] for row in found] == [["-", "-"]] * 2


def test_the_map_tells_what_can_be_skipped_at_no_loss(benchmark: Any, tmp_path: Path) -> None:
    losses = {
        "prune-coverage0.97-gatesoft-stepskeep": (0.004, 16.8),
        "prune-coverage0.97-gatesoft-stepskeep-cooldown3": (0.001, 18.0),
        "prune-coverage0.97-gatesoft-stepsfollow-cooldown3": (0.0, 17.28),
    }
    for run in pick(benchmark, "map", "dense"):
        write(tmp_path, run, 0.9, 24.0)
    for run in pick(benchmark, "map", "dense-length16"):
        write(tmp_path, run, 0.895, 16.0)
    for setting, (loss, work) in losses.items():
        for run in pick(benchmark, "map", setting):
            write(tmp_path, run, 0.9 - loss, work, [1.0, 0.7, 0.5, 1.0])
    _, _, row = rows(benchmark("regime_map").map_table(tmp_path))
    assert row[1:] == [
        "90.0 (95.0)",
        "-0.50 ± 0.00 at 0.67",
        "-0.40 ± 0.00 at 0.70",
        "-0.10 ± 0.00 at 0.75",
        "+0.00 ± 0.00 at 0.72",
        "-",
        "-",
        "0.70-0.50",
        "28%",
    ]


def test_the_last_row_of_the_map_is_over_the_places_with_all_settings(benchmark: Any, tmp_path: Path) -> None:
    losses = {8: [0.001, 0.002, 0.003, 0.004, 0.0], 24: [0.003, 0.0, 0.001, 0.0, 0.0], 64: [0.1]}
    runs = [
        run for run in benchmark("regime_plans").plan("map") if run.regime.name.startswith("fashion_mnist-n20000-r")
    ]
    for run in runs:
        found = losses.get(run.regime.epochs, [])
        settings = [
            benchmark("regime_run").Run(run.regime, policy, tuple(options.items())).setting
            for policy, options in benchmark("regime_plans").map_settings(run.regime).values()
        ]
        place = dict(zip(settings, found, strict=False)) | {"dense": 0.0}
        plain = run.regime.network == "resnet" and run.regime.redundancy == 1 and run.regime.noise == 0
        if plain and run.setting in place:
            write(tmp_path, run, 0.9 - place[run.setting], float(run.regime.epochs))
    *_, last = rows(benchmark("regime_map").map_table(tmp_path))
    assert last[0] == "**2 places**"
    assert last[3:7] == ["-0.20, worst -0.30", "-0.10, worst -0.20", "-0.20, worst -0.30", "-0.20, worst -0.40"]


def test_tables_say_where_there_is_no_record(benchmark: Any, tmp_path: Path) -> None:
    tables = benchmark("regime_tables")
    of_map = benchmark("regime_map").map_table
    for table in (tables.headline_table, of_map, tables.steps_table, tables.ideas_table):
        assert table(tmp_path) == "Not recorded yet."


def test_every_run_of_every_plan_has_a_name_in_words(benchmark: Any) -> None:
    tables = benchmark("regime_tables")
    for name in benchmark("regime_plans").PLANS:
        for run in benchmark("regime_plans").plan(name):
            assert tables.setting_name(run.facts())
            assert tables.place_name(run.regime)


def test_a_certain_difference_has_no_error(benchmark: Any) -> None:
    paired = benchmark("regime_statistics").paired
    assert paired([0.0, 0.0, 0.0]).p_value == 1
    assert paired([0.1, 0.1, 0.1]).p_value == 0
    assert paired([0.1, 0.2]) is None


def write_headline(benchmark: Any, folder: Path, seeds: int, **facts: Any) -> None:
    accuracies = {
        "dense": 0.9,
        "dense-length6": 0.895,  # not a length that several learning rates were tried at
        "dense-length8": 0.89,
        "dense-length8-lr0.1": 0.893,
        "infobatch": 0.899,
        "prune-coverage0.97-gatesoft-stepskeep-cooldown2": 0.9005,
        "random-likeprune-coverage0.95-gatetopk-stepskeep-stepskeep": 0.88,
    }
    for setting, accuracy in accuracies.items():
        for run in pick(benchmark, "headline", setting)[:seeds]:
            write(folder, run, accuracy + 0.001 * run.seed, 24.0 if setting == "dense" else 12.0, **facts)


def test_the_short_table_has_the_best_learning_rate_of_the_shortened_runs(benchmark: Any, tmp_path: Path) -> None:
    write_headline(benchmark, tmp_path, 5)
    _, _, *found = rows(benchmark("regime_headline").short_table(tmp_path))
    assert len(found) == 8
    named = {row[0]: row[1:] for row in found}
    assert named["dense, shortened, the best of three learning rates"] == ["-0.70 ± 0.00", "0.50", "120"]
    assert named["**ours**, coverage 0.97, steps kept, the last eighth dense"] == ["+0.05 ± 0.00", "0.50", "120"]
    assert named["SeTa's rule"] == ["-", "-", "-"]


def test_no_headline_is_written_from_four_seeds(benchmark: Any, tmp_path: Path) -> None:
    write_headline(benchmark, tmp_path, 4)
    assert benchmark("regime_headline").short_table(tmp_path) == "Not recorded yet."
    assert benchmark("regime_headline").points(tmp_path) == {}


GPU = {"hardware": "NVIDIA H100", "runs_at_once": 15}


def test_seconds_of_runs_that_shared_a_gpu_are_left_out(benchmark: Any, tmp_path: Path) -> None:
    folder = tmp_path / "regimes"
    (tmp_path / "regimes-gpu").mkdir()
    write_headline(benchmark, tmp_path / "regimes-gpu", 5, **GPU)
    headline = benchmark("regime_headline")
    _, _, *found = rows(headline.short_table(folder))
    assert {row[0]: row[1:] for row in found}["InfoBatch's rule"] == ["-0.10 ± 0.00", "0.50"]
    (drawn,) = headline.points(folder).values()
    assert drawn["cost"] == "work, in dense epochs"
    write_headline(benchmark, tmp_path / "regimes-gpu", 5, hardware="NVIDIA H100", runs_at_once=1)
    (drawn,) = headline.points(folder).values()
    assert drawn["cost"] == "seconds of training"
    assert {each["cost"] for each in drawn["methods"]} == {99.0}


def test_runs_are_paired_on_the_same_hardware(benchmark: Any, tmp_path: Path) -> None:
    folder = tmp_path / "regimes"
    on_gpu = tmp_path / "regimes-gpu"
    for each in (folder, on_gpu):
        each.mkdir()
    dense = pick(benchmark, "headline", "dense")
    seta = pick(benchmark, "headline", "seta")
    for seed in range(3):
        write(folder, dense[seed], 0.9, 16.0)
        write(folder, seta[seed], 0.89, 9.0)
    write(on_gpu, dense[0], 0.95, 16.0, **GPU)
    write(on_gpu, seta[0], 0.93, 9.0, **GPU, seconds=49.5)
    write(on_gpu, seta[1], 0.5, 9.0, **GPU, seconds=49.5)  # no dense run has its seed
    table = benchmark("regime_tables").headline_table(folder)
    assert "CPU x86_64, 1 thread(s) (seeds 0, 1, 2) and NVIDIA H100 (seeds 0, 1)" in table
    _, _, first, second = rows(table)
    assert first[:3] == ["dense", "4 (3)", "91.25 ± 2.50"]
    assert second[1] == "5 (3)"
    assert second[3] == "-1.17 ± 0.17"  # -1.5 is the mean of the seed that both have run
    assert second[7:9] == ["90", "0.50"]  # seconds of the CPU alone; the share among runs on the same GPU


def test_times_are_compared_within_the_same_hours(benchmark: Any, tmp_path: Path) -> None:
    dense, pruned = (pick(benchmark, "headline", setting) for setting in ("dense", "infobatch"))
    for seed, (date, seconds) in enumerate((("2026-11-26", 300.0), ("2026-11-26", 300.0), ("2026-11-27", 200.0))):
        write(tmp_path, dense[seed], 0.9, 16.0, date=date, cpu_seconds=seconds)
    write(tmp_path, pruned[0], 0.9, 10.0, date="2026-11-26", cpu_seconds=210.0)
    write(tmp_path, pruned[1], 0.9, 10.0, date="2026-11-27", cpu_seconds=140.0)
    write(tmp_path, pruned[2], 0.9, 10.0, date="2026-11-28", cpu_seconds=10.0)  # no dense run was made that day
    settings = benchmark("regime_statistics").by_setting(benchmark("regime_statistics").load_regimes(tmp_path))
    assert settings["infobatch"].cpu_time == pytest.approx(0.7)
    assert settings["infobatch"].seconds == pytest.approx(0.7 * 800 / 3)
    for run in (dense[3], pruned[3]):
        write(tmp_path, run, 0.9, 16.0, hardware="NVIDIA H200", runs_at_once=20)
    settings = benchmark("regime_statistics").by_setting(benchmark("regime_statistics").load_regimes(tmp_path))
    assert settings["infobatch"].shared_time is None, "runs of other kinds had that card beside them"


def test_a_picture_knows_the_numbers_that_it_was_drawn_from(benchmark: Any, tmp_path: Path) -> None:
    headline = benchmark("regime_headline")
    write_headline(benchmark, tmp_path, 5)
    shown = headline.points(tmp_path)
    (drawn,) = shown.values()
    assert [each["cost"] for each in drawn["methods"] if each["method"] == "dense"] == [240.0]
    assert drawn["curve"] == [[120.0, -1.0], [120.0, -0.5], [240.0, 0.0]]
    headline.draw(shown, tmp_path / "headline.svg")
    assert headline.drawn_points(tmp_path / "headline.svg") == shown
    assert headline.drawn_points(tmp_path / "missing.svg") is None


# ---------------------------------------------------------------------- aims


def write_aims(benchmark: Any, folder: Path, accuracies: dict[str, tuple[float, float]], **facts: Any) -> None:
    for setting, (accuracy, work) in accuracies.items():
        for run in pick(benchmark, "headline", setting)[:5]:
            write(folder, run, accuracy + 0.001 * run.seed, work, **facts)


def test_an_aim_is_judged_at_its_work(benchmark: Any, tmp_path: Path) -> None:
    runs = {
        "dense": (0.9, 16.0),
        "prune-coverage0.97-gatesoft-stepskeep": (0.8995, 8.0),
        "prune-coverage0.95-gatetopk-stepskeep": (0.8985, 7.2),
    }
    write_aims(benchmark, tmp_path, runs)
    _, _, first, *middle, longer, everywhere, follows, careful, ahead = rows(
        benchmark("regime_aims").aims_table(tmp_path)
    )
    assert first[1] == "no"
    assert first[2] == "best of our settings: -0.15 ± 0.00 at 0.45, `prune`, coverage 0.95, hard cut, steps kept"
    assert [row[1] for row in middle] == ["-", "-"]  # CIFAR-10 is not recorded
    assert everywhere[1] == "yes"
    assert everywhere[2].startswith(
        "-0.05 on the mean of 1 places; more is lost at 0, beyond chance at 0; worst: -0.05"
    )
    assert [row[1:] for row in (longer, follows, careful)] == [["-", "not recorded"]] * 3
    assert ahead[1:] == ["-", "not recorded"]
    write_aims(benchmark, tmp_path, {"prune-coverage0.97-gatesoft-stepsfollow-cooldown2": (0.8971, 9.0)})
    *_, follows, _, _ = rows(benchmark("regime_aims").aims_table(tmp_path))
    assert follows[1] == "no"
    assert "1 places; more is lost at 1, beyond chance at 1; worst: -0.29 ± 0.00, " in follows[2]
    write_aims(benchmark, tmp_path, {"prune-coverage0.9-gatetopk-stepskeep": (0.8991, 7.0)})
    assert rows(benchmark("regime_aims").aims_table(tmp_path))[2][1] == "yes"


def test_a_loss_is_told_from_chance(benchmark: Any) -> None:
    paired = benchmark("regime_statistics").paired
    assert paired([-0.9, -1.0, -1.1]).is_below(-0.2)
    assert not paired([-0.1, -0.3, -1.1]).is_below(-0.2)  # -0.5 ± 0.3
    assert not paired([0.1, 0.0, -0.1]).is_below(-0.2)
    # Student's one-sided test: t = 2.92 with two degrees of freedom is 5 %
    assert paired([-0.2 - 2.93 * 3**-0.5 - 1, -0.2 - 2.93 * 3**-0.5, -0.2 - 2.93 * 3**-0.5 + 1]).is_below(-0.2)
    assert not paired([-0.2 - 2.91 * 3**-0.5 - 1, -0.2 - 2.91 * 3**-0.5, -0.2 - 2.91 * 3**-0.5 + 1]).is_below(-0.2)


def test_methods_are_compared_with_ours(benchmark: Any, tmp_path: Path) -> None:
    runs = {
        "dense": (0.9, 16.0),
        "infobatch": (0.895, 10.0),
        "seta": (0.897, 7.0),
        "prune-coverage0.97-gatesoft-stepskeep": (0.899, 10.5),
        "prune-coverage0.95-gatetopk-stepskeep": (0.896, 9.0),
    }
    write_aims(benchmark, tmp_path, runs)
    aims = benchmark("regime_aims")
    found = rows(aims.equal_work_table(tmp_path))[2:]
    assert [row[1] for row in found] == ["InfoBatch's rule"] * 2 + ["SeTa's rule"] * 2
    assert [row[5] for row in found] == ["+0.40 ± 0.00", "+0.10 ± 0.00", "+0.20 ± 0.00", "-0.10 ± 0.00"]
    assert found[1][2:5] == ["0.62", "`prune`, coverage 0.95, hard cut, steps kept", "0.56"]
    ahead = rows(aims.aims_table(tmp_path))[-1]
    assert ahead[1:] == ["yes", "in 1 of 1 comparisons with p < 0.05; see above"]  # at no more work
    write_aims(benchmark, tmp_path, {"infobatch": (0.895, 10.0)}, hardware="another card", runs_at_once=1)
    assert [row[1] for row in rows(aims.equal_work_table(tmp_path))[2:]] == ["SeTa's rule"] * 2


def test_nothing_is_compared_that_is_not_recorded(benchmark: Any, tmp_path: Path) -> None:
    aims = benchmark("regime_aims")
    assert aims.equal_work_table(tmp_path) == "Not recorded yet."
    assert {row[1] for row in rows(aims.aims_table(tmp_path))[2:]} == {"-"}


def test_wrong_labels_among_those_trained_on(benchmark: Any, tmp_path: Path) -> None:
    runs = [run for run in benchmark("regime_plans").plan("ideas") if run.regime.noise == 0.2]
    first = runs[0].regime
    for setting, wrong in (("dense", [0.2, 0.2]), ("prune-rate0.4-gatetopk-stepskeep", [0.2, 0.5])):
        for run in (one for one in runs if one.setting == setting and one.regime == first):
            accuracy = 0.9 if setting == "dense" else 0.88 + 0.001 * run.seed
            rates = [1.0, 1.0] if setting == "dense" else [1.0, 0.4]
            write(tmp_path, run, accuracy, 24.0, rates, wrong_label_share_by_epoch=wrong)
    table = benchmark("regime_noise").noise_table(tmp_path)
    _, _, dense, pruned = rows(table)
    assert (dense[3:5], dense[-1]) == (["90.00 ± 0.00", "-"], "20 %")
    assert pruned[4] == "-1.90 ± 0.06"
    assert pruned[-1] == "50 %", "dense epochs are left out"
    assert benchmark("regime_noise").noise_table(tmp_path / "none") == "Not recorded yet."
