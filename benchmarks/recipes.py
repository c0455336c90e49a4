"""Run recipes of `examples/` with several methods and seeds, and record their figures.

    python benchmarks/recipes.py --recipe language/gpt --methods dense shortened ours --seeds 0 1 2

A recipe is a script with a function ``train(method, *, seed, max_steps)`` that returns its figures by name. Each run
makes one record under `benchmarks/records/recipes/`; a run whose record exists is left out, so that the command can be
stopped and called again. `benchmarks/summarize.py` makes the tables of the recipes' pages from the records.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from record import RECORDS, provenance, save, silence_lightning

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = RECORDS / "recipes"


def load_recipe(name: str) -> ModuleType:
    """Import the script of a recipe.

    Args:
        name: The path of the script below `examples/`, without its ending, such as "language/gpt".

    Raises:
        FileNotFoundError: There is no such script.
    """
    path = EXAMPLES / f"{name}.py"
    if not path.exists():
        raise FileNotFoundError(f"expected the name of a script below examples/, such as language/gpt, got {name!r}")
    spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('/', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(recipe: str, method: str, seed: int, *, max_steps: int = -1, folder: Path = FOLDER) -> dict[str, Any] | None:
    """Train once and write the record; None where it was there already."""
    name = f"{recipe.replace('/', '-')}-{method}-s{seed}"
    if (folder / f"{name}.json").exists():
        return None
    module = load_recipe(recipe)
    seconds = time.perf_counter()
    cpu_seconds = processor_seconds()
    figures = module.train(method, seed=seed, max_steps=max_steps)
    record = {
        "benchmark": "recipes",
        "recipe": recipe,
        "method": method,
        "seed": seed,
        "max_steps": max_steps,
        "figures": figures,
        "seconds": round(time.perf_counter() - seconds, 2),
        "cpu_seconds": round(processor_seconds() - cpu_seconds, 2),
        **provenance(),
    }
    save(record, name, folder=folder)
    return record


def processor_seconds() -> float:
    """Return the processor's time of this process and of those that it started and waited for."""
    return sum(os.times()[:4])


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="the script below examples/, such as language/gpt")
    parser.add_argument("--methods", nargs="+", help="by default all of its type Method")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps of a run; -1 is the whole run")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    silence_lightning()
    methods = options.methods or get_args(load_recipe(options.recipe).Method)
    for seed in options.seeds:
        for method in methods:
            record = run(options.recipe, method, seed, max_steps=options.max_steps, folder=options.out)
            if record is not None:
                print(
                    f"{options.recipe} {method} seed {seed}: {record['figures']}, {record['seconds']:.0f} s", flush=True
                )


if __name__ == "__main__":
    main()
