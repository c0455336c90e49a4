"""The tables of the pages are those of the records, and so is what the text says of them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from lightning_ast import SparseSelectionCallback
from lightning_ast.core.partial.rules import normalization
from tests.helpers.pages import PAGES, ROOT

GENERATED = re.compile(r"<!-- ([\w-]+): generated (.*?)<!-- /\1 -->", re.DOTALL)
TEXT = " ".join(" ".join(page.read_text().split()) for page in PAGES)


def test_what_the_docstring_says_of_batchnorm_is_on_record() -> None:
    records = ROOT / "benchmarks" / "records"
    rows = json.loads((records / "partial-batchnorm.json").read_text())["rows"]
    for rate, least in ((0.4, 0.98), (0.2, 0.97), (0.1, 0.9)):
        assert min(row["partial"] for row in rows if row["rate"] == rate) > least
    accuracy = {
        mode: statistics.mean(
            json.loads(path.read_text())["accuracy"] for path in records.glob(f"cifar10-cpu-{mode}-r0.4-*-e16-*.json")
        )
        for mode in ("mask", "partial")
    }
    assert abs(accuracy["mask"] - accuracy["partial"]) < 0.005
    said = " ".join((normalization.__doc__ or "").split())
    assert "above 0.98, 0.97 and 0.90 at k / B = 0.4, 0.2 and 0.1" in said
    assert "within half a point" in said


def test_what_the_pages_say_of_the_monitors_and_of_advice_is_on_record() -> None:
    def records(benchmark: str) -> list[dict[str, Any]]:
        read = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "records").glob(f"{benchmark}-*.json")]
        assert read
        return read

    def less(run: dict[str, Any], dense: dict[str, Any]) -> str:
        flops, seconds = run["savings"]["flops"], 1 - run["seconds"] / dense["seconds"]
        return f"for {100 * flops:.0f} % less FLOPs and {100 * seconds:.0f} % less seconds"

    assert all(run["watching_share"] < 0.01 for record in records("monitored") for run in record["runs"])
    record = records("monitored")[0]
    runs = {run["mode"]: run for run in record["runs"]}
    seconds = sorted(run["seconds"] / record["epochs"] for run in runs.values())
    assert f"a run of sixteen epochs of {seconds[0]:.0f} to {seconds[-1]:.0f} seconds each" in TEXT
    partial, prune, dense = (runs[mode] for mode in ("partial", "prune", "dense"))
    assert f"{prune['savings']['samples']:.0%} of the samples are skipped".replace("%", " %") in TEXT
    ends = f"It ends at {100 * prune['accuracy']:.2f} % where dense training reaches {100 * dense['accuracy']:.2f} %"
    assert f"{ends}, {less(prune, dense)}" in TEXT
    assert f"{100 * partial['accuracy']:.2f} %, {less(partial, dense)})" in TEXT
    assert f"estimate {100 * prune['savings']['seconds']:.0f} % of the seconds" in TEXT
    logged = {tag for record in records("monitored") for run in record["runs"] for tag in run["series"]["scalars"]}
    assert logged >= {
        f"ast/{name}" for name in ("activation_rate", "coverage", "target_coverage", "threshold", "stage")
    }
    assert logged >= {f"ast/savings_{name}" for name in ("samples", "flops", "seconds")}
    assert "Beside ordinary runs, all within 15 %" in TEXT
    assert {record["model"] for record in records("advice")} >= {"resnet18", "vit-s"}
    assert all(max(record["largest_error"].values()) < 0.15 for record in records("advice"))


def test_what_the_pages_say_of_the_whole_of_cifar10_is_on_record() -> None:
    def runs(policy: str, epochs: int) -> tuple[float, float]:
        name = f"cifar10-gpu-{policy}-r0.4-w64-n50000-b256-e{epochs}-s*.json"
        found = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "records").glob(name)]
        assert len(found) == 3
        return 100 * statistics.mean(r["accuracy"] for r in found), statistics.mean(r["flops"] for r in found)

    (dense, whole), (partial, flops) = runs("dense", 16), runs("partial", 16)
    assert abs(dense - partial) < 0.25, "within the noise of three seeds"
    assert f"at {flops / whole:.2f} of its FLOPs" in TEXT
    assert f"{partial - runs('dense-shortened', 11)[0]:.1f} points above the dense run of that work" in TEXT
    assert f"and {partial - runs('infobatch', 16)[0]:.1f} above InfoBatch's rule" in TEXT
    prune = runs("prune", 16)[0]
    gains = sorted(f"{prune - runs(*other)[0]:.1f}" for other in (("prune-random", 16), ("dense-shortened", 8)))
    assert f"`prune` is {gains[0]} to {gains[1]} points above a random share" in TEXT


def test_what_the_pages_say_of_prune_is_on_record() -> None:
    def accuracy(policy: str, rate: str, epochs: int) -> float:
        name = f"cifar10-cpu-{policy}-r{rate}-w8-n20000-b256-e{epochs}-s*.json"
        runs = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "records").glob(name)]
        assert len(runs) == 3
        return 100 * statistics.mean(run["accuracy"] for run in runs)

    above = {
        "0.4 to 0.9 points above a random share": [
            ("0.4", 16, "prune-random", "0.4", 16),
            ("0.5", 16, "prune-random", "0.5", 16),
            ("0.6", 32, "prune-random", "0.6", 32),
        ],
        "0.1 to 0.7 points above the dense run": [
            ("0.4", 16, "dense-shortened", "0.4", 8),
            ("0.6", 32, "dense-shortened", "0.4", 22),
        ],
        "0.1 to 0.4 above InfoBatch's rule": [
            ("0.65", 16, "infobatch", "0.4", 16),
            ("0.6", 32, "infobatch", "0.4", 32),
        ],
    }
    for said, pairs in above.items():
        gains = [accuracy("prune", rate, epochs) - accuracy(*other) for rate, epochs, *other in pairs]
        least, most = map(float, re.findall(r"[\d.]+", said)[:2])
        assert (round(min(gains), 1), round(max(gains), 1)) == (least, most)
        assert said in TEXT


def test_tables_are_the_records(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["summarize.py", "--check"])
    assert benchmark("summarize").main() == 0, capsys.readouterr().out


def test_every_table_stands_on_a_page(benchmark: Any) -> None:
    summarize = benchmark("summarize")
    assert {name for page in summarize.pages() for name in summarize.tables_of(page.read_text())} == {*summarize.TABLES}


def test_tables_are_written_where_a_page_asks_for_them(benchmark: Any) -> None:
    rendered = benchmark("summarize").rendered

    def page(first: str, second: str) -> str:
        tables = {"one": first, "two": second}
        marks = [f"<!-- {n}: generated by benchmarks/summarize.py -->\n{t}\n<!-- /{n} -->" for n, t in tables.items()]
        return "# A page\n\n" + "\n\ntext\n\n".join([*marks, marks[0]]) + "\nthe end\n"

    tables = {"one": lambda: "| 1 |", "two": lambda: "| 2 |\n\n| 3 |"}
    assert rendered(page("old", "older\n\nstill"), tables) == page("| 1 |", "| 2 |\n\n| 3 |")
    with pytest.raises(ValueError, match="got two"):
        rendered(page("old", "old"), {"one": tables["one"]})
    with pytest.raises(ValueError, match="got one, one"):
        rendered(page("old", "old").replace("/one", "/other"), tables)


def test_the_number_of_set_ups_is_that_of_the_matrix() -> None:
    from tests.compatibility.matrix import cells, covered, possible_pairs

    assert f"{len(cells())} set-ups" in TEXT
    assert set(possible_pairs()) <= covered(list(cells()))


def test_what_the_pages_say_of_bad_samples_and_the_warmup_is_on_record() -> None:
    records = ROOT / "benchmarks" / "records"
    rows = json.loads((records / "bad-samples-cpu.json").read_text())["rows"]
    assert [row["finite"] for row in rows if row["policy"] == "plain"] == [False, True]
    ours = [row for row in rows if row["policy"] != "plain"]
    assert all(row["finite"] for row in ours)
    assert all(max(row["quarantined_by_epoch"]) == row["corrupted"] for row in ours)
    assert all(row["named"] for row in rows if row["policy"] == "prune")
    for row in json.loads((records / "warmup-time-cpu.json").read_text())["rows"]:
        for mode, share in row["share"].items():
            assert share < (1.02 if mode == "prune" else 1.01), f"{mode}: {share}"


def test_what_is_said_of_unbiased_weights_in_prune_is_on_record() -> None:
    lost = {}
    for data in ("cifar10", "fashion_mnist"):
        folder = ROOT / "benchmarks" / "records" / "regimes-gpu"
        unbiased = folder.glob(f"{data}-n20000-*-prune-coverage0.9-weightingunbiased-gatesoft-stepskeep-s*.json")
        runs = [json.loads(path.read_text()) for path in unbiased]
        assert len(runs) == 3
        dense = [
            json.loads((folder / f"{run['name'].split('-prune')[0]}-dense-s{run['seed']}.json").read_text())
            for run in runs
        ]
        pairs = zip(runs, dense, strict=True)
        lost[data] = 100 * statistics.mean(plain["accuracy"] - run["accuracy"] for run, plain in pairs)
    assert (round(min(lost.values())), round(max(lost.values()))) == (5, 8)
    assert '"unbiased"`` lost 5 to 8 points' in " ".join((SparseSelectionCallback.__doc__ or "").split())


@pytest.fixture
def settings_at(benchmark: Any) -> Callable[[str], dict[str, Any]]:
    """Finds the settings that are recorded at a place without wrong labels, by the beginning of the names."""
    statistics_of = benchmark("regime_statistics")
    records = statistics_of.load_regimes(benchmark("regime_tables").FOLDER)

    def found(place: str) -> dict[str, Any]:
        here = [one for one in records if one["name"].startswith(f"{place}-") and not one["regime"]["noise"]]
        return dict(statistics_of.by_setting(here))

    return found


def test_every_difference_that_the_pages_name_is_on_record(
    benchmark: Any, settings_at: Callable[[str], dict[str, Any]]
) -> None:
    """Each "a ± b" outside the generated tables is a difference to dense runs of the regime map, or stands in a table."""
    statistics_of = benchmark("regime_statistics")
    tables = benchmark("regime_tables")
    records = statistics_of.load_regimes(tables.FOLDER)
    known = set()
    for plan in benchmark("regime_plans").PLANS:
        names = {run.name for run in benchmark("regime_plans").plan(plan)}
        places: dict[str, list[Any]] = {}
        for record in records:
            if record["name"] in names:
                places.setdefault(str(record["regime"]), []).append(record)
        for here in map(statistics_of.by_setting, places.values()):
            found = [one.difference for one in here.values()]
            # an idea is compared with the same run without it, and a run with a random share of its size
            ideas = [(here[name], here[name.split("-idea")[0]]) for name in here if name.split("-idea")[0] in here]
            shares = [(here[name[11:-10]], here[name]) for name in here if name[11:-10] in here]
            found += [statistics_of.compared(one.runs, other.runs) for one, other in ideas + shares]
            known |= {tables.difference_cell(each).lstrip("+-") for each in found}
    sizes = (settings_at(f"cifar10-n1000-pretrained64-e16-b{size}")["dense"].runs for size in (40, 64))
    known.add(tables.difference_cell(statistics_of.compared(*sizes)).lstrip("+-"))
    figure = re.compile(r"\d+\.\d+ ± \d+\.\d+")
    named = {}
    for page in benchmark("summarize").pages():
        text = page.read_text()
        known |= {found for table in GENERATED.finditer(text) for found in figure.findall(table[0])}
        named |= dict.fromkeys(figure.findall(GENERATED.sub("", text)), page.name)
    assert {found: page for found, page in named.items() if found not in known} == {}


def test_what_the_pages_say_of_time_is_on_record(settings_at: Callable[[str], dict[str, Any]]) -> None:
    wide = settings_at("cifar10-n50000-resnet32-e16-b128")
    kept = {name: one for name, one in wide.items() if name.startswith("prune-") and name.endswith("-stepskeep")}
    (ours,) = {f"{one.shared_time:.1f}" for one in kept.values() if one.shared_time}
    others = [wide[name].shared_time for name in ("partial-coverage0.9", "infobatch")]
    assert f"ours with steps kept took {ours} times the time of dense training" in TEXT
    assert f"`partial` {others[0]:.1f} times, InfoBatch's rule {others[1]:.1f} times" in TEXT
    whole = settings_at("fashion_mnist-n60000-resnet16-e16-b128")
    recommended, fewer = (whole[f"prune-coverage0.97-gatesoft-steps{steps}-cooldown2"] for steps in ("keep", "follow"))
    said = f"On one CPU thread {recommended.work_share:.2f} of the work took {recommended.cpu_time:.2f} of the time "
    assert f"{said}(Fashion-MNIST, the recommended setting), and with fewer steps {fewer.cpu_time:.2f}" in TEXT
    hard, harder = (whole[f"prune-coverage{each}-gatetopk-stepsfollow"] for each in ("0.95", "0.9"))
    assert f"needs {hard.work_share:.2f} of the work and {hard.cpu_time:.2f} of the seconds" in TEXT
    assert f"at {harder.work_share:.2f} of the work and {harder.cpu_time:.2f} of the CPU time of dense training" in TEXT
    assert f"at {hard.work_share:.2f} and {hard.cpu_time:.2f}." in TEXT
    small = settings_at("fashion_mnist-n20000-resnet16-e24-b128")
    eighth = [small[f"prune-coverage0.97-gatesoft-steps{steps}-cooldown3"] for steps in ("keep", "follow")]
    times = (
        f'{eighth[0].cpu_time:.2f} of the CPU time of dense training with `"keep"` and {eighth[1].cpu_time:.2f} with'
    )
    assert f'{times} `"follow"`, for {eighth[0].work_share:.2f} of the work' in TEXT
    both = (small, settings_at("cifar10-n20000-resnet16-e24-b128"))
    shares = [f"{one['prune-coverage0.9-gatesoft-stepsfollow'].shared_time:.2f}" for one in both]
    assert f'and {shares[0]} (Fashion-MNIST) and {shares[1]} (CIFAR-10) of it with `"follow"`' in TEXT


def test_what_the_pages_say_of_fine_tuning_is_on_record(
    benchmark: Any, settings_at: Callable[[str], dict[str, Any]]
) -> None:
    statistics_of = benchmark("regime_statistics")
    tables = benchmark("regime_tables")
    here = settings_at("cifar10-n1000-pretrained64-e16-b64")
    kept = "prune-coverage0.97-gatesoft-stepskeep-cooldown2"
    chance = here[f"random-like{kept}-stepskeep"]
    lost = [
        tables.difference_cell(one.difference)[1:]
        for one in (
            here[kept],
            here["prune-coverage0.97-gatesoft-stepsfollow-cooldown2"],
            here["dense-length11"],
            chance,
        )
    ]
    said = f"steps kept lost {lost[0]} points, schedules that follow {lost[1]}, a random share with the steps kept {lost[3]}"
    assert f"{said}, and a dense run of 11 epochs {lost[2]}." in TEXT
    worse = tables.difference_cell(statistics_of.compared(here[kept].runs, chance.runs))[1:]
    assert f"Selecting made it worse than chance with the steps kept, by {worse}" in TEXT
    smaller = settings_at("cifar10-n1000-pretrained64-e16-b40")["dense"]
    found = tables.difference_cell(statistics_of.compared(smaller.runs, here["dense"].runs))
    assert TEXT.count(f"dense training in batches of 40 lost nothing ({found})") == 2
    slower = tables.difference_cell(here[f"{kept}-ideasmaller-steps"].difference)[1:]
    assert f'`"keep"` lost {slower}.' in TEXT


def test_what_the_pages_say_of_ideas_on_top_of_a_hard_cut_is_on_record(
    benchmark: Any, settings_at: Callable[[str], dict[str, Any]]
) -> None:
    statistics_of = benchmark("regime_statistics")
    tables = benchmark("regime_tables")
    text = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    here = settings_at("fashion_mnist-n20000-resnet16-e24-b128")

    def found(steps: str, idea: str) -> str:
        plain = f"prune-rate0.4-gatetopk-steps{steps}"
        return str(tables.difference_cell(statistics_of.compared(here[f"{plain}-idea{idea}"].runs, here[plain].runs)))

    for said, idea in (
        ("Averaging a score over visits: {}.", "smoothed"),
        ("Adding its change since the visit before: {}.", "progress"),
        ("A random twentieth beside the cut: {}.", "random-beside"),
        ("A floor for each class: {}.", "class-floor"),
        ("Scores of a weight-averaged model: {}, for", "averaged-model"),
        ("KAKURENBO's learning rate, times 1/(1-F): {}, and", "higher-rate"),
        ("A partial backward over two thirds of each pruned batch: {}, for", "partial-inside"),
    ):
        assert said.format(found("keep", idea)) in text
    assert f"and {found('replan', 'higher-rate')} with the fewer steps" in text
    plain = here["prune-rate0.4-gatetopk-stepskeep"].work_share
    for idea in ("averaged-model", "partial-inside"):
        share = here[f"prune-rate0.4-gatetopk-stepskeep-idea{idea}"].work_share
        assert f"for {share:.2f} in place of {plain:.2f} of the work" in text


def test_what_the_pages_say_of_the_whole_map_is_on_record(benchmark: Any) -> None:
    aims = [row for row in benchmark("regime_aims").aims_table().splitlines() if "points below dense anywhere" in row]
    figure = re.compile(r"\| ([+-][\d.]+) on the mean of (\d+) places; more is lost at (\d+), beyond chance at (\d+)")
    (recommended, short, follows, careful) = (figure.findall(row)[0] for row in aims)
    assert [int(each[3]) for each in (recommended, careful)] == [1, 1]
    assert min(int(each[3]) for each in (short, follows)) > 1
    assert f"is {recommended[0]} points on the mean of {recommended[1]} places" in TEXT
    assert (
        f"At {recommended[2]} of them the mean loss is more than 0.2. Three seeds can prove that at one alone" in TEXT
    )
    cells = benchmark("regime_map").map_table().replace("\n", " | ").split(" | ")
    whole = [cell for cell in cells if cell.endswith(" at 1.00")]
    largest = max(abs(float(cell.split()[0])) for cell in whole)
    assert f"the means still differ by up to {largest:.1f} points" in TEXT
