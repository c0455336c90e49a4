"""Check and time the package on a GPU in one call of a few minutes: gradients, steps, small steps, accuracy.

    python benchmarks/gpu_heart.py --against OTHER_CHECKOUT --root cifar10.npz --archive records

The sections run in order, each one's records are written at once, and `--archive` packs them after each into one zip
file. Accuracy comes last and takes what is left of `--seconds`: several runs share the GPU, seed by seed, so their
seconds mean nothing and their records say so. Runs that are not finished then are left out. A section that fails does
not stop the others; the exit status says that one did. `--tiny` runs everything on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cifar10
import overhead
import row_gradients
import step_time
from record import RECORDS, silence_lightning

RUNS = (
    ("dense", 16),
    ("partial", 16),
    ("prune", 16),
    ("dense-shortened", 11),  # the work of `partial` at r = 0.4
    ("dense-shortened", 8),  # the work of `prune` at r = 0.4
    ("random", 16),
    ("prune-random", 16),
    ("infobatch", 16),
)
"""Policies of `cifar10.py`, and epochs."""

STEP_CASES = ("resnet50-256", "vit-b-128", "gpt-small-32")
"""Models of `step_time.py` for a GPU."""

Lines = list[str]


def gradients(options: argparse.Namespace) -> Lines:
    """Compare `partial` with `mask`."""
    arguments = ["--root", options.images, "--out", str(options.out)]
    record = row_gradients.main([*arguments, "--tiny", "--device", "cpu"] if options.tiny else arguments)
    lines = [
        f"{'ok  ' if row['passed'] else 'FAIL'} {row['model']:9} {row['precision']:10} relative error "
        f"{row['relative_error']:.1e}, cosine {row['cosine']:.6f}, selected {row['selected']} of {row['offered']}"
        for row in record["rows"]
    ]
    if not all(row["passed"] for row in record["rows"]):
        raise SectionError("gradients of partial differ from those of mask", lines)
    return lines


def steps(options: argparse.Namespace) -> Lines:
    """Compare sparse steps with the other checkout's."""
    if options.against is None:
        return ["left out: needs --against"]
    arguments = ["--root", options.images, "--against", str(options.against), "--out", str(options.out)]
    cases = STEP_CASES
    sizes = ["--steps", "18", "--skip", "8", "--rounds", "3", "--seconds", "32"]
    if options.tiny:
        cases = ("vit-tiny-16",)
        sizes = ["--steps", "4", "--skip", "2", "--rounds", "1", "--threads", "1"]
    for case in cases:
        arguments += ["--case", case]
    records = step_time.main([*arguments, *sizes])
    return [
        f"{record['model']:10} B = {record['batch_size']:<4} r = {row['rate']:<4g} "
        f"new / old {row['new_over_old']:.3f}; of dense ({row['dense_milliseconds']} ms): "
        f"new {row['new_share_of_dense']:.3f}, old {row['old_share_of_dense']:.3f}"
        for record in records
        for row in record["rows"]
    ]


def small_steps(options: argparse.Namespace) -> Lines:
    """Measure what the callback adds to small steps."""
    return overhead_lines(options, ["--rounds", "7"])


def short_run(options: argparse.Namespace) -> Lines:
    """Measure a fit of few steps."""
    return overhead_lines(options, ["--short-run", "--rounds", "7"])


def overhead_lines(options: argparse.Namespace, arguments: Lines) -> Lines:
    """Run `overhead.py`."""
    tiny = ["--tiny", "--device", "cpu"] if options.tiny else []
    record = overhead.main([*arguments, *tiny, "--out", str(options.out)])
    return [f"{row['variant']:18} {row['milliseconds']:9.2f} ms {row['share_of_plain']:.3f}" for row in record["rows"]]


def accuracy(options: argparse.Namespace) -> Lines:
    """Train on CIFAR-10 until the time is up."""
    if options.root is None:
        return ["left out: needs --root"]
    shared = ["--root", options.root, "--out", str(options.out), "--runs-at-once", str(max(1, options.jobs))]
    shared += ["--on-device", "--channels-last", "--rate", "0.4", "--threads", "2"]
    shared += ["--train-limit", str(options.train_limit)] if options.train_limit else []
    runs: Sequence[tuple[str, int]] = RUNS
    if options.tiny:
        runs = [(policy, 3) for policy, _ in RUNS[:3]]
        shared += ["--width", "4", "--batch-size", "64"]
    commands = [
        ["--policy", policy, "--epochs", str(epochs), "--seed", str(seed), *shared]
        for seed in range(options.seeds)
        for policy, epochs in runs
    ]
    lines = []
    left = options.deadline - time.perf_counter()
    for result in in_processes(cifar10.main, commands, processes=options.jobs, seconds=left):
        lines.append(accuracy_line(result))
        print(lines[-1], flush=True)
    lines = [*sorted(lines), f"{len(lines)} of {len(commands)} runs ended"]
    if any(line.startswith("FAIL") for line in lines):
        raise SectionError("runs failed", lines)
    return lines


def accuracy_line(result: Any) -> str:
    """Sum up a record of `cifar10.py`, or the error of its run."""
    if isinstance(result, Exception):
        return f"FAIL {type(result).__name__}: {result}"
    flops = "not counted" if result["flops"] is None else f"{result['flops'] / 1e15:.2f}e15"
    return (
        f"{result['policy']:16} {result['settings']['epochs']:2} epochs, seed {result['seed']}: "
        f"{100 * result['accuracy']:.2f} %, {result['samples_selected'] / result['samples_offered']:.3f} of samples, "
        f"FLOPs {flops}"
    )


def in_processes(
    action: Callable[[Lines], Any], commands: list[Lines], *, processes: int, seconds: float
) -> Iterator[Any]:
    """Run commands in several processes and yield their results as they come, until all are done or the time is up.

    Args:
        action: Runs one command.
        commands: What to run, in this order.
        processes: How many at once; 0 runs them in this process, to their end.
        seconds: After how long those that still run are ended.

    Yields:
        What the action returned, or the exception that it raised.
    """
    if processes == 0:
        yield from map(action, commands)
        return
    end = time.perf_counter() + seconds
    with multiprocessing.get_context("spawn").Pool(processes, initializer=silence_lightning) as pool:
        results = pool.imap_unordered(action, commands)
        for _ in commands:
            try:
                yield results.next(timeout=max(0.0, end - time.perf_counter()))
            except multiprocessing.TimeoutError:
                print(f"time is up after {seconds:.0f} s")
                return
            except Exception as error:  # of one run: the others go on
                traceback.print_exc()
                yield error


class SectionError(Exception):
    """A fault that a section found: its lines."""


SECTIONS: dict[str, Callable[[argparse.Namespace], Lines]] = {
    "gradients": gradients,
    "steps": steps,
    "small-steps": small_steps,
    "short-run": short_run,
    "accuracy": accuracy,
}


def run_section(name: str, options: argparse.Namespace) -> tuple[Lines, bool]:
    """Run a section; return what it found, and whether it went well."""
    print(f"\n== {name}", flush=True)
    begin = time.perf_counter()
    well = True
    try:
        lines = SECTIONS[name](options)
    except SectionError as error:
        lines = [str(error.args[0]), *error.args[1]]
        well = False
    except Exception as error:
        traceback.print_exc()
        lines = [f"FAIL {type(error).__name__}: {error}"]
        well = False
    title = f"== {name}, {time.perf_counter() - begin:.0f} s" + ("" if well else ", FAILED")
    return [title, *(f"   {line}" for line in lines)], well


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="for steps: a folder with lightning_ast/ in it"
    )
    parser.add_argument("--root", help="for accuracy: folder or .npz file of CIFAR-10")
    parser.add_argument("--train-limit", type=int, help="for accuracy: the first so many training images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=6, help="for accuracy: runs at once; 0 runs them in this process")
    parser.add_argument("--seconds", type=float, default=345, help="of all sections: accuracy takes what is left")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--archive", type=Path, help="zip file of all records, without its ending")
    parser.add_argument("--tiny", action="store_true", help="everything on a CPU, as small as it gets")
    options = parser.parse_args(arguments)
    options.deadline = time.perf_counter() + options.seconds
    options.images = options.root or "digits"
    options.out.mkdir(parents=True, exist_ok=True)
    found: Lines = []
    good = True
    for name in options.sections:
        lines, well = run_section(name, options)
        found += lines
        good &= well
        if options.archive:
            shutil.make_archive(str(options.archive), "zip", options.out)
    print("\n" + "\n".join(found), flush=True)
    return int(not good)


if __name__ == "__main__":
    silence_lightning()
    sys.exit(main())
