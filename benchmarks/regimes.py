"""The regime map: where selection pays, where it does not, and the headline table of all methods.

    python benchmarks/regimes.py --plan headline --workers 2 --root cifar10.npz
    python benchmarks/regimes.py --plan map --list

A plan is a list of runs. Each makes one record under `benchmarks/records/regimes/`; a run whose record exists is left
out, so that the command can be stopped and called again at any time, and a run that fails leaves nothing. Several
workers, and several commands side by side, never do the same run twice: they lock it. `benchmarks/summarize.py` makes
the tables from the records.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from policies import source_of
from record import RECORDS, on_gpu, provenance, silence_lightning
from regime_plans import PLANS, expected_seconds, plan
from regime_run import Run
from regime_train import default_precision, train

__all__ = ["claimed", "main", "wanted", "work_off"]


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=sorted(PLANS), required=True)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="of the names of the runs, as a shell has it")
    parser.add_argument("--list", action="store_true", help="print the runs that are not recorded yet, and their time")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, each with one thread")
    parser.add_argument("--runs-at-once", type=int, help="that share the machine, written into the records")
    parser.add_argument("--root", default="data", help="where the images are looked for, or cifar10.npz")
    parser.add_argument("--out", type=Path, default=RECORDS / ("regimes-gpu" if on_gpu() else "regimes"))
    parser.add_argument("--precision", default=None, help="of the Trainer; by default bf16-mixed where it is quick")
    parser.add_argument("--most-runs", type=int, help="stop after so many runs")
    return parser


def wanted(runs: list[Run], pattern: str, records: Path) -> list[Run]:
    """Return the runs that fit a pattern and have no record yet, each once, in the order of the plan."""
    unique = {run.name: run for run in runs if fnmatch.fnmatch(run.name, pattern)}
    return [run for run in unique.values() if not (records / f"{run.name}.json").exists()]


@contextmanager
def claimed(run: Run, records: Path) -> Iterator[bool]:
    """Lock a run; give False where another process has it. The lock goes with the process, however that ends."""
    place = hashlib.sha256(str(records.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"lightning-ast-regimes-{place}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{run.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        # Another process may have finished it between our look at the records and the lock.
        yield not (records / f"{run.name}.json").exists()


def work_off(options: argparse.Namespace) -> int:
    """Do the runs of a plan that nobody else does, one after the other; return the number that failed."""
    code = provenance()  # of the code as it is imported: the checkout may change while runs go on
    precision = options.precision or default_precision()
    failed: set[str] = set()
    done = 0
    while True:
        progress = False
        for run in wanted(plan(options.plan), options.only, options.out):
            if run.name in failed or (options.most_runs is not None and done >= options.most_runs):
                continue
            source = source_of(run)
            if source is not None and not (options.out / f"{source}.json").exists():
                continue
            with claimed(run, options.out) as ours:
                if not ours:
                    continue
                progress = True
                done += 1
                if not _record(run, options, precision, code):
                    failed.add(run.name)
        if not progress:
            for run in wanted(plan(options.plan), options.only, options.out):
                source = source_of(run)
                if source is not None and run.name not in failed and not (options.out / f"{source}.json").exists():
                    print(f"{run.name}: waits for the record {source}, which has the rates")
            return len(failed)


def _record(run: Run, options: argparse.Namespace, precision: str, code: dict[str, Any]) -> bool:
    """Do a run and write its record; return whether it succeeded."""
    begin = time.perf_counter()
    together = options.runs_at_once or options.workers
    try:
        record = train(run, root=options.root, records=options.out, precision=precision, alone=together == 1)
    except Exception:  # one run that fails must not end the others
        traceback.print_exc()
        print(f"{run.name}: failed", flush=True)
        return False
    record |= {"runs_at_once": together, **code}
    options.out.mkdir(parents=True, exist_ok=True)
    partial = options.out / f".{run.name}.{os.getpid()}.part"
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(options.out / f"{run.name}.json")
    taken = time.perf_counter() - begin
    print(f"{run.name}: {record['accuracy']:.4f}, work {record['work_epochs']}, {taken:.0f} s in all", flush=True)
    return True


def show(options: argparse.Namespace) -> None:
    """Print the runs that have no record yet, with the expected time."""
    runs = wanted(plan(options.plan), options.only, options.out)
    for run in runs:
        print(f"{expected_seconds(run):6.0f} s  {run.name}")
    hours = sum(map(expected_seconds, runs)) / 3600
    print(f"{len(runs)} runs, about {hours:.1f} hours on one thread, {hours / options.workers:.1f} with the workers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do a plan, in this process or in several; return 1 where runs failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    if options.list:
        show(options)
        return 0
    if options.workers > 1:
        together = options.runs_at_once or options.workers
        command = [sys.executable, __file__, *arguments, "--workers", "1", "--runs-at-once", str(together)]
        workers = [subprocess.Popen(command) for _ in range(options.workers)]
        return max(worker.wait() for worker in workers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    silence_lightning()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            return int(work_off(options) > 0)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
