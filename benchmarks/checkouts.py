"""Compare the packages of two checkouts on the same measurements, in processes that live side by side.

Each checkout gets one process, which imports its `lightning_ast` and answers requests, so that rounds can alternate
between the two without starting anything anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Checkout", "CheckoutError", "answer", "compare", "compared"]

_MARK = "answer: "
"""The beginning of lines that are answers: libraries print to the same stream."""


class CheckoutError(RuntimeError):
    """The process of a checkout ended, or runs another checkout's package."""


class Checkout:
    """A process that runs a script with the package of one checkout.

    Args:
        folder: The checkout, which holds `lightning_ast/`.
        command: The script and its arguments; it must call :func:`answer`.
    """

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.folder = folder.resolve()
        if not (self.folder / "lightning_ast").is_dir():
            raise CheckoutError(f"expected a checkout with lightning_ast/ in it, got {folder}.")
        paths = [str(self.folder), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Checkout:
        package = Path(self.ask()["package"])
        if not package.resolve().is_relative_to(self.folder):
            self.close()
            raise CheckoutError(f"expected the package of {self.folder}, got {package}.")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, **request: Any) -> Any:
        """Send a request, and wait for its answer; without arguments, ask for the package's path."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the loop below finds the end of its output
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise CheckoutError(f"the process of {self.folder} ended with {self._process.wait()}; its error stands above.")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def answer(measure: Callable[..., Any]) -> None:
    """Answer requests until the input ends: called in the process of a checkout."""
    import lightning_ast

    for line in sys.stdin:
        request = json.loads(line)
        result = measure(**request) if request else {"package": str(Path(lightning_ast.__file__).parent)}
        print(_MARK + json.dumps(result), flush=True)


def compare(name: str, new: Checkout, old: Checkout, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure sparse steps of `partial` with both packages, and dense steps, in rounds of alternating order.

    Args:
        name: The case, as the scripts know it.
        new: The checkout that is measured.
        old: The checkout that it is compared with.
        options: Their `rates`, `rounds`, and the `seconds` that the rounds may take: a round that would outlast them is
            not begun, but for the first.

    Returns:
        A row for each rate.
    """
    for checkout in (new, old):
        checkout.ask(name=name, mode="partial", rate=options.rates[0])  # warm up
    dense: list[float] = []
    pairs: dict[float, list[tuple[float, float]]] = {rate: [] for rate in options.rates}
    begin = time.perf_counter()
    for index in range(options.rounds):
        spent = time.perf_counter() - begin
        if index and options.seconds and spent * (index + 1) / index > options.seconds:
            break
        dense.append(new.ask(name=name, mode="dense", rate=1.0))
        for rate in options.rates:
            order = (new, old) if index % 2 == 0 else (old, new)
            taken = {checkout: checkout.ask(name=name, mode="partial", rate=rate) for checkout in order}
            pairs[rate].append((taken[new], taken[old]))
    return [compared(rate, pairs[rate], dense) for rate in options.rates]


def compared(rate: float, pairs: list[tuple[float, float]], dense: list[float]) -> dict[str, Any]:
    """Summarise the rounds of a rate by their medians.

    Args:
        rate: The target activation rate.
        pairs: Seconds of a sparse step in each round, (new, old).
        dense: Seconds of a dense step in each round.

    Returns:
        The quotient of new and old, and both as shares of dense.
    """
    ratios = [new / old for new, old in pairs]
    return {
        "mode": "partial",
        "rate": rate,
        "dense_milliseconds": round(1000 * statistics.median(dense), 1),
        "new_over_old": round(statistics.median(ratios), 3),
        "new_over_old_by_round": [round(ratio, 3) for ratio in ratios],
        "new_share_of_dense": round(statistics.median(pair[0] / d for pair, d in zip(pairs, dense, strict=True)), 3),
        "old_share_of_dense": round(statistics.median(pair[1] / d for pair, d in zip(pairs, dense, strict=True)), 3),
    }
