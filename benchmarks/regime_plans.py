"""The plans: which runs make the map, the headline table and the answers to single questions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from regime_networks import NETWORKS
from regime_run import Option, Regime, Run

__all__ = ["PLANS", "expected_seconds", "plan"]

Setting = tuple[str, dict[str, Option]]

DENSE: Setting = ("dense", {})
_HALF = {"rate": 0.4}


def _steps_settings() -> list[Setting]:
    pruned: list[Setting] = [
        ("prune", {**_HALF, "gate": gate, "steps": steps})
        for steps in ("keep", "follow", "replan")
        for gate in ("topk", "soft")
    ]
    likes: list[Setting] = [
        ("random", {"like": "prune-rate0.4-gatetopk-stepskeep", "steps": "keep"}),
        ("random", {"like": "prune-rate0.4-gatetopk-stepskeep", "steps": "replan"}),
    ]
    return [DENSE, *pruned, ("dense", {"length": 12}), *likes]


def _runs(regimes: Iterable[Regime], settings: list[Setting], seeds: int) -> list[Run]:
    """List the runs, seeds breadth-first: all settings with the first seed, then all with the next."""
    regimes = list(regimes)
    return [
        Run(regime, policy, tuple(options.items()), seed)
        for seed in range(seeds)
        for regime in regimes
        for policy, options in settings
    ]


def steps_plan() -> list[Run]:
    """List what tells how the steps of a pruned run are best counted."""
    regimes = [Regime(data="fashion_mnist"), Regime(data="cifar10")]
    return _runs(regimes, _steps_settings(), seeds=4)


PLANS = {"steps": steps_plan}


def plan(name: str) -> list[Run]:
    """List the runs of a plan in the order in which they are to be done."""
    return PLANS[name]()


def expected_seconds(run: Run) -> float:
    """Estimate the time of a run on one CPU thread, validations included."""
    microseconds = NETWORKS[run.regime.network].microseconds
    each = microseconds.get((run.regime.data, run.regime.width), 300)
    work = run.epochs * _expected_rate(run)
    validations = 12 * 10_000 / 4
    return 1e-6 * each * (work * run.regime.images * run.regime.redundancy + validations) + 2


def _expected_rate(run: Run) -> float:
    """Guess the work of a policy as a share of a dense run of its length."""
    if run.policy in ("prune", "random"):
        rate = float(run.option("rate", 0.6))
        return 0.13 + 0.87 * rate
    return {"infobatch": 0.65, "seta": 0.6, "orderdp": 0.64, "original": 1.5}.get(run.policy, 1.0)


def at(regime: Regime, **changes: Option) -> Regime:
    """Return a place on the map beside another."""
    return replace(regime, **changes)  # type: ignore[arg-type]
