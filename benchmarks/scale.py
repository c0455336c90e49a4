"""What mode `prune` takes at 1e5 to 1e9 samples: seconds, memory, what processes exchange, and checkpoints.

    python benchmarks/scale.py

Each size runs in a process of its own, whose peak of memory is read. It never takes more than `--memory-gib`: a size
that would is calculated from the largest one that fits, and marked so. The processes of a run are simulated in one:
each has a history of its own, which meets the others in the same functions that a run calls. One record.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from record import RECORDS, kind, provenance, save
from torch import Tensor
from torch.utils.data import RandomSampler

from lightning_ast.core.gate import GateName
from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_epoch
from lightning_ast.core.plan_rules import common_rate
from lightning_ast.core.sample_record import SampleRecord
from lightning_ast.core.selector import SampleSelector

RATE = 0.4
GATES: tuple[GateName, ...] = ("topk", "soft")
SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
RANKS = (1, 2, 8, 64, 256, 1024)
BYTES_A_SAMPLE = 48
"""More than any size below takes, with the scores and the draws that are given to it: what is run is chosen by it."""
HISTORY_BYTES = 10
"""A sample: its score twice, once for the running epoch, and the count of its visits."""
LARGEST_SAVED = 2 * 10**7
SHARDS = 64
COVERAGE = 0.9
BATCH = 2**18


def peak_bytes() -> int:
    """Return the largest memory that this process has had since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_peak() -> int:
    """Begin a new peak; return the memory of now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def scores_and_draws(size: int) -> tuple[Tensor, Tensor]:
    """Return scores as networks give them (many small, few large), and an order of the samples."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(size).exponential_(generator=generator), torch.randperm(size, generator=generator)


def selector_of(gate: GateName) -> SampleSelector:
    """Return the selector of mode `prune`."""
    return SampleSelector(target_activation_rate=RATE, gate=gate, weighting="none")


def observed(scores: Tensor, draws: Tensor) -> tuple[SignificanceHistory, SampleRecord]:
    """Remember the scores and the visits of an epoch in one process, batch by batch."""
    history = SignificanceHistory(len(scores))
    history.record = SampleRecord(len(scores))
    for indices, values in zip(draws.split(BATCH), scores.split(BATCH), strict=True):
        history.observe(indices, values)
        history.record.count(indices, epoch=0)
    return history, history.record


def measure(size: int, gate: GateName) -> dict[str, Any]:
    """Observe, fold and plan a data set in one process."""
    scores, draws = scores_and_draws(size)
    base = reset_peak()
    times = [time.perf_counter()]
    history, record = observed(scores, draws)
    times.append(time.perf_counter())
    history.fold()
    times.append(time.perf_counter())
    plan = plan_epoch(history, draws, epoch=1, count=int(RATE * size), selector=selector_of(gate))
    times.append(time.perf_counter())
    observe, fold, made = (b - a for a, b in pairwise(times))
    return {
        "samples": size,
        "gate": gate,
        "observe_seconds": observe,
        "fold_seconds": fold,
        "plan_seconds": made,
        "peak_bytes": peak_bytes() - base + draws.nbytes,  # the plan needs the draws of the epoch
        "history_bytes": HISTORY_BYTES * size,
        "checkpoint_bytes": saved_bytes(history, record, plan),
    }


def saved_bytes(history: SignificanceHistory, record: SampleRecord, plan: EpochPlan) -> int | None:
    """Return the size of what a checkpoint holds of them; None where writing it would take too much memory."""
    if len(history) > LARGEST_SAVED:
        return None
    file = io.BytesIO()
    torch.save({"history": history.state_dict(), "samples": record.state_dict(), "plan": plan.state_dict()}, file)
    return file.tell()


def measure_sampler(size: int) -> dict[str, Any]:
    """Draw an epoch from torch's own RandomSampler, which a run without this package does too."""
    base = reset_peak()
    begin = time.perf_counter()
    for _ in RandomSampler(range(size)):
        pass
    return {"samples": size, "seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes() - base}


def measure_shard(size: int, gate: GateName) -> dict[str, Any]:
    """Observe, fold and plan one of 64 equal parts of a data set, as a process does with `own_parts=True`."""
    own = size // SHARDS
    scores, draws = scores_and_draws(own)
    base = reset_peak()
    history, record = observed(scores, draws)
    history.fold()
    begin = time.perf_counter()
    asked = []

    def total(values: Tensor) -> Tensor:
        asked.append(values.nbytes)
        return SHARDS * values  # the other parts are taken to be like this one

    rate = common_rate(history.significance(), COVERAGE, gate, total=total)
    plan = plan_epoch(history, draws, epoch=1, count=int(rate * own), selector=selector_of(gate))
    return {
        "samples": size,
        "parts": SHARDS,
        "coverage": COVERAGE,
        "rate": plan.activation_rate,
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak_bytes() - base + draws.nbytes,
        "exchanged_bytes": sum(asked),
        "checkpoint_bytes": saved_bytes(history, record, plan),  # of this part
    }


ONE = {"plan": measure, "sampler": lambda size, _: measure_sampler(size), "shard": measure_shard}


def in_process(what: str, size: int, gate: str, threads: int) -> dict[str, Any]:
    """Run a measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", what, str(size), gate, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def planned_rows(sizes: list[int], limit: float, threads: int) -> list[dict[str, Any]]:
    """Measure the sizes that fit, and calculate the others from the largest of them."""
    rows = []
    for gate in GATES:
        last: dict[str, Any] | None = None
        for size in sizes:
            if size * BYTES_A_SAMPLE <= limit:
                last = {**in_process("plan", size, gate, threads), "measured": True}
                rows.append(last)
            elif last is not None:
                scale = size / last["samples"]
                keys = ("observe_seconds", "fold_seconds", "plan_seconds", "peak_bytes", "history_bytes")
                calculated = {key: last[key] * scale for key in keys}
                rows.append({"samples": size, "gate": gate, **calculated, "checkpoint_bytes": None, "measured": False})
            print(rows[-1])
    return rows


def agree(size: int, ranks: int, gate: GateName) -> dict[str, Any]:
    """Let every process observe its part of an epoch, fold, gather the draws and plan; compare all plans."""
    scores, draws = scores_and_draws(size - size % ranks)
    size = len(scores)
    histories = [SignificanceHistory(size) for _ in range(ranks)]
    for rank, history in enumerate(histories):
        own = draws[rank::ranks]
        history.observe(own, scores[own])
    recent = histories[0].state_dict()["recent"]
    for history in histories[1:]:
        recent = torch.maximum(recent, history.state_dict()["recent"])  # what an all-reduce gives to each of them
    gathered = torch.stack([draws[rank::ranks].int() for rank in range(ranks)], dim=1).reshape(-1).long()
    first: EpochPlan | None = None
    equal = True
    begin = time.perf_counter()
    for history in histories:
        history.fold(lambda _: recent)
        plan = plan_epoch(history, gathered, epoch=1, count=int(RATE * size), selector=selector_of(gate))
        first = plan if first is None else first
        equal = equal and torch.equal(plan.indices, first.indices)
    passed = (ranks - 1) / ranks  # the share of a tensor that each process sends in one turn of a ring
    return {
        "ranks": ranks,
        "samples": size,
        "gate": gate,
        "agree": equal,
        "seconds_a_rank": (time.perf_counter() - begin) / ranks,
        "scores_bytes_a_sample": 2 * 4 * passed,  # an all-reduce of float32 is two turns
        "draws_bytes_a_sample": 4 * passed,  # an all-gather of int32 is one
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-gib", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--simulated", type=int, default=2**16, help="samples of the simulated processes")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    if options.one:
        torch.set_num_threads(options.threads)
        what, size, gate = options.one
        print(json.dumps(ONE[what](int(size), gate)))
        return
    sizes = [int(size) for size in options.sizes]
    limit = options.memory_gib * 2**30
    rows = planned_rows(sizes, limit, options.threads)
    shards = [in_process("shard", size, "soft", options.threads) for size in sizes[-1:]]
    samplers = [in_process("sampler", size, "soft", options.threads) for size in sizes if size <= 10**7]
    ranks = [agree(options.simulated, count, gate) for gate in GATES for count in options.ranks]
    for row in (*shards, *samplers, *ranks):
        print(row)
    record = {
        "benchmark": "scale",
        "rate": RATE,
        "rows": rows,
        "shards": shards,
        "samplers": samplers,
        "ranks": ranks,
        **provenance("cpu"),
        "threads": options.threads,
    }
    print(save(record, f"scale-{kind('cpu')}", folder=options.out))


if __name__ == "__main__":
    main()
