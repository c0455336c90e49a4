"""The plans: which runs make the map, the headline table and the answers to single questions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from regime_run import Option, Regime, Run

__all__ = ["GPU_PLACES", "PLANS", "expected_seconds", "headline_runs", "map_settings", "plan"]

Setting = tuple[str, dict[str, Option]]

DENSE: Setting = ("dense", {})
OURS = ("soft", "keep")
"""The gate and the way to count steps that the map is made with: the defaults with a coverage."""

_FOLLOWING = "0.97, an eighth, schedules follow"

_KEPT = "prune-rate0.4-gatetopk-stepskeep"


def _pruned(gate: str, steps: str, *, cooldown: int | None = None, **target: Option) -> Setting:
    stages: dict[str, Option] = {} if cooldown is None else {"cooldown": cooldown}
    return "prune", {**target, "gate": gate, "steps": steps, **stages}


def _runs(regimes: Iterable[Regime], settings: Iterable[Setting], seeds: int) -> list[Run]:
    """List the runs, seeds breadth-first: all settings with the first seed, then all with the next."""
    regimes = list(regimes)
    settings = list(settings)
    return [
        Run(regime, policy, tuple(options.items()), seed)
        for seed in range(seeds)
        for regime in regimes
        for policy, options in settings
    ]


def steps_plan() -> list[Run]:
    """List what tells how the steps of a pruned run are best counted, at one rate."""
    pruned = [_pruned(gate, steps, rate=0.4) for steps in ("keep", "follow", "replan") for gate in ("topk", "soft")]
    controls: list[Setting] = [
        ("dense", {"length": 12}),
        ("random", {"like": _KEPT, "steps": "keep"}),
        ("random", {"like": _KEPT, "steps": "replan"}),
    ]
    return _runs([Regime(data="fashion_mnist"), Regime(data="cifar10")], [DENSE, *pruned, *controls], seeds=3)


FASHION = Regime(data="fashion_mnist")
CIFAR = Regime(data="cifar10")
_DIGITS = Regime(data="digits", images=1_437, epochs=48, batch_size=64)
_FINE_TUNED = replace(CIFAR, network="pretrained", width=64, images=1_000, epochs=16, batch_size=64)


def _places() -> list[Regime]:
    """List the places of the map: length, number of images, redundancy, imbalance, wrong labels, networks.

    Not every kind is there with both data sets: all runs together take about ten hours on two cores.
    """
    places = [FASHION, CIFAR]
    for base, whole in ((FASHION, {"images": 60_000}), (CIFAR, {"images": 50_000, "width": 32})):
        places += [
            replace(base, epochs=8),
            replace(base, images=1_000, epochs=64),
            replace(base, images=5_000, epochs=48),
            replace(base, **whole, epochs=16),
            replace(base, images=5_000, redundancy=4),
        ]
        places += [replace(base, images=10_000, imbalance=imbalance) for imbalance in (10.0, 100.0)]
        places += [replace(base, noise=noise) for noise in (0.2, 0.4)]
    places += [replace(CIFAR, epochs=64), replace(CIFAR, images=10_000, redundancy=2), replace(CIFAR, noise=0.1)]
    places += [replace(CIFAR, network="resnet9", width=8), replace(CIFAR, network="vit", width=32, images=10_000)]
    places += [replace(FASHION, network="mlp", width=512), replace(FASHION, network="mlp", width=512, images=60_000)]
    places += [_DIGITS, replace(_DIGITS, network="mlp", width=512)]
    return [*places, _FINE_TUNED]


def map_settings(place: Regime) -> dict[str, Setting]:
    """Return the settings of ours on the map, by the head of their column: coverages and lengths of cooldown.

    A run of 24 epochs has one dense epoch at its end without an option, and three where that is an eighth of it.
    """
    eighth = max(1, place.epochs // 8)
    return {
        "coverage 0.97": _pruned(*OURS, coverage=0.97),
        "0.97, cooldown an eighth": _pruned(*OURS, coverage=0.97, cooldown=eighth),
        _FOLLOWING: _pruned("soft", "follow", coverage=0.97, cooldown=eighth),
        "0.9, an eighth": _pruned(*OURS, coverage=0.9, cooldown=eighth),
        "0.99, an eighth": _pruned(*OURS, coverage=0.99, cooldown=eighth),
    }


def map_plan() -> list[Run]:
    """List the runs of the regime map: at each place dense, ours, and dense at two thirds of the length."""
    runs: list[Run] = []
    for place in _places():
        shortened: Setting = ("dense", {"length": round(2 / 3 * place.epochs)})
        # Runs on a thousand images scatter by a point, and take seconds.
        is_small = place.images < 2_000 and place.network != "pretrained"
        runs += _runs([place], [DENSE, *map_settings(place).values(), shortened], seeds=12 if is_small else 3)
    return sorted(runs, key=lambda run: run.seed)


def headline_plan() -> list[Run]:
    """List the runs of the headline table: every method on both data sets at full size, up to seven seeds.

    The dense runs are shortened to about the work of the pruned runs: below it, at it and above.
    """
    runs: list[Run] = []
    for regime, rate, lengths in (
        (replace(FASHION, images=60_000, epochs=16), 0.4, (6, 8, 10)),
        (replace(CIFAR, images=50_000, width=32, epochs=16), 0.6, (9, 11, 13)),
    ):
        like = [f"prune-{target}-gatetopk-stepskeep" for target in (f"rate{rate:g}", "coverage0.95")]
        settings: list[Setting] = [DENSE]
        settings.append(_pruned("soft", "keep", coverage=0.97))
        settings += [_pruned(gate, "keep", coverage=each) for each in (0.95, 0.9) for gate in ("topk", "soft")]
        settings += [_pruned(gate, "keep", rate=rate) for gate in ("topk", "soft")]
        settings += [_pruned("soft", "follow", coverage=0.97)]
        settings += [_pruned("topk", "follow", coverage=each) for each in (0.95, 0.9)]
        settings += [_pruned("soft", steps, coverage=0.97, cooldown=2) for steps in ("keep", "follow")]
        settings += [_pruned("topk", "follow", coverage=0.95, cooldown=2)]
        settings += [_pruned("soft", "keep", coverage=0.99, cooldown=2)]
        settings += [("dense", {"length": length}) for length in lengths]
        settings += [("dense", {"length": lengths[1], "lr": lr}) for lr in (0.05, 0.1, 0.4)]
        settings.append(("dense", {"lr": 0.1}))
        settings += [("random", {"like": each, "steps": "keep"}) for each in like]
        settings += [
            ("infobatch", {}),
            ("seta", {}),
            ("orderdp", {}),
            ("selective-backprop", {}),
            ("partial", {"coverage": 0.9}),
            ("original", {"rate": 0.4}),
        ]
        runs += _runs([regime], settings, seeds=7)
    return sorted(runs, key=lambda run: run.seed)


GPU_PLACES = (
    replace(CIFAR, images=50_000, network="resnet9", width=64, epochs=32, batch_size=256),
    replace(CIFAR, images=50_000, network="resnet9", width=64, epochs=16, batch_size=256),
    replace(CIFAR, images=50_000, network="resnet9", width=64, epochs=64, batch_size=256),
    replace(CIFAR, images=50_000, network="resnet18", width=64, epochs=32, batch_size=256),
)
"""Networks that a GPU is not too large for; the first one is that of the headline."""


def gpu_plan() -> list[Run]:
    """List the runs of larger networks: the methods of the headline's short table, on full batches.

    What a place needs most is listed for all seeds before the rest of it.
    """
    runs: list[Run] = []
    for place in GPU_PLACES:
        length = round(0.66 * place.epochs)
        eighth = place.epochs // 8
        cooled = [_pruned("soft", "follow", coverage=each, cooldown=eighth) for each in (0.97, 0.9, 0.99)]
        cooled += [_pruned("soft", "keep", coverage=each, cooldown=eighth) for each in (0.97, 0.99)]
        cooled += [_bounded(0.97, eighth)]
        runs += _runs([place], [DENSE, *cooled, ("dense", {"length": place.epochs // 2})], seeds=5)
        runs += _runs([place], _short_settings("topk", 0.95, length)[1:], seeds=5)
        tuned: list[Setting] = [("dense", {"length": length, "lr": lr}) for lr in (0.1, 0.4)]
        others = [_pruned("soft", "follow", coverage=0.99), _pruned("soft", "keep", coverage=0.97)]
        others += [_pruned("topk", "follow", rate=0.6), ("seta", {}), *tuned]
        runs += _runs([place], others, seeds=5)
    return runs


def _short_settings(gate: str, coverage: float, length: int) -> list[Setting]:
    """List dense, ours, a random share of its size, InfoBatch's rule, and dense runs of about its work."""
    return [
        DENSE,
        _pruned(gate, "follow", coverage=coverage),
        _pruned("soft", "follow", coverage=0.97),
        ("dense", {"length": length}),
        ("infobatch", {}),
        ("random", {"like": f"prune-coverage{coverage:g}-gate{gate}-stepsfollow", "steps": "replan"}),
    ]


def trial_plan() -> list[Run]:
    """List runs of seconds, which tell whether everything runs."""
    place = Regime(data="digits", images=300, network="mlp", width=16, epochs=6, batch_size=32)
    return _runs([place], _short_settings("soft", 0.9, 4), seeds=1)


def headline_runs() -> list[Run]:
    """List the runs of the headline tables: those of the plan, then those of larger networks on a GPU."""
    return [*headline_plan(), *gpu_plan()]


def coverage_plan() -> list[Run]:
    """List what tells which gate, coverage and number of steps suit a network that underfits and one that fits."""
    covered = [_pruned(gate, "keep", coverage=each) for each in (0.9, 0.95, 0.97) for gate in ("topk", "soft")]
    covered += [_pruned(gate, "follow", coverage=0.9) for gate in ("topk", "soft")]
    covered += [
        _pruned("topk", "keep", coverage=0.9, lr=0.12),
        _pruned("soft", "keep", coverage=0.9, weighting="unbiased"),
    ]
    shortened: list[Setting] = [("dense", {"length": length}) for length in (12, 16, 20)]
    return _runs([CIFAR, FASHION], [DENSE, *covered, *shortened], seeds=5)


_FITTED = replace(CIFAR, images=5_000, epochs=48)
"""A place whose network fits its data, as larger ones do."""


def _bounded(coverage: float, cooldown: int) -> Setting:
    """Return a coverage in which no sample is kept with a probability below 1/2."""
    policy, options = _pruned("soft", "follow", coverage=coverage, cooldown=cooldown)
    return policy, options | {"weighting": "unbiased", "idea": "bounded"}


def _bounded_and_controls() -> list[Setting]:
    """List coverages in which no sample is kept with a probability below 1/2, and their controls."""
    kept = map_settings(_FITTED)["0.97, cooldown an eighth"]
    controls: list[Setting] = [DENSE, ("infobatch", {}), map_settings(_FITTED)[_FOLLOWING], kept]
    return [*controls, *(_bounded(coverage, _FITTED.epochs // 8) for coverage in (0.97, 0.9))]


def _scales() -> list[Run]:
    """List what tells whether the steps of small batches, of samples with large gradients, are too long.

    A batch that has 0.4 of its samples left has their mean gradient, up to 2.5 times as large as that of all. Where a
    network is fine-tuned, a random share in batches as small is one control, dense training in batches of 40 another.
    """
    runs: list[Run] = []
    for place, ideas, seeds in (
        (_DIGITS, ("scaled-gradient", "smaller-steps", "least-batch-32"), 12),
        (replace(FASHION, images=1_000, epochs=64), ("scaled-gradient", "smaller-steps"), 12),
        (replace(CIFAR, epochs=8), ("scaled-gradient",), 3),
        (_FITTED, ("scaled-gradient",), 3),
        (FASHION, ("scaled-gradient",), 3),
    ):
        policy, options = map_settings(place)["0.97, cooldown an eighth"]
        tried: list[Setting] = [(policy, options | {"idea": idea}) for idea in ideas]
        runs += _runs([place], [DENSE, (policy, options), map_settings(place)[_FOLLOWING], *tried], seeds)
    policy, options = kept = map_settings(_FINE_TUNED)["0.97, cooldown an eighth"]
    like = Run(_FINE_TUNED, policy, tuple(options.items())).setting
    tried = [kept, map_settings(_FINE_TUNED)[_FOLLOWING], ("random", {"like": like, "steps": "keep"})]
    tried += [(policy, options | {"idea": idea}) for idea in ("scaled-gradient", "smaller-steps")]
    smaller = replace(_FINE_TUNED, batch_size=40)
    return [*runs, *_runs([_FINE_TUNED], [DENSE, *tried], seeds=3), *_runs([smaller], [DENSE], seeds=3)]


def ideas_plan() -> list[Run]:
    """List what was tried, each idea beside its control: the pruned run of the plan ``steps``, or the same coverage."""
    ideas: list[Setting] = [DENSE, _pruned("topk", "keep", rate=0.4)]
    ideas += [
        ("prune", {"rate": 0.4, "gate": "topk", "steps": "keep", "idea": idea})
        for idea in (
            "random-beside",
            "class-floor",
            "progress",
            "smoothed",
            "averaged-model",
            "higher-rate",
            "partial-inside",
        )
    ]
    ideas += [_pruned("topk", "replan", rate=0.4), ("prune", {**_REPLANNED, "idea": "higher-rate"})]
    ideas += [_pruned(gate, "keep", coverage=0.9) for gate in ("topk", "soft")]
    remedies: list[Setting] = [DENSE, *(_pruned(gate, "keep", rate=0.4) for gate in ("topk", "soft"))]
    remedies += [
        ("prune", {"rate": 0.4, "gate": "topk", "steps": "keep", "idea": "averaged-model"}),
        ("prune", {"rate": 0.4, "gate": "topk", "steps": "keep", "idea": "trimmed", "trim": 0.1}),
        ("prune", {"rate": 0.4, "gate": "topk", "steps": "keep", "idea": "trimmed", "trim": 0.2}),
        ("prune", {"rate": 0.4, "gate": "soft", "steps": "keep", "significance": "confidence"}),
        _pruned("soft", "keep", coverage=0.97),
        ("prune", {"coverage": 0.97, "gate": "soft", "steps": "keep", "trim": 0.2}),
        ("prune", {"coverage": 0.97, "gate": "topk", "steps": "keep", "trim": 0.2}),
    ]
    runs = _runs([FASHION, CIFAR], ideas, seeds=4)
    runs += _runs([_FITTED], _bounded_and_controls(), seeds=3)
    runs += _scales()
    runs += _runs([replace(base, noise=noise) for base in (FASHION, CIFAR) for noise in (0.2, 0.4)], remedies, seeds=3)
    return sorted(dict.fromkeys(runs), key=lambda run: run.seed)


def curriculum_plan() -> list[Run]:
    """List rules of curriculum and active learning at equal work, on the headline's Fashion-MNIST."""
    rules = ("hardest", "margin", "entropy", "diversity", "easiest")
    like = "prune-rate0.4-gatesoft-stepskeep"
    settings: list[Setting] = [DENSE, _pruned("soft", "keep", rate=0.4)]
    settings += [_pruned("soft", "keep", rate=0.4, significance=rule) for rule in rules]
    settings += [("random", {"like": like, "steps": "keep"}), ("dense", {"length": 8})]
    return _runs([replace(FASHION, images=60_000, epochs=16)], settings, seeds=5)


_REPLANNED: dict[str, Option] = {"rate": 0.4, "gate": "topk", "steps": "replan"}

PLANS = {
    "steps": steps_plan,
    "coverage": coverage_plan,
    "headline": headline_plan,
    "map": map_plan,
    "ideas": ideas_plan,
    "curriculum": curriculum_plan,
    "gpu": gpu_plan,
    "trial": trial_plan,
}


def plan(name: str) -> list[Run]:
    """List the runs of a plan in the order in which they are to be done."""
    return PLANS[name]()


def expected_seconds(run: Run) -> float:
    """Estimate the time of a run on one CPU thread, validations included."""
    from regime_networks import NETWORKS

    microseconds = NETWORKS[run.regime.network].microseconds
    each = microseconds.get((run.regime.data, run.regime.width), 300)
    work = run.epochs * _expected_rate(run)
    validations = 10 * 10_000 / 4
    return 1e-6 * each * (work * run.regime.images * run.regime.redundancy + validations) + 2


def _expected_rate(run: Run) -> float:
    """Guess the work of a policy as a share of a dense run of its length."""
    if run.policy in ("prune", "random"):
        rate = float(run.option("rate", 0.6))
        return 0.13 + 0.87 * rate
    return {"infobatch": 0.65, "seta": 0.6, "orderdp": 0.64, "original": 1.5}.get(run.policy, 1.0)
