"""What a coverage needs now, from hand-made scores and from those of a real module."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.advice import Advice, advise, render
from lightning_ast.advice.measured import CoverageFacts, LoadingFacts, Phases, StepAt
from lightning_ast.advice.predict import COVERAGES, Predictions, coverage_facts, is_nothing_to_skip
from lightning_ast.advice.probe import ScoreWatcher
from lightning_ast.advice.script import Block, Timing, summarize
from lightning_ast.advice.verdict import decide
from lightning_ast.cli import main
from lightning_ast.core.threshold import rate_at_coverage
from lightning_ast.demo import ResNet9
from lightning_ast.errors import ConfigurationError
from lightning_ast.schedule import Schedule
from lightning_ast.selection.step_state import BatchFacts, StepState
from tests.advice.test_predict import facts
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import fit, quiet_trainer

QUICK = 0.2
PARTS = (StepAt(0.04, 0.9), StepAt(0.5, 1.8))


# ---------------------------------------------------------------------- hand-made scores


def rate(scores: list[float], coverage: float, gate: Any = "soft") -> float:
    found = coverage_facts([torch.tensor(scores)], [coverage], gate)
    assert found is not None
    return found.rates[coverage]


@pytest.mark.parametrize("gate", ["soft", "topk", "threshold"])
def test_flat_scores_have_nothing_to_skip(gate: Any) -> None:
    for scores in ([1.0] * 100, [0.0] * 100):
        for coverage in COVERAGES:
            assert rate(scores, coverage, gate) >= coverage - 1e-9
            assert is_nothing_to_skip(coverage, rate(scores, coverage, gate))
    alike = torch.linspace(0.97, 1.03, 100).tolist()
    assert is_nothing_to_skip(0.8, rate(alike, 0.8, gate)), "samples so much alike that any would do"


@pytest.mark.parametrize("gate", ["soft", "topk", "threshold"])
def test_concentrated_scores_have_much_to_skip(gate: Any) -> None:
    scores = [1.0] * 10 + [0.001] * 90
    assert rate(scores, 0.9, gate) < 0.15
    assert not is_nothing_to_skip(0.9, rate(scores, 0.9, gate))
    assert rate(scores, 0.8, gate) <= rate(scores, 0.9, gate) <= rate(scores, 0.99, gate)


def test_scores_that_are_not_finite_are_left_out() -> None:
    found = coverage_facts([torch.tensor([6.0, 1.0]), torch.tensor([2.0, 1.0, torch.nan, torch.inf])], [0.8], "topk")
    assert found == CoverageFacts(samples=4, rates={0.8: 0.5})
    assert coverage_facts([torch.tensor([torch.nan])], [0.8], "soft") is None
    assert coverage_facts([], [0.8], "soft") is None


def test_each_batch_is_scored_once_and_samples_that_are_not_finite_are_marked() -> None:
    position = 0
    watcher = ScoreWatcher(lambda: position)
    facts_of_batch = BatchFacts(size=3)
    watcher.finish_batch(StepState(facts_of_batch))
    assert watcher.scores == {}, "a dense batch has no scores"
    bad = torch.tensor([False, True, False])
    watcher.finish_batch(StepState(facts_of_batch, significance=torch.tensor([2.0, 0.0, 1.0]), bad=bad))
    watcher.finish_batch(StepState(facts_of_batch, significance=torch.tensor([9.0, 9.0, 9.0])))
    position = 1
    watcher.finish_batch(StepState(facts_of_batch, significance=torch.tensor([1.0, 1.0, 4.0])))
    found = coverage_facts(watcher.scores.values(), [0.75], "topk")
    assert found == CoverageFacts(samples=5, rates={0.75: 0.6}), "4, 2 and 1 of 9"


def test_one_sample_is_needed_whole() -> None:
    assert rate([3.0], 0.9, "topk") == 1.0
    assert is_nothing_to_skip(0.9, rate([3.0], 0.9))
    assert rate([3.0, 1.0], 1.0) == 1.0
    assert not is_nothing_to_skip(1.0, 1.0), "that is the dense run, however much the module has learned"


# ---------------------------------------------------------------------- predictions


def covering(rates: dict[float, float], **changes: Any) -> Predictions:
    step = {"parts": PARTS, **changes.pop("step", {})}
    return Predictions(replace(facts(step=step, **changes), coverage=CoverageFacts(64, rates)))


def test_each_mode_is_predicted_at_the_rate_that_a_coverage_needs() -> None:
    got = covering({0.9: 0.5})
    assert got.at_coverage("partial", 0.9).step_seconds == pytest.approx(0.5 + 2.0)
    assert got.at_coverage("subset", 0.9).step_seconds == pytest.approx(0.5 + 2.5)
    assert got.at_coverage("mask", 0.9).step_seconds == pytest.approx(0.5 + 3.1)
    pruned = got.at_coverage("prune", 0.9)
    assert pruned.step_seconds == pytest.approx(0.5 * 0.5 + 1.8 + 0.1), "half a batch is loaded, trained on and scored"
    assert pruned.batches == 1000, "as many batches as in the dense run"
    assert pruned.run_seconds == pytest.approx(200 * 3.6 + 800 * 2.15)
    assert (pruned.rate, pruned.coverage) == (0.5, 0.9)
    assert got.at_coverage("partial", 0.8) is None
    assert got.rate == 0.4, "no coverage was asked for"
    follow = covering({0.9: 0.5}, run={"prune_steps": "follow"})
    assert follow.at_coverage("prune", 0.9).batches == 200 + 400


def test_where_a_selection_costs_more_than_it_saves_batches_are_whole() -> None:
    got = covering({0.9: 0.7, 0.99: 0.96})
    assert got.at_coverage("subset", 0.9).step_seconds == 3.5, "it is not scored"
    assert got.at_coverage("partial", 0.9).step_seconds < 3.1
    steps = {mode: got.at_coverage(mode, 0.99).step_seconds for mode in ("mask", "partial", "prune", "subset")}
    assert steps == pytest.approx({"mask": 3.6, "partial": 3.6, "prune": 3.6, "subset": 3.5})
    assert got.at_coverage("prune", 0.99).batches == 1000


def test_the_steps_on_a_part_of_the_batch_are_those_of_subset_without_its_scoring() -> None:
    phases = Phases(0.1, 1.0, 2.0, 0.9)
    samples = [
        (Block(phases=False), Timing(3.0)),
        (Block(phases=True), Timing(4.0, phases=phases)),
        (Block("subset", 0.02, phases=True), Timing(2.0, 0.02, scoring_seconds=1.2)),
        (Block("subset", 0.6, phases=True), Timing(4.0, 0.6, scoring_seconds=1.2)),
        (Block("subset", 0.35, phases=False), Timing(2.0, 0.35)),
    ]
    assert summarize(samples, {}, batch_size=100).parts == (
        StepAt(0.02, pytest.approx(0.6)),
        StepAt(0.6, pytest.approx(2.1)),
    )
    assert summarize(samples[:2], {}, batch_size=100).parts is None


def test_a_pruned_run_that_keeps_its_steps_is_predicted_at_a_fixed_rate_too() -> None:
    got = Predictions(facts(run={"prune_steps": "keep"}, step={"parts": PARTS}))
    pruned = got.at("prune", 0.5)
    assert (pruned.batches, pruned.step_seconds) == (1000, pytest.approx(0.25 + 1.8 + 0.1))
    hidden = Predictions(
        facts(run={"prune_steps": "keep"}, step={"parts": PARTS}, loading=LoadingFacts(5.0, workers=2))
    )
    assert hidden.at("prune", 0.5).step_seconds == pytest.approx(2.5), "half as much is loaded"
    unknown = Predictions(facts(run={"prune_steps": "keep"}, step={"refused": {"subset": "why"}}))
    assert unknown.at("prune", 0.4) is None
    assert decide(unknown).reasons[-1].startswith("'prune' is not measured: 'subset'")
    assert decide(unknown).mode == "partial"


def test_max_steps_end_a_run_that_keeps_its_steps_where_they_end_the_dense_one() -> None:
    run = {
        "max_steps": 250,
        "max_epochs": None,
        "epochs": 2.5,
        "schedule": Schedule(warmup_epochs=1),
        "prune_steps": "keep",
    }
    got = Predictions(facts(run=run, step={"parts": PARTS}))
    assert got.at("prune", 0.4).batches == got.dense.batches == 250
    assert "max_steps" not in " ".join(decide(got).reasons)


# ---------------------------------------------------------------------- verdict and report


def test_the_verdict_is_at_the_users_coverage() -> None:
    got = covering({0.9: 0.5}, run={"own_coverage": 0.9, "own_mode": "partial", "prune_steps": "keep"})
    verdict = decide(got)
    assert (verdict.mode, verdict.rate, verdict.coverage) == ("prune", 0.5, 0.9)
    assert verdict.headline == (
        "Use mode='prune', target_coverage=0.9: it saves 30% of the run's seconds (58.3 min to 40.7 min), at the 50% "
        "of the samples that it needs now."
    )
    text = str(Advice(got.facts))
    assert "None" not in text
    assert "Yours, 'partial' at a coverage of 0.9 (a rate of 0.5 now): 45.0 min, 77% of the dense run." in text
    (row,) = [line.split() for line in text.splitlines() if "partial" in line and "(coverage 0.9)" in line]
    assert row[1:4] == ["0.5", "(coverage", "0.9)"]
    file = io.StringIO()
    render(Advice(got.facts), file=file)
    assert "0.5 (coverage 0.9)" in file.getvalue()
    assert "3 s, 0.86 / 0.89" in file.getvalue(), "subset: a step, its share, the run's share"


def test_nothing_to_skip_is_said_and_no_mode_is_advised() -> None:
    got = covering({0.8: 0.5, 0.9: 0.88, 0.99: 0.97}, run={"own_coverage": 0.9, "own_mode": "prune"})
    verdict = decide(got)
    assert verdict.mode is None
    assert verdict.headline == "Nothing to skip yet at a coverage of 0.9: it needs 88% of the samples now."
    lines = str(Advice(got.facts)).splitlines()
    (said,) = [line for line in lines if line.startswith("At a coverage of 0.9, 0.99 there is nothing to skip yet: ")]
    assert said.endswith("pass the module of a trained checkpoint.")
    assert "train densely for fewer" not in lines[-1], "that is no reason to train for fewer epochs"
    learned = covering({0.9: 0.3}, run={"own_coverage": 0.9})
    assert not any("nothing to skip" in line for line in str(Advice(learned.facts)).splitlines())


def test_without_scores_the_report_says_why() -> None:
    refused = dict.fromkeys(("mask", "subset", "partial", "prune"), "no loss")
    nothing = Advice(facts(run={"own_coverage": 0.9, "own_mode": "partial"}, step={"refused": refused}))
    assert "is not known: no mode can run that would score them." in str(nothing)
    assert nothing.verdict.headline == "AST cannot run here: every mode is refused."
    broken = Advice(facts(run={"own_coverage": 0.9, "own_mode": "partial"}))
    assert (broken.verdict.mode, broken.verdict.rate) == (None, None)
    assert broken.verdict.headline.startswith("The rate that a coverage of 0.9 needs is not known")
    assert "needs of the samples is not known: no sample had a finite significance" in str(broken)
    lacks = Advice(covering({0.9: 0.5}, step={"refused": {"subset": "why"}, "parts": None}).facts)
    assert "not measured" in str(lacks)


# ---------------------------------------------------------------------- real modules


@pytest.fixture(scope="module")
def modules(digits: Digits) -> tuple[pl.LightningModule, pl.LightningModule]:
    """A network that has learned nothing, and the same after a few epochs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = ResNet9(in_channels=1, width=4)
        trained = ResNet9(in_channels=1, width=4)
        trained.load_state_dict(untrained.state_dict())
        fit(trained, loader(digits, shuffle=True, batch_size=32), max_epochs=5)
    return untrained, trained


def asked(coverage: float = 0.9, **options: Any) -> list[pl.Callback]:
    return [SparseSelectionCallback(target_coverage=coverage, **options), TwoStageScheduler(warmup_epochs=1)]


def test_the_rate_falls_as_the_module_learns(modules: tuple[Any, Any], digits: Digits) -> None:
    found = [
        advise(quiet_trainer(max_epochs=3, callbacks=asked()), module, loader(digits), budget_seconds=QUICK)
        for module in modules
    ]
    before, after = (advice.verdict.rate for advice in found)
    assert before is not None
    assert after is not None
    assert is_nothing_to_skip(0.9, before)
    assert found[0].verdict.headline.startswith("Nothing to skip yet at a coverage of 0.9")
    assert after < before - 0.1
    assert "Nothing to skip yet at a coverage of 0.9:" not in str(found[1])
    for advice in found:
        assert "None" not in str(advice)
        assert {p.mode for p in advice.own} == {"mask", "subset", "partial", "prune"}
        assert all(p.coverage == 0.9 for p in advice.own)


@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_the_rate_is_that_of_the_scores_by_hand(gate: Any, modules: tuple[Any, Any], digits: Digits) -> None:
    _, trained = modules
    callbacks = asked(0.85, mode="prune", gate=gate)
    advice = advise(quiet_trainer(max_epochs=3, callbacks=callbacks), trained, loader(digits), budget_seconds=QUICK)
    found = advice.facts.coverage
    assert found is not None
    assert found.samples % 64 == 0
    scores = []
    trained.train()
    with torch.no_grad():
        for x, y in list(loader(digits))[: found.samples // 64]:
            probabilities = trained(x).softmax(1)
            scores.append((probabilities - F.one_hot(y, 10)).norm(dim=1))
    for coverage in (0.85, *COVERAGES):
        by_hand = rate_at_coverage(torch.cat(scores), coverage, gate)
        assert found.rates[coverage] == pytest.approx(by_hand, abs=0.01)


def test_where_no_mode_can_run_there_are_no_scores(digits: Digits) -> None:
    class OfTheMean(PlainNet):
        def __init__(self) -> None:
            super().__init__(batchnorm=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0].mean(0, keepdim=True)).square().mean()

    advice = advise(
        quiet_trainer(max_epochs=3, callbacks=asked()), OfTheMean(), loader(digits, batch_size=50), budget_seconds=QUICK
    )
    assert advice.table == ()
    assert advice.facts.coverage is None
    assert "no mode can run that would score them" in str(advice)


def test_two_targets_are_refused(digits: Digits) -> None:
    callbacks = [SparseSelectionCallback(target_coverage=0.9), TwoStageScheduler(target_activation_rate=0.4)]
    with pytest.raises(ConfigurationError, match="expected one target"):
        advise(quiet_trainer(max_epochs=3, callbacks=callbacks), PlainNet(), loader(digits), budget_seconds=QUICK)


def test_a_config_with_a_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6's use of it
    stages = {"class_path": "TwoStageScheduler", "init_args": {"warmup_epochs": 1}}
    selection = {"class_path": "SparseSelectionCallback", "init_args": {"target_coverage": 0.85, "mode": "prune"}}
    config = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 4, "accelerator": "cpu", "callbacks": [selection, stages]},
        "model": {"class_path": "lightning_ast.demo.ResNet9", "init_args": {"in_channels": 1, "width": 4}},
        "data": {"class_path": "lightning_ast.demo.ImageData", "init_args": {"data": "digits"}},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["advise", "--config", "config.yaml", "--budget_seconds", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "(coverage 0.85)" in out
    assert "\n    0.85 " in out
    assert "'prune' at a coverage of 0.85" in out
    assert "None" not in out
