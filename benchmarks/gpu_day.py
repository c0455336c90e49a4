"""A day on a GPU: everything that needs one, in stages of at most eight minutes.

    python benchmarks/gpu_day.py --list
    python benchmarks/gpu_day.py --root cifar10.npz               # all stages that are not done yet
    python benchmarks/gpu_day.py --root cifar10.npz --stage 2     # one of them
    python benchmarks/gpu_day.py --tiny                           # all of them on a CPU, as small as they get

Each stage writes its records and a verdict of one line, which `gpu-day-<kind>.json` keeps beside the time that it took.
A stage that fails does not stop the next, and the exit status says that one did. A stage that went well is left out
when the command is called again, unless it is asked for by `--stage`; a stage of accuracy goes on where it was stopped.
No stage needs a network. CIFAR-10 is a `.npz` file, or the folder that torchvision makes of it; without it the digits
of scikit-learn are taken where the images do not matter, and the stages of accuracy are left out.

Runs of accuracy share the GPU, `--jobs` of them at once (NVIDIA's multi-process service makes that worthwhile), so the
seconds of their records count as shares alone. The runs with the first seed are made once more in stage 3, one after
the other, and have seconds and joules (in `regimes-gpu-alone/`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import advice
import energy
import image_loading
import overhead
import regimes
import row_gradients
import step_time
import torch
from record import RECORDS, kind, on_gpu, provenance, save, silence_lightning

ROOT = Path(__file__).parent.parent

STEP_CASES = ("resnet50-256", "resnet50-768", "vit-b-128", "vit-b-512", "gpt-small-32")
"""Models of `step_time.py` for a GPU."""

Lines = list[str]


class StageError(Exception):
    """A fault that a stage found: its lines, the verdict first."""


@dataclass(frozen=True)
class Stage:
    """A part of the day.

    Attributes:
        title: What it is about.
        run: Does it, and returns what it found: the verdict first.
    """

    title: str
    run: Callable[[argparse.Namespace], Lines]


def correctness(options: argparse.Namespace) -> Lines:
    """Run the tests that are marked `gpu`, and compare the gradients of `partial` with those of `mask`."""
    jobs = [] if options.tiny else ["-n", "8"]
    tests = ["tests/gpu/test_attention.py"] if options.tiny else ["tests/gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rfE", *jobs, *tests]
    done = in_session(command, options.seconds)
    record = row_gradients.main([*images(options), *tiny(options)])
    lines = [
        f"{'ok  ' if row['passed'] else 'FAIL'} {row['model']:9} {row['precision']:10} relative error "
        f"{row['relative_error']:.1e}, cosine {row['cosine']:.6f}, selected {row['selected']} of {row['offered']}"
        for row in record["rows"]
    ]
    if done or not all(row["passed"] for row in record["rows"]):
        raise StageError("some tests failed, or a gradient differs", lines)
    return ["all tests passed, and partial gives the gradients of mask", *lines]


def step_times(options: argparse.Namespace) -> Lines:
    """Time the steps of every mode."""
    cases = ("vit-tiny-16",) if options.tiny else STEP_CASES
    arguments = [*images(options), "--rounds", "1"]
    arguments += ["--steps", "4", "--skip", "2", "--rates", "0.4"] if options.tiny else ["--steps", "22", "--skip", "8"]
    lines = []
    for case in cases:
        (record,) = step_time.main([*arguments, "--case", case])
        rows = {(row["mode"], row["rate"]): row for row in record["rows"]}
        shares = ", ".join(f"{mode} {rate:g}: {row['share_of_dense']:.2f}" for (mode, rate), row in rows.items())
        lines.append(f"{case}: dense {rows['dense', 1.0]['milliseconds']} ms; {shares}")
    return [f"{len(lines)} models timed", *lines]


def joules(options: argparse.Namespace) -> Lines:
    """Compare two ways to count joules, and train with the first seed, one run after the other."""
    lines = ["no counter of a GPU: joules are not compared"]
    if on_gpu():
        record = energy.main(["--seconds", "15", "--out", str(options.out)])
        lines = [f"the counter is {record['ratio']:.3f} of nvidia-smi's integral"]
        if abs(record["ratio"] - 1) > 0.05:
            raise StageError("the two counts of joules differ by more than 5 %", lines)
    return lines + trained(options, "gpu", "*n50000-resnet9*e32*-s0", jobs=1, folder="regimes-gpu-alone")


def accuracy(pattern: str, plan: str = "gpu") -> Callable[[argparse.Namespace], Lines]:
    """Make a stage that trains on CIFAR-10 until its time is up."""
    return lambda options: trained(options, plan, pattern, jobs=options.jobs)


def trained(options: argparse.Namespace, plan: str, pattern: str, *, jobs: int, folder: str = "regimes-gpu") -> Lines:
    """Train what fits a pattern; what is not finished in time is left for the next call."""
    if options.tiny:
        plan = "trial"
        pattern = "*"
    elif options.root is None:
        return ["left out: needs --root"]
    out = options.out / (folder if on_gpu() else "regimes")
    arguments = ["--plan", plan, "--only", pattern, "--root", options.root or "", "--out", str(out)]
    if options.tiny:
        failed = regimes.main(arguments)
    else:
        command = [sys.executable, str(Path(regimes.__file__)), *arguments, "--workers", str(jobs)]
        failed = in_session(command, options.seconds)
    left = len(regimes.wanted(regimes.plan(plan), pattern, out))
    lines = [f"{left} runs are left" if left else "all runs are recorded"]
    if failed and left and failed != _TIME_IS_UP:
        raise StageError("some runs failed", lines)
    return lines


def recipes(options: argparse.Namespace) -> Lines:
    """Time ImageNet's recipe on made images of 224 pixels, dense and sparse, beside the loader alone."""
    record = image_loading.main([*tiny(options), "--out", str(options.out)])
    lines = [f"{row['run']}: {row['images_per_second']:,.0f} images/s" for row in record["rows"]]
    bound = "the loader" if record["bound_by"] == "loader" else "arithmetic"
    return [f"bound by {bound}", *lines]


def predictions(options: argparse.Namespace) -> Lines:
    """Compare what `advise` predicts with runs."""
    arguments = [*images(options), "--rounds", "1"]
    case = "resnet50-256"
    if options.tiny:
        case = "vit-tiny-16"
        arguments += ["--batches", "3", "--budget", "5"]
    (record,) = advice.main([*arguments, "--case", case])
    worst = record["largest_error"]
    return [f"largest error of a step {worst['step']:.0%}, of a run {worst['run']:.0%}"]


def small_steps(options: argparse.Namespace) -> Lines:
    """Measure what the callback adds to small steps and to short runs."""
    lines = []
    for more in ([], ["--short-run"]):
        record = overhead.main([*more, *tiny(options), *([] if options.tiny else ["--rounds", "5"]), *out(options)])
        lines += [f"{row['variant']:18} {row['share_of_plain']:.3f}" for row in record["rows"]]
    return ["shares of the run without the callback", *lines]


STAGES = {
    1: Stage("correctness: the tests marked gpu, gradients of partial against mask", correctness),
    2: Stage("time of a step: ResNet-50, ViT-B, GPT, every mode", step_times),
    3: Stage("joules: two counters, and the runs of the headline's first seed, one at a time", joules),
    4: Stage("accuracy: ResNet-9, 16 epochs", accuracy("*resnet9*-e16-*")),
    5: Stage("accuracy: ResNet-9, 32 epochs, the headline", accuracy("*resnet9*-e32-*")),
    6: Stage("accuracy: ResNet-9, 64 epochs", accuracy("*resnet9*-e64-*")),
    7: Stage("accuracy: ResNet-18", accuracy("*resnet18*")),
    8: Stage("accuracy: the small network of the headline", accuracy("cifar10*", "headline")),
    9: Stage("images of 224 pixels: dense and sparse, bound by the loader or not", recipes),
    10: Stage("predictions of advise beside runs", predictions),
    11: Stage("small steps and short runs", small_steps),
}

_TIME_IS_UP = -1


def in_session(command: Sequence[str], seconds: float) -> int:
    """Run a command with all its children, end them when the time is up, and return the exit status, -1 if so."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return _TIME_IS_UP


def out(options: argparse.Namespace) -> Lines:
    """Tell a benchmark where its records belong."""
    return ["--out", str(options.out)]


def images(options: argparse.Namespace) -> Lines:
    """Tell a benchmark what images to take, and where its records belong."""
    return ["--root", options.root or "digits", *out(options)]


def tiny(options: argparse.Namespace) -> Lines:
    """Make a benchmark small, where asked."""
    return ["--tiny", "--device", "cpu"] if options.tiny else []


def run_stage(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run a stage; return its verdict, what it found, its time, and whether it went well."""
    stage = STAGES[number]
    print(f"\n== {number}: {stage.title}", flush=True)
    begin = time.perf_counter()
    passed = True
    try:
        lines = stage.run(options)
    except StageError as error:
        lines = [error.args[0], *error.args[1]]
        passed = False
    except Exception as error:  # of one stage: the others go on
        traceback.print_exc()
        lines = [f"{type(error).__name__}: {error}"]
        passed = False
    print("\n".join(["ok" if passed else "FAILED", *lines]), flush=True)
    found = {"title": stage.title, "passed": passed, "verdict": lines[0], "lines": lines[1:]}
    return {**found, "seconds": round(time.perf_counter() - begin, 1), **provenance()}


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, action="append", choices=list(STAGES), help="may be given several times")
    parser.add_argument("--list", action="store_true", help="print the stages, and what they found")
    parser.add_argument("--root", help="folder or .npz file of CIFAR-10")
    parser.add_argument("--jobs", type=int, default=12, help="runs of accuracy that share the GPU")
    parser.add_argument("--seconds", type=float, default=480, help="of a stage of accuracy or of tests, at most")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--tiny", action="store_true", help="everything on a CPU, as small as it gets")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, keep what they found; return 1 where one failed."""
    options = parser().parse_args(arguments)
    name = f"gpu-day-{'cpu' if options.tiny else kind()}"
    path = options.out / f"{name}.json"
    stages = json.loads(path.read_text())["stages"] if path.exists() else {}
    if options.list:
        for number, stage in STAGES.items():
            found = stages.get(str(number))
            print(f"{number:2} {stage.title}: {found['verdict'] if found else 'not done'}")
        return 0
    todo = options.stage or [each for each in STAGES if not stages.get(str(each), {}).get("passed")]
    for number in todo:
        stages[str(number)] = run_stage(number, options)
        save({"benchmark": "gpu-day", "stages": stages}, name, folder=options.out, indent=1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return int(not all(stages[str(number)]["passed"] for number in todo))


if __name__ == "__main__":
    silence_lightning()
    sys.exit(main())
