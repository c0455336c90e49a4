"""The texts of the terminal and the figures in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_ast.core.ledger import FlopsPerSample, Ledger
from lightning_ast.monitoring.progress import epoch_details, names_accuracy
from lightning_ast.monitoring.text import (
    RunSummary,
    best_flops_savings,
    format_epoch,
    format_seconds,
    format_summary,
    milestones,
    seconds_left,
)


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2s"), (75, "1m 15s"), (7384, "2h 03m")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_line_of_an_epoch() -> None:
    line = format_epoch(0, 40, loss=1.7234, accuracy=0.365, activation_rate=0.081, eta_seconds=312)
    assert line == "Epoch 0/39 | Loss: 1.7234 | Val Acc: 36.50% | Act: 8.1% | Skipped: 91.9% | ETA: 5m 12s"
    logged = {"val_top5": torch.tensor(0.5)}
    details = epoch_details(["val_top5", "absent"], logged, seconds=75.0, device=torch.device("cpu"))
    assert details == ["val_top5: 0.5", "Time: 1m 15s"]


@pytest.mark.parametrize(("name", "is_one"), [("val_acc", True), ("train_acc", False), ("val_loss", False)])
def test_names_of_accuracies(name: str, is_one: bool) -> None:
    assert names_accuracy(name) == is_one


def test_when_the_best_was_near() -> None:
    assert milestones({0: 0.5, 1: 0.75, 2: 0.79, 3: 0.8}) == {0.9: 1, 0.95: 2, 0.99: 3}


def test_a_summary_of_a_dense_run() -> None:
    assert format_summary(RunSummary(2, 8.0, accuracies={0: 0.6, 1: 0.5})).splitlines() == [
        "lightning-ast: 2 epochs in 8.0s | Val Acc: 50.00%, best 60.00% in epoch 0",
        "  time         monitoring 0.00%",
    ]


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
    assert seconds_left({"warmup": [10.0, 12.0], "sparse": [6.0]}, ["sparse", "sparse", "warmup"]) == 23.0
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
