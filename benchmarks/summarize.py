"""The pages' tables from the records: `python benchmarks/summarize.py` writes them, `--check` fails on a difference."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from recipe_tables import recipe_tables
from regime_aims import aims_table, equal_work_table
from regime_headline import draw, drawn_points, points, short_table
from regime_map import map_table
from regime_noise import noise_table
from regime_tables import (
    coverage_table,
    curriculum_table,
    headline_table,
    ideas_table,
    short_coverage_table,
    steps_table,
)
from scale_table import scale_tables

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
RECORDS = ROOT / "benchmarks" / "records"
PICTURE = ROOT / "docs" / "headline.svg"

NAMES = {
    "dense": "dense",
    "dense-shortened": "dense, shortened",
    "random": "random, `subset`",
    "mask": "soft gate, EL2N, `mask`",
    "partial": "**soft gate, EL2N, `partial`**",
    "partial-exact": "the same, BatchNorm exact",
    "subset": "soft gate, EL2N, `subset`",
    "subset-none": "the same, no weights",
    "subset-unbiased": "the same, weights 1/p",
    "prune": "**soft gate, remembered EL2N, `prune`**",
    "prune-random": "a random share, `prune`",
    "infobatch": "InfoBatch's rule",
    "original": "the original's rule, masking",
    "original-clip": "the original's rule, masking, gradients clipped at 1.0",
}

IDEAS = {
    "prune": '`mode="prune"` as it is',
    "dense": "every epoch dense",
    "class-balance": "significance relative to the mean of its class",
    "some-easy": "half of the mean significance added to all: easy samples in every batch",
    "progress": "change since the visit before added to the significance",
    "relative": "significance relative to the mean of the epoch in which it was scored",
    "rank": "rank in place of significance",
    "mean-of-visits": "running mean over visits, and so over augmentations",
    "age": "a score moves to the mean as it ages",
    "loss": "loss as significance",
    "sqrt": "weights p^-1/2",
    "unbiased": "weights 1/p",
    "topk": "the most significant alone",
    "random": "a random share",
    "warmup-3": "3 dense epochs first, a lower rate after them",
    "warmup-5": "5 dense epochs first, a lower rate after them",
    "cooldown-0": "no dense epochs at the end, a higher rate before it",
    "cooldown-1": "1 dense epoch at the end",
    "cooldown-4": "4 dense epochs at the end, a lower rate before them",
    "averaged-model": "EL2N of a weight-averaged model (its forward is not counted)",
    "partial-inside": "partial backward over 2/3 of each pruned batch (two thirds of the backward)",
}


def load(benchmark: str) -> list[dict[str, Any]]:
    """Read all records of a benchmark."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return [record for record in records if record["benchmark"] == benchmark]


def spread(values: list[float], scale: float, digits: int) -> str:
    """Write the mean, and each value where there are several."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({' / '.join(f'{scale * v:.{digits}f}' for v in values)})"


def accuracy_tables() -> str:
    """Make a table for each hardware and setting of the CIFAR-10 records: runs of one length by their work."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in load("cifar10-resnet9"):
        settings = {k: v for k, v in record["settings"].items() if k != "epochs"}
        groups[record["hardware"], json.dumps(settings)].append(record)
    parts = []
    by_size = sorted(groups.items(), key=lambda group: -group[1][0]["settings"]["train_images"])  # the whole set first
    for (hardware, text), records in by_size:
        settings = json.loads(text)
        dense = [r for r in records if r["policy"] == "dense"]
        epoch_flops = statistics.mean(r["flops"] / r["settings"]["epochs"] for r in dense)
        parts += [
            f"CIFAR-10, ResNet-9 of width {settings['width']}, {settings['train_images']:,} training images, "
            f"B = {settings['batch_size']}, {settings['precision']}, {hardware}, torch "
            f"{dense[0]['versions']['torch']}. Means (each seed). Work: counted FLOPs, scoring included, in epochs of "
            "dense training.",
            "",
            "| run | r | epochs | work | test accuracy % | activation rate when sparse |",
            "|---|---|---|---|---|---|",
        ]
        runs: dict[tuple[str, float, int], list[dict[str, Any]]] = defaultdict(list)
        for r in sorted(records, key=lambda r: r["seed"]):
            runs[r["policy"], r["rate"], r["settings"]["epochs"]].append(r)
        rows = [accuracy_row(same, epoch_flops) for same in runs.values()]
        parts += [line for _, line in sorted(rows, key=lambda row: row[0], reverse=True)]
        parts.append("")
    return "\n".join(parts).strip()


def accuracy_row(runs: list[dict[str, Any]], epoch_flops: float) -> tuple[float, str]:
    """Return the work of one policy, and its line."""
    first = runs[0]
    work = statistics.mean(r["flops"] for r in runs) / epoch_flops
    chosen = first["policy"].startswith("dense") or first["policy"] == "infobatch"
    rates = [r["sparse_activation_rate"] for r in runs if r["sparse_activation_rate"] is not None]
    cells = [
        NAMES[first["policy"]],
        "-" if chosen else f"{first['rate']:g}",
        str(first["settings"]["epochs"]),
        f"{work:.1f}",
        spread([r["accuracy"] for r in runs], 100, 1),
        "-" if chosen else spread(rates, 1, 3),
    ]
    return work, "| " + " | ".join(cells) + " |"


def flops_table() -> str:
    """Show FLOPs of whole steps beside the cost model."""
    (record,) = load("step-flops")
    lines = [
        f"FLOPs of {record['steps']} whole training steps as a share of dense, {record['model']}, counted by torch "
        f"{record['versions']['torch']}.",
        "",
        "| mode | target r | observed r | measured | ledger | formula |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r['mode']}` | {r['target']} | {r['observed_rate']:.3f} | {r['measured_share']:.3f} | "
        f"{r['ledger_share']:.3f} | {r['formula_share']:.3f} |"
        for r in record["rows"]
    ]
    return "\n".join(lines)


def time_table() -> str:
    """Show step times beside the ideal, one table for each machine, one line for each model and rate."""
    machines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in load("step-time"):
        machines[f"{record['hardware']}, {record['precision']}, torch {record['versions']['torch']}"].append(record)
    parts = []
    for machine, records in machines.items():
        parts += [
            f"Time of a whole step as a share of dense, {machine}: medians of interleaved rounds (least to most).",
            "",
            "| model, input, batch | dense, ms | r | `mask` | `subset` | **`partial`** | ideal of it | `prune` |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for record in records:
            by = {(r["mode"], r["rate"]): r for r in record["rows"]}
            dense = f"{by['dense', 1.0]['milliseconds']:.0f}"
            parts += [
                f"| {model_name(record)} | {dense} | {rate:g} | {shares(by.get(('mask', rate)))} | "
                f"{shares(by['subset', rate])} | {shares(by['partial', rate])} | "
                f"{share(by['partial', rate]['ideal_share'])} | {shares(by.get(('prune', rate)))} |"
                for mode, rate in by
                if mode == "partial"
            ]
        parts.append("")
    return "\n".join(parts).strip()


def model_name(record: dict[str, Any]) -> str:
    """Name a model with the size of its input and its batch."""
    cut = ", hard cut" if record.get("gate") == "topk" else ""
    return f"{record['model']}, {record['size']}, {record['batch_size']}{cut}"


def memory_table() -> str:
    """Show the peak of the memory, the time of the host and the steps of other methods, of records that have them."""
    records = [record for record in load("step-time") if record.get("host_milliseconds")]
    if not records:
        return "Not recorded yet."
    lines = [
        "Peak of the GPU's memory in a step, in GiB, at the largest recorded r; the time of a step of 8 samples, which "
        "is about what the host takes to launch it; and the time of a step of other methods as a share of dense: a "
        "whole batch with InfoBatch's loss, and Selective Backprop as Composer has it, which selects half.",
        "",
        "| model, input, batch | dense, GiB | `mask` | `subset` | `partial` | `prune` | dense, ms | dense, host, ms "
        "| `partial`, host, ms | InfoBatch | Selective Backprop |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        by: dict[str, dict[str, Any]] = {}
        for row in record["rows"]:
            by.setdefault(row["mode"], row)
        peaks = [memory(by.get(mode)) for mode in ("dense", "mask", "subset", "partial", "prune")]
        host = record["host_milliseconds"]
        times = [f"{by['dense']['milliseconds']:.0f}", f"{host['dense']:.1f}", f"{host['partial']:.1f}"]
        others = [shares(by.get(mode)) for mode in ("infobatch", "selective-backprop")]
        lines.append("| " + " | ".join([model_name(record), *peaks, *times, *others]) + " |")
    return "\n".join(lines)


def memory(row: dict[str, Any] | None) -> str:
    """Write the peak of the memory of a configuration; a dash where it is not known."""
    return "-" if row is None or row["peak_gibibytes"] is None else f"{row['peak_gibibytes']:.1f}"


def share(value: float | None) -> str:
    """Write a share; a dash where it is not known."""
    return "-" if value is None else f"{value:.2f}"


def shares(row: dict[str, Any] | None) -> str:
    """Return the median share of dense, and its range over the rounds."""
    if row is None:
        return "-"
    return f"{row['share_of_dense']:.2f} ({min(row['share_by_round']):.2f}-{max(row['share_by_round']):.2f})"


def prune_time_table() -> str:
    """Show the wall time of pruned epochs, one table for each machine."""
    parts = []
    for record in load("prune-time"):
        parts += [
            f"Wall time of a pruned epoch as a share of a dense epoch of the same run, {record['hardware']}, torch "
            f"{record['versions']['torch']}: quotient of the medians of a run's epochs, median of the runs (each run).",
            "",
            "| bound by | r | share | dense epoch, s |",
            "|---|---|---|---|",
        ]
        what = {"compute": "arithmetic (ResNet-9 in memory)", "loader": "loading (JPEG files, ImageFolder)"}
        runs: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
        for r in record["rows"]:
            runs[r["bound_by"], r["rate"]].append(r)
        for (kind, rate), same in runs.items():
            shares_of_runs = [r["share"] for r in same]
            each = " / ".join(f"{share:.2f}" for share in shares_of_runs)
            dense = statistics.median(s for r in same for s in r["dense_seconds"])
            parts.append(
                f"| {what[kind]} | {rate:g} | {statistics.median(shares_of_runs):.3f} ({each}) | {dense:.1f} |"
            )
        parts.append("")
    return "\n".join(parts).strip()


def prune_ideas_table() -> str:
    """Show what was tried to make pruning better, one table for each hardware and setting, the best first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in load("prune-ideas"):
        groups[record["hardware"], json.dumps({**record["settings"], "rate": record["rate"]})].append(record)
    parts = []
    for (hardware, text), records in groups.items():
        settings = json.loads(text)
        runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for r in sorted(records, key=lambda r: r["seed"]):
            runs[r["idea"]][r["seed"]] = r
        parts += [
            f"CIFAR-10, ResNet-9 of width {settings['width']}, {settings['train_images']:,} training images, "
            f"{settings['epochs']} epochs, B = {settings['batch_size']}, r = {settings['rate']:g}, "
            f"{settings['precision']}, {hardware}. Difference: to `prune` with the same seeds, with its standard "
            "error.",
            "",
            "| idea | samples, in dense epochs | test accuracy % | difference |",
            "|---|---|---|---|",
        ]
        rows = [ideas_row(idea, same, runs["prune"]) for idea, same in runs.items()]
        parts += [line for _, line in sorted(rows, reverse=True)]
        parts.append("")
    return "\n".join(parts).strip()


def ideas_row(idea: str, runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> tuple[float, str]:
    """Return the mean accuracy of one idea, and its line."""
    accuracies = [r["accuracy"] for r in runs.values()]
    first = next(iter(runs.values()))
    samples = first["samples_selected"] / first["samples_offered"] * first["settings"]["epochs"]
    gains = [100 * (runs[seed]["accuracy"] - base[seed]["accuracy"]) for seed in runs if seed in base]
    difference = "-" if idea == "prune" else f"{statistics.mean(gains):+.2f}"
    if idea != "prune" and len(gains) > 1:
        difference += f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}"
    line = f"| {IDEAS[idea]} | {samples:.1f} | {spread(accuracies, 100, 1)} | {difference} |"
    return statistics.mean(accuracies), line


def parity_table() -> str:
    """Show the error of partial backward, what went dense, and what BatchNorm's approximation changes."""
    (record,) = load("partial-parity")
    shares = record["shares"]
    lines = [
        f"Partial backward against exact masking, untrained models, batches of {round(1 / shares[0])}, float32, torch "
        f'{record["versions"]["torch"]}: relative L2 over all parameter gradients with `batchnorm="exact"` at r = '
        f'{" / ".join(f"{s:g}" for s in shares)}; ops that then run over all rows; with `"selected"`, cosine to the '
        "exact gradient and FLOPs of the backward as a share of dense, at the same r. One sample of these small images "
        "is too few values for BatchNorm, which then runs over all rows.",
        "",
        "| model | relative error | over all rows | cosine, `selected` | backward FLOPs, `selected` |",
        "|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        dense = ", ".join(sorted(f"`{name.split('.')[1]}`" for name in r["dense_ops"])) or "none"
        lines.append(
            f"| {r['model']} | {' / '.join(f'{e:.0e}' for e in r['errors'])} | {dense} | "
            f"{' / '.join(f'{c:.2f}' for c in r['cosines'])} | {flops_shares(r)} |"
        )
    return "\n".join(lines)


def flops_shares(row: dict[str, Any]) -> str:
    """Show FLOPs at each rate, where torch counts those of all its ops."""
    if None in row["flops_shares"]:
        return "not counted"
    return " / ".join(f"{share:.2f}" for share in row["flops_shares"])


def batchnorm_table() -> str:
    """Show the cosine to the exact masked gradient along a training."""
    (record,) = load("partial-batchnorm")
    rates = sorted({r["rate"] for r in record["rows"]}, reverse=True)
    lines = [
        "Cosine to the exact masked gradient after each epoch of a short CIFAR-10 training of ResNet-9 (width 16, B = "
        "256):",
        "",
        "| epoch | " + " | ".join(f"`partial`, r = {rate:g} | `subset`, r = {rate:g}" for rate in rates) + " |",
        "|---|" + "---|---|" * len(rates),
    ]
    for epoch in sorted({r["epoch"] for r in record["rows"]}):
        here = {r["rate"]: r for r in record["rows"] if r["epoch"] == epoch}
        cells = " | ".join(f"{here[rate]['partial']:.2f} | {here[rate]['subset']:.2f}" for rate in rates)
        lines.append(f"| {epoch} | {cells} |")
    return "\n".join(lines)


def support_table() -> str:
    """Show the support matrix: the rules that its tests hold every set-up to."""
    from tests.compatibility.matrix import markdown

    return markdown()


def loaders_table() -> str:
    """Show the kinds of loaders: the rules that their tests hold them to."""
    from tests.compatibility.loaders import markdown

    return markdown()


def bad_samples_table() -> str:
    """Show runs with images that hold NaN or infinity."""
    (record,) = load("bad-samples")
    settings = record["settings"]
    lines = [
        f"CIFAR-10, {settings['train_limit']:,} training images, ResNet-9 of width {settings['width']}, "
        f"{settings['epochs']} epochs, bf16-mixed, r = {settings['rate']:g}, one seed, {record['hardware']}: "
        "`benchmarks/bad_samples.py`.",
        "",
        "| run | images with NaN or infinity | test accuracy % | parameters finite | left out, by epoch |",
        "|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        name = "plain Lightning" if r["policy"] == "plain" else f"`{r['policy']}`"
        finite = "yes" if r["finite"] else "**no**"
        left_out = "-" if r["policy"] == "plain" else " ".join(map(str, r["quarantined_by_epoch"]))
        lines.append(f"| {name} | {r['corrupted']} | {100 * r['accuracy']:.1f} | {finite} | {left_out} |")
    return "\n".join(lines)


def warmup_table() -> str:
    """Show the cost of the callback where it does nothing."""
    (record,) = load("warmup-time")
    modes = list(record["rows"][0]["share"])
    lines = [
        f"Time of a warmup step as a share of the same step without the callback, {record['hardware']}, torch "
        f"{record['versions']['torch']}: every second step goes without, medians of an epoch, median of the epochs "
        f"(least to most). A logged step (every {record['log_every_steps']}th) takes "
        f"{1000 * record['log_seconds']:.1f} ms besides.",
        "",
        "| ResNet-9, CIFAR-10 | plain step, ms | " + " | ".join(f"`{mode}`" for mode in modes) + " |",
        "|---|---|" + "---|" * len(modes),
    ]
    for r in record["rows"]:
        shares = " | ".join(f"{r['share'][m]:.3f} ({min(r['shares'][m]):.3f}-{max(r['shares'][m]):.3f})" for m in modes)
        name = f"width {r['width']}, B = {r['batch_size']}"
        lines.append(f"| {name} | {1000 * r['plain_seconds']:.1f} | {shares} |")
    return "\n".join(lines)


def overhead_table() -> str:
    """Show what the callback adds to small steps and to short runs, on each machine."""
    parts = []
    for record in [*load("overhead"), *load("overhead-short-run")]:
        machine = f"{record['hardware']}, torch {record['versions']['torch']}, commit {record['commit']}"
        if record["benchmark"] == "overhead":
            what = f"A step of a three-layer MLP of width {record['width']}, B = {record['batch_size']}, r = "
            what += f"{record['rate']:g}"
        else:
            what = f"A whole fit of {record['steps']} steps of a GroupNorm network ({record['channels']} channels, "
            what += f"{record['pixels']} px), B = {record['batch_size']}"
        parts += [
            f"{what}, as a share of the same without the callback, {machine}: medians of "
            f"{len(record['rows'][0]['share_by_round'])} interleaved rounds (least to most).",
            "",
            "| run | ms | share |",
            "|---|---|---|",
        ]
        for r in record["rows"]:
            spread_of_rounds = f"({min(r['share_by_round']):.2f}-{max(r['share_by_round']):.2f})"
            name = f"`{r['variant']}`" if r["variant"] in ("mask", "partial", "subset", "prune") else r["variant"]
            parts.append(f"| {name} | {r['milliseconds']:.2f} | {r['share_of_plain']:.2f} {spread_of_rounds} |")
        parts.append("")
    return "\n".join(parts).strip()


def monitored_table() -> str:
    """Show what watching costs, and where the joules come from."""
    lines = []
    for r in load("monitored"):
        lines += [
            f"Fashion-MNIST, ResNet-9 of width {r['width']}, {r['train_limit']:,} training images, "
            f"{r['epochs']} epochs, B = {r['batch_size']}, coverage {r['coverage']}, {r['hardware']}: "
            "what both monitors do, timed from outside (but for noting each index as it is drawn).",
            "",
            "| run | seconds | watching, share of them | a step, ms | pictures at the end, s |",
            "|---|---|---|---|---|",
        ]
        for run in r["runs"]:
            name = run["mode"] if run["mode"] == "dense" else f"`{run['mode']}`"
            lines.append(
                f"| {name} | {run['seconds']:.0f} | {run['watching_share']:.2%} | {run['milliseconds_a_step']:.2f} | "
                f"{run['pictures_at_the_end_seconds']:.1f} |"
            )
    return "\n".join(lines)


def advice_table() -> str:
    """Show predictions beside ordinary runs."""
    records = load("advice")
    first = records[0]
    lines = [
        f"{first['hardware']}, torch {first['versions']['torch']}, {first['precision']}; medians of "
        f"{len(first['advise_seconds'])} rounds. A step: seconds predicted / measured, and the error; a run of "
        f"{first['epochs']} epochs, its first steps and all, likewise.",
        "",
        "| model, CIFAR-10 | mode | r | sparse step, s | error | run, s | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        for row in r["rows"]:
            name = "dense" if row["mode"] == "dense" else f"`{row['mode']}`"
            cells = [
                f"{row[f'{part}_predicted_seconds']:.{digits}f} / {row[f'{part}_measured_seconds']:.{digits}f} | "
                f"{100 * row[f'{part}_error']:+.0f} %"
                for part, digits in (("step", 3), ("run", 1))
            ]
            rate = "-" if row["mode"] == "dense" else row["rate"]
            lines.append(
                f"| {r['model']}, {r['size']} px, B = {r['batch_size']} | {name} | {rate} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def coverage_of_tests() -> str:
    """Tell how much of the package the tests run."""
    records = load("test-coverage")
    if not records:
        return "Not recorded yet."
    (r,) = records
    return (
        f"The tests run {r['lines_run'] / r['lines']:.1%} of the {r['lines']:,} statements of `lightning_ast/` and "
        f"{r['branches_run'] / r['branches']:.1%} of its {r['branches']:,} branches (commit {r['commit']}; on a CPU, "
        "without what runs in processes of their own)."
    ).replace("%", " %")


def third_party_table() -> str:
    """Show what happened to other people's LightningModules."""
    from tests.third_party.outcomes import OUTCOMES

    lines = ["| package | module | modes | outcome | |", "|---|---|---|---|---|"]
    for o in OUTCOMES:
        modes = "all" if len(o.modes) == 4 else ", ".join(f"`{mode}`" for mode in o.modes)
        lines.append(f"| {o.package} | {o.module} | {modes} | {o.outcome} | {o.note} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy_tables,
    "flops": flops_table,
    "loaders": loaders_table,
    "time": time_table,
    "time-host": memory_table,
    "prune-time": prune_time_table,
    "parity": parity_table,
    "batchnorm": batchnorm_table,
    "support": support_table,
    "bad-samples": bad_samples_table,
    "warmup-time": warmup_table,
    "monitored": monitored_table,
    "advice": advice_table,
    "test-coverage": coverage_of_tests,
    "outcomes": third_party_table,
    "regime-short": short_table,
    "regime-headline": headline_table,
    "regime-equal-work": equal_work_table,
    "regime-aims": aims_table,
    "regime-map": map_table,
    "regime-steps": steps_table,
    "regime-coverage": coverage_table,
    "regime-coverage-short": short_coverage_table,
    "regime-ideas": ideas_table,
    "regime-curriculum": curriculum_table,
    "regime-noise": noise_table,
    "overhead": overhead_table,
    "prune-ideas": prune_ideas_table,
    **recipe_tables(RECORDS / "recipes"),
    **scale_tables(RECORDS),
}

FOLDERS = ("docs", "benchmarks", "tests/third_party")

_BEGIN = r"^<!-- (?P<name>[\w-]+): generated by benchmarks/summarize\.py -->$"
_TABLE = re.compile(rf"(?P<begin>{_BEGIN}\n).*?(?P<end>^<!-- /(?P=name) -->$)", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """List the pages that may hold tables."""
    return [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]


def tables_of(page: str) -> list[str]:
    """Name the tables of a page, by the comments that begin them."""
    return re.findall(_BEGIN, page, re.MULTILINE)


def rendered(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return a page with its tables replaced.

    Args:
        page: The text of the page. A comment begins a table, another ends it.
        tables: The functions that make the tables, by name.

    Raises:
        ValueError: A table is not known, or does not end.
    """
    whole = [found["name"] for found in _TABLE.finditer(page)]
    faulty = [name for name in tables_of(page) if name not in whole or name not in tables]
    if faulty:
        raise ValueError(f"expected tables that are known and that end with <!-- /NAME -->, got {', '.join(faulty)}")
    return _TABLE.sub(lambda found: f"{found['begin']}{tables[found['name']]()}\n{found['end']}", page)


def main() -> int:
    """Write the pages, or check them."""
    stale = []
    tables = {name: cache(table) for name, table in TABLES.items()}  # a table may stand on several pages
    for path in pages():
        text = path.read_text(encoding="utf-8")
        fresh = rendered(text, tables)
        if fresh != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                path.write_text(fresh, encoding="utf-8")
    shown = points()
    if shown and shown != drawn_points(PICTURE):
        stale.append(PICTURE.name)
        if "--check" not in sys.argv[1:]:
            draw(shown, PICTURE)
    if "--check" in sys.argv[1:] and stale:
        print(f"{' and '.join(stale)} differ from the records: run python benchmarks/summarize.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
