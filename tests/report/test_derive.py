"""The derivations, with values made by hand."""

from __future__ import annotations

import pytest

from lightning_ast.report.derive import (
    Span,
    accuracy,
    accuracy_tag,
    activation_rate_when_sparse,
    clip_to_training,
    epoch_values,
    is_dense,
    last_epoch,
    stage_of_epochs,
    stage_spans,
    training_loss_tag,
)
from lightning_ast.report.series import Series
from tests.report.conftest import long_run, made

NAN = float("nan")
EPOCH = [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 2), (8, 2)]


@pytest.mark.parametrize(
    ("tags", "loss"),
    [
        (["val_loss", "train_loss"], "train_loss"),
        (["train/loss_epoch", "train/loss_step", "loss"], "train/loss_step"),
        (["train_loss_epoch", "val_loss"], "train_loss_epoch"),
        (["val_loss", "loss"], "loss"),
        (["val_loss", "test/loss"], None),
        (["ast/loss", "accuracy"], None),
    ],
)
def test_the_training_loss_is_found_by_name(tags: list[str], loss: str | None) -> None:
    assert training_loss_tag(tags) == loss


def test_the_accuracy_is_found_by_name() -> None:
    assert accuracy_tag(["train_acc", "val_acc_top5", "val_acc"]) == "val_acc"
    assert accuracy_tag(["train_acc", "valid/Accuracy"]) == "valid/Accuracy"
    assert accuracy_tag(["test_acc", "train_loss"]) == "test_acc"
    assert accuracy_tag(["train_loss", "ast/acc"]) is None


@pytest.mark.parametrize(
    "tag",
    ["acc", "top1_acc", "acc1", "Acc@1", "valid/accuracy", "MulticlassAccuracy", "valAcc", "val_ACC", "ACCTop1", "testAccuracy"],
)  # fmt: skip
def test_accuracy_is_a_word_of_the_tag(tag: str) -> None:
    assert accuracy_tag(["loss", tag]) == tag


def test_a_word_with_acc_in_it_is_no_accuracy() -> None:
    assert accuracy_tag(["grad_accumulation", "accelerator_bytes", "vaccine", "AccumulateSteps"]) is None
    assert accuracy(made({"epoch": EPOCH, "grad_accumulation": [(2, 4.0)]})) is None


def test_one_value_an_epoch_is_the_last_finite_one() -> None:
    run = made(
        {
            "epoch": EPOCH,
            "val_acc": [(1, 0.1), (2, 0.2), (5, 0.5), (8, NAN)],
        }
    )
    found = accuracy(run)
    assert found is not None
    assert (found[1].epochs.tolist(), found[1].values.tolist()) == ([0, 1], [0.2, 0.5])
    assert last_epoch(run) == 2


def test_without_epochs_each_value_is_one() -> None:
    run = made({"val_acc": [(10, 0.1), (20, 0.2)]})
    found = accuracy(run)
    assert found is not None
    assert found[1].epochs.tolist() == [0, 1]
    assert last_epoch(run) is None


def test_percentages_become_shares() -> None:
    for values, shares in (([50.0, 100.0], [0.5, 1.0]), ([0.5, 1.0], [0.5, 1.0]), ([0.5, 1.0000001], [0.5, 1.0000001])):
        found = accuracy(made({"epoch": EPOCH, "val_acc": [(2, values[0]), (5, values[1])]}))
        assert found is not None
        assert (found[0], found[1].values.tolist()) == ("val_acc", shares)


def test_an_accuracy_that_is_never_finite_is_passed_over() -> None:
    found = accuracy(made({"epoch": EPOCH, "val_acc": [(2, NAN)], "train_acc": [(2, 0.5)]}))
    assert found is not None
    assert found[0] == "train_acc"


def test_an_epoch_has_the_stage_in_which_it_ended() -> None:
    stages = [(0, 0), (1, 0), (2, 1), (3, 1), (4, NAN), (5, 1), (6, 1), (7, 2)]
    run = made({"epoch": EPOCH, "ast/stage": stages})
    assert stage_of_epochs(run) == {0: "sparse", 1: "sparse", 2: "cooldown"}
    assert stage_spans(run, axis="epochs") == [Span(-0.5, 1.5, "sparse"), Span(1.5, 2.5, "cooldown")]
    assert stage_spans(run, axis="steps") == [Span(0, 2, "warmup"), Span(2, 7, "sparse"), Span(7, 7, "cooldown")]
    assert stage_spans(made({"epoch": EPOCH}), axis="steps") == stage_spans(made({"epoch": EPOCH}), axis="epochs") == []


def test_what_was_validated_after_the_fit_is_no_epoch() -> None:
    acc = [(2, 0.1), (5, 0.2), (8, 0.3)]
    run = made(
        {
            "epoch": [*EPOCH, (9, 3)],
            "val_acc": [*acc, (9, 0.9)],
            "train_loss": [(8, 1.0)],
            "energy/epoch_seconds": [(3, 1), (6, 1), (9, 1)],
        }
    )
    clipped = clip_to_training(run)
    assert clipped.scalars["val_acc"].values.tolist() == [0.1, 0.2, 0.3]
    assert last_epoch(clipped) == 2
    assert len(clipped.scalars["energy/epoch_seconds"]) == 3
    begun = made({"epoch": [*EPOCH, (9, 3)], "val_acc": acc, "train_loss": [(8, 1.0), (9, 0.8)]})
    assert clip_to_training(begun) is begun  # training began its fourth epoch
    one_step = made({"epoch": [(0, 0), (1, 1), (2, 2)], "val_acc": [(0, 0.1), (1, 0.2), (2, 0.3)]})
    assert clip_to_training(one_step) is one_step  # epochs of one step
    rare = made({"epoch": [(9, 0), (19, 1), (29, 2)], "val_acc": [(9, 0.1), (19, 0.2), (29, 0.3)]})
    assert clip_to_training(rare) is rare  # only ends of epochs were logged


def test_costs_belong_to_the_epoch_that_ended() -> None:
    run = made({"epoch": EPOCH, "energy/epoch_seconds": [(2, 10.0), (5, 20.0), (8, 30.0)]})
    found = epoch_values(run, "energy/epoch_seconds")
    assert found is not None
    assert (found.epochs.tolist(), found.values.tolist()) == ([0, 1, 2], [10.0, 20.0, 30.0])


def test_dense_is_what_always_trains_on_everything() -> None:
    assert is_dense(made({"epoch": EPOCH}))
    assert is_dense(made({"ast/activation_rate": [(0, 1.0), (1, NAN), (2, 1.0)]}))
    assert not is_dense(made({"ast/activation_rate": [(0, 1.0), (1, 0.99)]}))


def test_the_activation_rate_is_that_of_sparse_steps() -> None:
    rate = [(0, 1.0), (1, 0.3), (2, 0.5), (3, NAN), (4, 1.0)]
    stage = [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2)]
    assert activation_rate_when_sparse(made({"ast/activation_rate": rate, "ast/stage": stage})) == pytest.approx(0.4)
    assert activation_rate_when_sparse(made({"ast/activation_rate": rate})) == pytest.approx(0.7)
    assert activation_rate_when_sparse(made({"ast/activation_rate": rate[:1], "ast/stage": stage[:1]})) is None
    assert activation_rate_when_sparse(made({})) is None


def test_a_series_knows_its_last_finite_value() -> None:
    assert Series.of([(1, 3.0), (2, NAN)]).last == 3.0
    assert Series.of([(1, NAN)]).last is None
    assert Series.of([(1, NAN), (2, 3.0)]).closing == 3.0
    assert Series.of([(1, 3.0), (2, NAN)]).closing is None, "not known any more"
    assert made({"a": [(1, NAN)]}).series("a") is None
    assert long_run(2, 3).series("val_acc") is not None
