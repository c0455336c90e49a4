"""The tables of mode `prune` at scale: seconds and memory by size, and what processes exchange by their number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["scale_tables"]

Record = dict[str, Any]
_RUN = 10**8  # samples of a run whose exchange is shown


def scale_tables(folder: Path) -> dict[str, Callable[[], str]]:
    """Return a function for each of the two tables, by the name of its block on the page."""

    def record() -> Record:
        found: Record = json.loads((folder / "scale-cpu.json").read_text())
        return found

    return {"scale": lambda: plan_table(record()), "scale-ranks": lambda: rank_table(record())}


def power(size: int) -> str:
    """Write a number of samples as a power of ten, where it is one."""
    digits = str(size)
    return f"10<sup>{len(digits) - 1}</sup>" if digits.strip("0") == "1" else f"{size:,}"


def gigabytes(count: float) -> str:
    """Write bytes in the unit that fits."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if count >= u or u == 1)
    return f"{count / unit:.3g} {name}"


def plan_table(record: Record) -> str:
    """Show what one process takes to remember and to plan, by the size of the data set."""
    lines = [
        f"One process, {record['hardware']}, torch {record['versions']['torch']}, rate {record['rate']}. Peak: memory "
        "of history, draws and plan together. A checkpoint holds history and plan.",
        "",
        "| samples | gate | observe, s | merge, s | plan, s | peak | peak, bytes a sample | checkpoint |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        saved = "-" if row["checkpoint_bytes"] is None else gigabytes(row["checkpoint_bytes"])
        times = [row[f"{part}_seconds"] for part in ("observe", "fold", "plan")]
        seconds = " | ".join(f"{time:.2g}" if time < 1 else f"{time:.1f}" for time in times)
        name = power(row["samples"]) + ("" if row["measured"] else ", calculated")
        each = row["peak_bytes"] / row["samples"]
        lines.append(
            f"| {name} | `{row['gate']}` | {seconds} | {gigabytes(row['peak_bytes'])} | {each:.0f} | {saved} |"
        )
    sampler = record["samplers"][-1]
    (shard,) = record["shards"]
    return "\n".join(
        [
            *lines,
            "",
            f"Beside it, with and without this package: torch's `RandomSampler` of {power(sampler['samples'])} samples "
            f"takes {sampler['seconds']:.1f} s and {gigabytes(sampler['peak_bytes'])} an epoch "
            f"({sampler['peak_bytes'] / sampler['samples']:.0f} bytes a sample). With `own_parts=True`, one of "
            f"{shard['parts']} processes at {power(shard['samples'])} samples, planned for a coverage of "
            f"{shard['coverage']}: {shard['seconds']:.1f} s, a peak of {gigabytes(shard['peak_bytes'])}, "
            f"{gigabytes(shard['exchanged_bytes'])} to exchange, and {gigabytes(shard['checkpoint_bytes'])} in the "
            f"checkpoint, which holds {gigabytes(shard['parts'] * shard['checkpoint_bytes'])} of all.",
        ]
    )


def rank_table(record: Record) -> str:
    """Show what processes exchange for the plan of an epoch, by their number."""
    lines = [
        f"Simulated in one process with {record['ranks'][0]['samples']:,} samples or a few less, each process with a "
        "history of its own; both gates.",
        "",
        f"| processes | plans agree | a process sends in an epoch, bytes a sample | at {power(_RUN)} samples |",
        "|---|---|---|---|",
    ]
    for count in dict.fromkeys(row["ranks"] for row in record["ranks"]):
        rows = [row for row in record["ranks"] if row["ranks"] == count]
        sent = rows[0]["scores_bytes_a_sample"] + rows[0]["draws_bytes_a_sample"]
        agreed = "yes" if all(row["agree"] for row in rows) else "**no**"
        lines.append(f"| {count:,} | {agreed} | {sent:.1f} | {gigabytes(sent * _RUN)} |")
    return "\n".join(lines)
