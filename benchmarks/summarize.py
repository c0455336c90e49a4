"""README's tables from the records: `python benchmarks/summarize.py` writes them, `--check` fails where they differ."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "records"

NAMES = {
    "dense": "dense",
    "dense-shortened": "dense, shortened to the FLOPs of `subset`",
    "random": "random, `subset`",
    "mask": "soft gate, EL2N, `mask`",
    "subset": "**soft gate, EL2N, `subset`**",
    "subset-none": "the same, no weights",
    "subset-unbiased": "the same, weights 1/p",
    "original": "the original's rule, masking",
    "original-clip": "the original's rule, masking, gradients clipped at 1.0",
}


def load(benchmark: str) -> list[dict[str, Any]]:
    """All records of a benchmark."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return [record for record in records if record["benchmark"] == benchmark]


def spread(values: list[float], scale: float, digits: int) -> str:
    """Mean, and each value where there are several."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({' / '.join(f'{scale * v:.{digits}f}' for v in values)})"


def accuracy_tables() -> str:
    """One table for each hardware and setting of the CIFAR-10 records."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in load("cifar10-resnet9"):
        settings = {k: v for k, v in record["settings"].items() if k != "epochs"}
        settings["rate"] = record["rate"]
        groups[record["hardware"], json.dumps(settings)][record["policy"]].append(record)
    parts = []
    for (hardware, text), policies in groups.items():
        settings = json.loads(text)
        dense = {r["seed"]: r for r in policies["dense"]}
        parts += [
            f"CIFAR-10, ResNet-9 of width {settings['width']}, {settings['train_images']:,} training images, "
            f"B = {settings['batch_size']}, target rate {settings['rate']}, {settings['precision']}, {hardware}, "
            f"torch {next(iter(dense.values()))['versions']['torch']}. Means (each seed).",
            "",
            "| run | epochs | test accuracy % | FLOPs, share of dense | samples trained on, share of dense "
            "| activation rate when sparse |",
            "|---|---|---|---|---|---|",
        ]
        for policy, name in NAMES.items():
            runs = sorted(policies.get(policy, []), key=lambda r: r["seed"])
            if runs:
                parts.append(row(name, runs, dense))
        parts.append("")
    return "\n".join(parts).strip()


def row(name: str, runs: list[dict[str, Any]], dense: dict[int, dict[str, Any]]) -> str:
    """One policy, compared with the dense run of the same seed."""

    def share(key: str) -> str:
        return f"{statistics.median(r[key] / dense[r['seed']][key] for r in runs):.2f}"

    rates = [r["sparse_activation_rate"] for r in runs if not r["policy"].startswith("dense")]
    return " | ".join(
        [
            f"| {name}",
            "/".join(sorted({str(r["settings"]["epochs"]) for r in runs})),
            spread([r["accuracy"] for r in runs], 100, 1),
            share("flops"),
            share("samples_selected"),
            (spread(rates, 1, 3) if rates else "-") + " |",
        ]
    )


def flops_table() -> str:
    """FLOPs of whole steps beside the cost model."""
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
    """Step times beside the cost model, for each machine."""
    parts = []
    for record in load("step-time"):
        parts += [
            f"Time of a whole step as a share of dense, {record['model']}, {record['hardware']}, torch "
            f"{record['versions']['torch']}: medians of interleaved rounds (each round).",
            "",
            "| mode | r | ms | share of dense | cost model |",
            "|---|---|---|---|---|",
        ]
        parts += [
            f"| `{r['mode']}` | {r['rate']} | {r['milliseconds']} | {r['share_of_dense']:.2f} "
            f"({' / '.join(f'{s:.2f}' for s in r['share_by_round'])}) | {r['cost_model']:.2f} |"
            for r in record["rows"]
        ]
        parts.append("")
    return "\n".join(parts).strip()


def rendered(readme: str) -> str:
    """README with its tables replaced."""
    for name, table in (("accuracy", accuracy_tables()), ("flops", flops_table()), ("time", time_table())):
        begin, end = f"<!-- {name}: generated by benchmarks/summarize.py -->", f"<!-- /{name} -->"
        head, rest = readme.split(begin)
        readme = head + begin + "\n" + table + "\n" + end + rest.split(end)[1]
    return readme


def main() -> int:
    """Write README, or check it."""
    path = ROOT / "README.md"
    text = path.read_text()
    fresh = rendered(text)
    if "--check" in sys.argv[1:]:
        if fresh != text:
            print("README.md differs from its records: run python benchmarks/summarize.py")
            return 1
        return 0
    path.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
