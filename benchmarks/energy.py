"""The joules by EnergyMonitor's counter beside the integral of the power that nvidia-smi reports. Needs an NVIDIA GPU.

    python benchmarks/energy.py --seconds 60

The GPU alternates between matrix products and rest, so that its power changes. Both count the same interval; the record
has both sums and their ratio, which should be within 5 % of 1.
"""

from __future__ import annotations

import argparse
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RECORDS, provenance, save

from lightning_ast.energy import NvmlMeter


def integral(seconds: list[float], watts: list[float], start: float, end: float) -> float:
    """Integrate samples of the power to joules between two moments, by the trapezoidal rule."""
    inside = np.linspace(start, end, max(2, round((end - start) * 1000)))
    return float(np.trapezoid(np.interp(inside, seconds, watts), inside))


def work(seconds: float) -> None:
    """Keep the GPU busy for two seconds, idle for one, and so on."""
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        busy = time.perf_counter() + 2
        while time.perf_counter() < busy:
            for _ in range(10):
                x = torch.nn.functional.normalize(x @ x)
            torch.cuda.synchronize()
        time.sleep(1)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU")
    meter = NvmlMeter.of(torch.device("cuda", torch.cuda.current_device()))
    query = ["nvidia-smi", "-i", meter.identity, "--query-gpu=power.draw.instant", "--format=csv,noheader,nounits"]
    seconds: list[float] = []
    watts: list[float] = []
    with subprocess.Popen([*query, "-lms", "50"], stdout=subprocess.PIPE, text=True) as process:

        def listen() -> None:
            for line in process.stdout or ():
                seconds.append(time.perf_counter())
                watts.append(float(line))

        threading.Thread(target=listen, daemon=True).start()
        work(3)
        start = time.perf_counter()
        before = meter.read_joules()
        work(options.seconds)
        end = time.perf_counter()
        after = meter.read_joules()
        time.sleep(0.5)
        process.terminate()
    counted = after - before
    summed = integral(seconds, watts, start, end)
    record = {
        "benchmark": "energy",
        "seconds": round(end - start, 2),
        "counter_joules": round(counted, 1),
        "nvidia_smi_joules": round(summed, 1),
        "ratio": round(counted / summed, 4),
        "samples": len(watts),
        **provenance(),
    }
    print(record)
    save(record, "energy-gpu", folder=options.out, indent=1)
    return record


if __name__ == "__main__":
    main()
