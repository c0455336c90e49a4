"""The texts of the terminal and the figures in them."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ast.core.ledger import FlopsPerSample, Ledger
from lightning_ast.monitoring.text import RunSummary, best_flops_savings, format_summary, seconds_left


def test_the_closing_summary() -> None:
    run = RunSummary(
        40, 7384.0, accuracies={38: 0.93, 39: 0.9212}, mode="subset", activation_rate=0.46,
        sparse_rate=0.4012, target=0.4, savings={"samples": 0.54, "flops": 0.21, "seconds": -0.031, "joules": None},
        best_savings=0.24, sections={"loading": 738.4, "scoring": 1476.8}, joules=3_600_000.0, measured=["NVIDIA H200 (NVML)"],
        quarantined=3, monitoring_seconds=7.384, closing_seconds=1.3,
    )  # fmt: skip
    assert format_summary(run).splitlines() == [
        "lightning-ast: 40 epochs in 2h 03m | Val Acc: 92.12%, best 93.00% in epoch 38",
        "  activation   46.0% of all samples, 40.1% in the sparse stage (target 40.0%)",
        "  saved        FLOPs 21.0% | seconds -3.1% | joules not known (mode='subset' at best: FLOPs 24.0%)",
        "  skipped      samples 54.0%",
        "  time         loading 10% | scoring 20% | monitoring 0.10% | pictures at the end 1.3s",
        "  energy       3.6 MJ (NVIDIA H200 (NVML))",
        "  quarantined  3 samples that are not finite",
    ]


def test_time_left_by_stage() -> None:
    assert seconds_left({}, ["sparse"]) is None
    assert seconds_left({"warmup": [10.0, 14.0]}, ["warmup", "sparse"]) == 24.0, "an unseen stage takes the last mean"
    assert seconds_left({"warmup": [10.0], "sparse": [4.0, 6.0]}, ["sparse", "cooldown", "warmup"]) == 5 + 5 + 10


@pytest.mark.parametrize(
    ("mode", "share"), [("mask", 1.0), ("subset", 0.25 + 0.4), ("partial", 0.25 + 0.75 * 0.4), ("prune", 0.4)]
)
def test_the_best_a_mode_could_do(mode: Any, share: float) -> None:
    ledger = Ledger(flops=FlopsPerSample(forward=1.0, backward=3.0))
    ledger.record("warmup", mode=None, offered=100, selected=100)
    ledger.record("sparse", mode=mode, offered=300, selected=120, dense_share=0.5 if mode == "partial" else 0.0)
    assert best_flops_savings(ledger, mode) == pytest.approx(1 - (100 + 300 * share) / 400)
    if mode == "partial":
        assert best_flops_savings(ledger, mode) > ledger.savings()["flops"], "a backward that went dense is not at best"
    assert best_flops_savings(Ledger(), mode) is None
