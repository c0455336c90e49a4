"""The table's numbers, and which run is the reference."""

from __future__ import annotations

from lightning_ast.report.page import reference, summarize
from tests.report.conftest import made

EPOCH = [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_a_row_holds_what_the_log_tells() -> None:
    row = summarize(
        made(
            {
                "epoch": EPOCH,
                "val_acc": [(1, 0.9), (3, 0.8)],
                "ast/activation_rate": [(0, 1.0), (3, 0.4)],
                "ast/stage": [(0, 0), (3, 1)],
                "ast/savings_samples": [(0, 0.0), (3, 0.3)],
                "ast/savings_seconds": [(3, -0.2), (4, float("nan"))],
                "energy/total_seconds": [(1, 2.0), (3, 5.0)],
                "energy/total_joules": [(1, 20.0), (3, 50.0)],
            }
        )
    )
    assert (row.dense, row.mode, row.epochs, row.steps) == (False, None, 2, 4)
    assert (row.final_accuracy, row.best_accuracy, row.activation_rate) == (0.8, 0.9, 0.4)
    assert row.savings == {"samples": 0.3, "flops": None, "seconds": None, "joules": None}, "NaN: not known any more"
    assert (row.seconds, row.joules) == (5.0, 50.0)


def test_what_is_not_in_the_log_is_none() -> None:
    row = summarize(made({}))
    assert (row.epochs, row.final_accuracy, row.best_accuracy, row.activation_rate) == (None, None, None, None)
    assert (row.seconds, row.joules) == (None, None)
    assert set(row.savings.values()) == {None}


def test_the_reference_is_the_longest_dense_run() -> None:
    short = summarize(made({"epoch": EPOCH[:2]}, name="short"))
    long = summarize(made({"epoch": EPOCH}, name="long"))
    sparse = summarize(made({"epoch": [*EPOCH, (4, 2)], "ast/activation_rate": [(0, 0.4)]}, name="sparse"))
    assert reference([short, sparse, long]) is long
    assert reference([sparse, sparse]) is None
    assert reference([long]) is None  # nothing to hold against it
