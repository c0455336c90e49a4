"""The tables of the regime map, for `summarize.py`: the headline, the map, and the answers to single questions."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from regime_plans import headline_runs, plan
from regime_run import Regime, Run
from regime_statistics import LEAST_SEEDS, Paired, Record, Setting, by_place, by_setting, load_regimes

__all__ = [
    "coverage_table",
    "curriculum_table",
    "headline_table",
    "ideas_table",
    "methods_table",
    "records_by_place",
    "seconds_cell",
    "short_coverage_table",
    "short_name",
    "steps_table",
]

FOLDER = Path(__file__).parent / "records" / "regimes"
NOTHING_YET = "Not recorded yet."
_DATA = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
_NETWORKS = {
    "resnet": "small ResNet of width",
    "resnet9": "ResNet-9 of width",
    "resnet18": "ResNet-18 of width",
    "mlp": "MLP of width",
    "vit": "small ViT of width",
    "pretrained": "EfficientNet-Lite0 (ImageNet weights) at pixels",
}
_POLICIES = {
    "infobatch": "InfoBatch's rule",
    "seta": "SeTa's rule",
    "orderdp": "OrderDP's rule",
    "selective-backprop": "Selective Backprop, as Composer has it",
    "original": "the original's package as it is, its own optimizer (Adam, constant rate)",
}
_STEPS = {"keep": "steps kept", "follow": "schedules follow", "replan": "steps planned anew"}
_GATES = {"topk": "hard cut", "soft": "soft gate", "threshold": "threshold"}
_IDEAS = {
    "random-beside": "a random 5 % beside the cut",
    "class-floor": "a floor of r/2 in every class",
    "smoothed": "the mean of the last score and of what was remembered before",
    "progress": "the change since the visit before added",
    "averaged-model": "scores of a weight-averaged model (its forward is counted)",
    "bounded": "every sample kept with probability 1/2 at least",
    "higher-rate": "KAKURENBO's learning rate 1/(1 - F)",
    "partial-inside": "partial backward over 2/3 of each pruned batch",
    "least-batch-32": "batches of 32 samples at least",
    "scaled-gradient": "the gradient times the share that is left of a batch",
    "smaller-steps": "the learning rate times the share that is left of a batch",
}


def setting_name(record: Record) -> str:
    """Describe the policy of a record and its settings."""
    options = record["options"]
    policy = record["policy"]
    if policy == "dense":
        parts = ["dense" if "length" not in options else f"dense, {options['length']} epochs"]
        if "lr" in options:
            parts.append(f"lr {options['lr']:g}")
        return ", ".join(parts)
    if policy == "random":
        target, value = re.findall(r"(coverage|rate)([\d.]+)", options["like"])[0]
        size = f"coverage {value}" if target == "coverage" else f"r = {value}"
        return f"a random share of the size of {size}, {_STEPS[options.get('steps', 'replan')]}"
    if policy in _POLICIES:
        return _POLICIES[policy]
    described = {
        "coverage": "coverage {:g}".format,
        "rate": "r = {:g}".format,
        "weighting": "{} weights".format,
        "lr": "lr {:g}".format,
        "gate": _GATES.__getitem__,
        "steps": _STEPS.__getitem__,
        "significance": "significance `{}`".format,
        "idea": lambda idea: _IDEAS.get(idea, ""),  # "trimmed" is described by its share
        "cooldown": "{} dense epochs at the end".format,
        "trim": "the most significant {:.0%} left out".format,
    }
    written = [write(options[name]) for name, write in described.items() if name in options]
    return ", ".join([f"`{policy}`", *filter(None, written)])


def place_name(regime: Regime) -> str:
    """Describe a place of the map."""
    parts = [_DATA[regime.data], f"{_NETWORKS[regime.network]} {regime.width}", f"{regime.images:,} images"]
    parts += [f"each {regime.redundancy} times"] * (regime.redundancy > 1)
    parts += [f"classes 1:{regime.imbalance:g}"] * (regime.imbalance > 1)
    parts += [f"{regime.noise:.0%} wrong labels"] * (regime.noise > 0)
    return ", ".join([*parts, f"{regime.epochs} epochs"])


def short_name(regime: Regime) -> str:
    """Name the data of a place, and the network where it is not the small one."""
    data, network, *_ = place_name(regime).split(", ")
    return data if regime.network == "resnet" else f"{data}, {network}, {regime.epochs} epochs"


def machine(records: Sequence[Record]) -> str:
    """Name hardware, precision, torch and the commits of some records."""
    seeds: dict[str, set[int]] = {}
    for record in records:
        seeds.setdefault(record["hardware"], set()).add(record["seed"])
    names = sorted(seeds)
    if len(names) > 1:
        names = [f"{name} (seeds {', '.join(map(str, sorted(seeds[name])))})" for name in names]
    precisions = sorted({record["precision"] for record in records})
    versions = sorted({record["versions"]["torch"] for record in records})
    commits = sorted({record["commit"] for record in records})
    return (
        f"{' and '.join(names)}; {' and '.join(precisions)}; torch {', '.join(versions)}; commits {', '.join(commits)}"
    )


def difference_cell(found: Paired | None) -> str:
    """Write a paired difference with its standard error; a dash for too few seeds."""
    return "-" if found is None else f"{found.mean:+.2f} ± {found.standard_error:.2f}"


def p_cell(found: Paired | None) -> str:
    """Write a p-value."""
    if found is None:
        return "-"
    return "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"


def accuracy_cell(setting: Setting) -> str:
    """Write mean and standard deviation of the final accuracy."""
    mean = f"{statistics.mean(setting.accuracies):.2f}"
    return mean if len(setting.runs) < 2 else f"{mean} ± {statistics.stdev(setting.accuracies):.2f}"


def seconds_cell(setting: Setting) -> str:
    """Write the time of training, with the GPU's joules where they were metered; a dash where it was not taken."""
    if setting.seconds is None:
        return "-"
    return f"{setting.seconds:,.0f}" + ("" if setting.joules is None else f" ({setting.joules / 1000:.1f} kJ)")


def methods_table(regime: Regime, records: Sequence[Record]) -> str:
    """Make the table of all settings at one place, the most work first."""
    settings = by_setting(records)
    lines = [
        f"{place_name(regime)}, B = {regime.batch_size}; {machine(records)}. Means over runs ± standard deviation; "
        "difference: to dense runs of the same seeds on the same hardware, ± standard error, with the p-value of the "
        f"paired t-test, not corrected for the rows (a dash: fewer than {LEAST_SEEDS} seeds). Work: forwards and "
        "backwards by their FLOPs, scoring included, in dense epochs. Seconds: of one CPU thread, or alone on a GPU "
        "(with the joules of the GPU). "
        "Shared GPU: the time as a share of dense, where as many runs shared the GPU. Best: of all validations.",
        "",
        "| run | runs (seeds) | test accuracy % | difference | p | work | steps | seconds | shared GPU | best % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in sorted(settings.items(), key=lambda item: -item[1].mean("work_epochs")):
        found = None if name == "dense" else setting.difference
        cells = [
            setting_name(setting.first),
            f"{len(setting.runs)} ({setting.seeds})",
            accuracy_cell(setting),
            difference_cell(found),
            p_cell(found),
            f"{setting.mean('work_epochs'):.1f}",
            f"{setting.mean('optimizer_steps'):,.0f}",
            seconds_cell(setting),
            "-" if setting.shared_time is None else f"{setting.shared_time:.2f}",
            f"{100 * setting.mean('best_accuracy'):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def records_by_place(runs: Iterable[Run], folder: Path) -> dict[Regime, list[Record]]:
    """Return the records of some runs at each of their places, which may have none, in the order of the runs."""
    runs = list(runs)
    names = {run.name for run in runs}
    found = by_place(record for record in load_regimes(folder) if record["name"] in names)
    return {run.regime: found.get(run.regime, []) for run in runs}


def _tables(runs: Iterable[Run], folder: Path) -> str:
    """Make the table of each place of some runs, from those of them that are recorded."""
    places = records_by_place(runs, folder)
    return "\n\n".join(methods_table(place, here) for place, here in places.items() if here) or NOTHING_YET


def headline_table(folder: Path = FOLDER) -> str:
    """Make the table of all methods on both data sets at full size."""
    return _tables(headline_runs(), folder)


def steps_table(folder: Path = FOLDER) -> str:
    """Make the tables that compare how the steps of a pruned run are counted."""
    return _tables(plan("steps"), folder)


def coverage_table(folder: Path = FOLDER) -> str:
    """Make the tables of the plan ``coverage``."""
    return _tables(plan("coverage"), folder)


def ideas_table(folder: Path = FOLDER) -> str:
    """Make the tables of what was tried, at the places where an idea is recorded and not its control alone."""
    runs = plan("ideas")
    recorded = {record["name"] for record in load_regimes(folder)}
    about = [run for run in runs if run.option("idea") or run.option("significance") or run.policy == "random"]
    tried = {run.regime for run in about if run.name in recorded}
    return _tables((run for run in runs if run.regime in tried), folder)


def curriculum_table(folder: Path = FOLDER) -> str:
    """Make the table of the rules of curriculum and active learning."""
    return _tables(plan("curriculum"), folder)


_SHORT = (
    "prune-coverage0.97-gatesoft-stepskeep",
    "prune-coverage0.95-gatesoft-stepskeep",
    "prune-coverage0.95-gatetopk-stepskeep",
    "prune-coverage0.9-gatesoft-stepskeep",
    "prune-coverage0.9-gatetopk-stepskeep",
    "prune-coverage0.97-gatesoft-stepsfollow",
    "prune-coverage0.95-gatetopk-stepsfollow",
    "prune-coverage0.9-gatesoft-stepsfollow",
    "prune-coverage0.9-gatetopk-stepsfollow",
    "prune-rate0.6-gatetopk-stepskeep",
    "partial-coverage0.9",
)


def short_coverage_table(folder: Path = FOLDER) -> str:
    """Make the table of coverages, gates and steps: what each lost, its work, its time, its rates."""
    records = by_place(load_regimes(folder))
    lines = [
        "Points of test accuracy against dense runs of the same seeds ± standard error; work as a share of dense; time "
        "as a share of dense among runs that shared a GPU; the rates of the first and of the last pruned epoch.",
        "",
        "| data | run | points | work | time, shared GPU | rates |",
        "|---|---|---|---|---|---|",
    ]
    for place in dict.fromkeys(run.regime for run in [*headline_runs(), *plan("coverage")]):
        settings = by_setting(records.get(place, []))
        found = [settings[name] for name in _SHORT if name in settings and settings[name].difference is not None]
        found += [
            one
            for one in settings.values()
            if one.first["policy"] == "dense" and set(one.first["options"]) == {"length"}
        ]
        for setting in found:
            if setting.difference is None or setting.work_share is None:
                continue
            rates = setting.pruned_rates()
            cells = [f"{short_name(place)}, {place.images:,} images", setting_name(setting.first)]
            cells += [difference_cell(setting.difference), f"{setting.work_share:.2f}"]
            cells.append("-" if setting.shared_time is None else f"{setting.shared_time:.2f}")
            cells.append(f"{rates[0]:.2f} to {rates[-1]:.2f}" if rates else "1")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 4 else NOTHING_YET
