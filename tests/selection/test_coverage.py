"""Runs with a target coverage: it is held in each mode, with each gate and weighting, by one process or by two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import PIController, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.errors import ConfigurationError
from lightning_ast.selection.fit_parts import Watcher
from lightning_ast.selection.step_state import StepState
from tests.helpers.data import Digits, loader
from tests.helpers.logs import scalars
from tests.helpers.modules import Trained, fresh
from tests.helpers.training import assert_same_weights, gloo, quiet_trainer, weights

BATCH = 32
SOFT = [("soft", "none"), ("soft", "sqrt"), ("soft", "unbiased")]
HARD = [("threshold", None), ("topk", None)]


class Small(Trained):
    """A network that learns digits in a few epochs."""

    lr = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Coverages(pl.Callback):
    """Keeps what each sparse batch covered, and what it might have: the significance is taken from the step."""

    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection = selection
        self.rows: list[tuple[float, float, bool]] = []
        self.sums: list[tuple[float, float, float]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.selection.session.watchers.append(Significance(self))

    def on_train_batch_end(self, *_: Any) -> None:
        session = self.selection.session
        if session.stage == "sparse":
            assert self.selection.coverage == session.coverage
            self.rows.append((session.coverage, session.activation_rate, session.selector.is_whole))

    def held(self, first: int = 100) -> float:
        selected = [coverage for coverage, _, whole in self.rows[first:] if not whole]
        return sum(selected) / len(selected)


class Significance(Watcher):
    """Adds up the significance of the samples that were selected, apart from the package."""

    def __init__(self, kept: Coverages) -> None:
        self.kept = kept

    def finish_batch(self, step: StepState) -> None:
        if step.significance is not None and step.selection is not None:
            s = step.significance.double()
            threshold = self.kept.selection.threshold or 0.0
            self.kept.sums.append((float(s[step.selection.indices].sum()), float(s.sum()), threshold))


def run(digits: Digits, *, epochs: int = 14, logger: Any = False, warmup: int = 1, **options: Any) -> Any:
    selection = SparseSelectionCallback(**options)
    kept = Coverages(selection)
    stages = TwoStageScheduler(warmup_epochs=warmup)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[selection, stages, kept], logger=logger, log_every_n_steps=1)
    trainer.fit(fresh(Small), loader(digits, batch_size=BATCH))
    return selection, kept


@pytest.mark.parametrize(
    ("mode", "gate", "weighting"),
    [
        *(("partial", *rule) for rule in [*SOFT, *HARD]),
        *((mode, *rule) for mode in ("mask", "subset") for rule in (SOFT[1], HARD[0])),
    ],
)
def test_the_coverage_is_held(digits: Digits, mode: str, gate: str, weighting: str | None) -> None:
    options: dict[str, Any] = {"mode": mode, "gate": gate, "weighting": weighting, "count_flops": False}
    selection, kept = run(digits, target_coverage=0.9, epochs=11, **options)
    assert len(kept.rows) == 10 * 16
    assert kept.held() == pytest.approx(0.9, rel=0.02)
    for (coverage, _, _), (carried, offered, _) in zip(kept.rows, kept.sums):
        if len(kept.rows) == len(kept.sums):  # not in subset, where some batches are not scored
            assert coverage == pytest.approx(carried / offered, abs=1e-6)
    rate = sum(rate for _, rate, _ in kept.rows[-32:]) / 32
    assert rate < 0.8, "few samples carry it by now"
    assert selection.activation_rate == kept.rows[-1][1]


def test_the_originals_preset(digits: Digits) -> None:
    controller = PIController(preset="original", kp=0.5, ki=0.01, initial_threshold=0.5, threshold_bounds=(0.01, 2.0))
    _, kept = run(digits, target_coverage=0.8, mode="mask", gate="threshold", controller=controller)
    assert kept.held() == pytest.approx(0.8, rel=0.02)
    assert controller.activation_rate_ema == pytest.approx(kept.rows[-1][1], abs=0.3)


@pytest.mark.parametrize("significance", ["loss", "el2n"])
def test_scores_that_are_made_of_losses(digits: Digits, significance: str) -> None:
    _, kept = run(digits, target_coverage=0.9, mode="partial", significance=significance, epochs=9)
    assert kept.held() == pytest.approx(0.9, rel=0.02)


def test_the_fewest_samples_are_kept_in_any_case(digits: Digits) -> None:
    with pytest.warns(UserWarning, match="min_selected keeps 28 of 32 samples, so the coverage cannot fall to its"):
        selection, kept = run(digits, target_coverage=0.3, min_selected=28, epochs=3)
    assert {round(rate * BATCH) for _, rate, _ in kept.rows} == {28}
    assert selection.ledger.stages["sparse"].selected == 28 * 32


# ---------------------------------------------------------------------- two processes


class Ranked(Small):
    """Each process has data of its own: the second one's are three times as many classes at a tenth of the contrast."""

    def __init__(self, digits: Digits) -> None:
        super().__init__()
        order = digits[1].argsort()
        self.parts = [order[:256], order[256:]]
        self.digits = digits

    def train_dataloader(self) -> Any:
        x, y = (part[self.parts[self.trainer.global_rank]] for part in self.digits)
        x = x * 0.1 if self.trainer.global_rank else x
        return DataLoader(TensorDataset(x, y), BATCH, shuffle=True)


class Write(pl.Callback):
    """Writes what a process ended with."""

    def __init__(self, folder: Path, kept: Coverages) -> None:
        self.folder = folder
        self.kept = kept

    def on_train_end(self, trainer: Any, module: Any) -> None:
        session = self.kept.selection.session
        state = (weights(module), self.kept.rows, self.kept.sums, session.selector.controller.state_dict())
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("mode", "gate"), [("partial", "soft"), ("mask", "threshold"), ("subset", "soft")])
def test_two_processes_hold_the_coverage_of_their_batches_together(
    digits: Digits, mode: Any, gate: Any, tmp_path: Path
) -> None:
    selection = SparseSelectionCallback(target_coverage=0.8, mode=mode, gate=gate, count_flops=False)
    kept = Coverages(selection)
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        use_distributed_sampler=False,
        callbacks=[selection, kept, Write(tmp_path, kept)],
        max_epochs=22,
    )
    torch.manual_seed(0)
    trainer.fit(Ranked(digits))
    (one, rows, sums, controller), (other, others, others_sums, others_controller) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert_same_weights(one, other)
    assert [whole for _, _, whole in rows] == [whole for _, _, whole in others], "they agree on whole batches"
    assert [t for _, _, t in sums] == [t for _, _, t in others_sums], "on one threshold"
    assert controller["held_ema"] == others_controller["held_ema"]
    assert [c for c, _, _ in rows] != [c for c, _, _ in others]
    scored = [
        (mine[0] + theirs[0]) / (mine[1] + theirs[1])
        for mine, theirs, (_, _, whole) in list(zip(sums, others_sums, rows))[100:]
        if not whole
    ]
    assert sum(scored) / len(scored) == pytest.approx(0.8, rel=0.02)


# ---------------------------------------------------------------------- what is logged, and what is refused


def test_what_an_event_file_holds(digits: Digits, tmp_path: Path) -> None:
    _, kept = run(digits, target_coverage=0.9, epochs=3, logger=TensorBoardLogger(str(tmp_path), name=""))
    series = {tag: [value for _, value in points] for tag, points in scalars(tmp_path / "version_0").items()}
    assert "ast/target_activation_rate" not in series
    assert series["ast/target_coverage"] == pytest.approx([1.0] * 16 + [0.9] * 32)
    assert series["ast/coverage"] == pytest.approx([1.0] * 16 + [coverage for coverage, _, _ in kept.rows])
    assert series["ast/activation_rate"][16:] == pytest.approx([rate for _, rate, _ in kept.rows])
    mean = None
    for _, rate, _ in kept.rows:
        mean = rate if mean is None else mean + 0.1 * (rate - mean)
    assert series["ast/activation_rate_ema"][-1] == pytest.approx(mean)


def test_the_summary_names_the_target(digits: Digits, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [SparseSelectionCallback(target_coverage=0.9), TwoStageScheduler(), SparseTrainingMonitor()]
    quiet_trainer(max_epochs=2, callbacks=callbacks).fit(fresh(Small), loader(digits, batch_size=BATCH))
    assert "in the sparse stage (target coverage 90.0%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "rate", "told"),
    [
        ({"target_coverage": 0}, None, r"target_coverage: expected a coverage in \(0, 1\], got 0\."),
        (
            {"target_coverage": 90},
            None,
            r"target_coverage: expected a coverage in \(0, 1\], got 90. Did you mean 0.9\?",
        ),
        ({"target_coverage": float("nan")}, None, "expected a coverage .* got nan"),
        ({"target_coverage": True}, None, "expected a coverage .* got True"),
        ({"target_coverage": "0.9"}, None, "expected a coverage .* got '0.9'"),
        (
            {"target_coverage": 0.9, "target_activation_rate": 0.4},
            None,
            r"expected target_activation_rate or target_coverage, got both \(0.4 and 0.9\)",
        ),
        (
            {"target_coverage": 0.9},
            0.3,
            r"expected one target, .*target_coverage=0.9.* and TwoStageScheduler\(.*=0.3\)",
        ),
    ],
)
def test_faults(digits: Digits, options: dict[str, Any], rate: float | None, told: str) -> None:
    callbacks = [SparseSelectionCallback(**options), TwoStageScheduler(target_activation_rate=rate)]
    with pytest.raises(ConfigurationError, match=told) as error:
        quiet_trainer(callbacks=callbacks, max_epochs=2).fit(fresh(Small), loader(digits, batch_size=BATCH))
    assert len(error.value.faults) == 1


def test_targets_that_are_read_back() -> None:
    assert SparseSelectionCallback().target_activation_rate == 0.4
    callback = SparseSelectionCallback(target_coverage=0.9)
    assert (callback.target_activation_rate, callback.target_coverage) == (None, 0.9)
