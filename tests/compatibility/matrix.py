"""What works with what: the factors, ONE table of rules, and the cells in which the rules are tried.

A cell is a whole set-up. Its verdict follows from the first rule that matches it; ``test_matrix.py`` trains
every cell and holds it to its verdict, and :func:`markdown` writes the table for readers from the same rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

from lightning_ast.mode_facts import Mode

Verdict = Literal["exact", "approximate", "refused", "untested"]
Pair = tuple[tuple[str, str], tuple[str, str]]

FACTORS: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "optimization": ("automatic", "manual", "two", "lbfgs"),
    "accumulation": ("1", "3"),
    "gate": ("soft", "threshold", "topk"),
    "weighting": ("none", "sqrt", "unbiased"),
    "loss": ("captured", "explicit"),
    "precision": ("32-true", "bf16-mixed", "bf16-true", "16-mixed"),
    "devices": ("1", "popen", "spawn"),
    "batch": ("tuple", "list", "dict", "nested", "dataclass"),
    "compile": ("off", "on"),
}
BATCHNORM = ("none", "selected", "exact")
"""Not a factor: the network of the matrix has no BatchNorm. The other values have it, with the callback's setting."""

LABELS = {
    "accumulation": "`accumulate_grad_batches`",
    "batchnorm": "BatchNorm in the network, `batchnorm=`",
    "two": "`manual` with two optimizers",
    "lbfgs": "LBFGS",
    "popen": "2 (`ddp`)",
    "spawn": "2 (`ddp_spawn`)",
    "captured": "a torch loss function",
    "explicit": "`per_sample_loss`",
    "compile": "`torch.compile` of the network",
}


@dataclass(frozen=True)
class Cell:
    """A set-up: a value for each factor, as text."""

    mode: str = "mask"
    optimization: str = "automatic"
    accumulation: str = "1"
    gate: str = "soft"
    weighting: str = "sqrt"
    loss: str = "captured"
    precision: str = "32-true"
    devices: str = "1"
    batch: str = "tuple"
    compile: str = "off"
    batchnorm: str = "none"

    @property
    def id(self) -> str:
        """Readable, and a file's name."""
        values = {name: getattr(self, name) for name in FACTORS}
        values.update(accumulation=f"acc{self.accumulation}", devices=f"dev{self.devices}", compile="")
        values["compiled"] = "compiled" if self.compile == "on" else ""
        values["batchnorm"] = "" if self.batchnorm == "none" else f"batchnorm_{self.batchnorm}"
        return "-".join(filter(None, values.values()))

    @property
    def values(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        name: of the rule.
        when: factor to the values that it speaks of; a factor that is not named may have any.
        verdict: of the cells that match.
        reason: the footnote of the table.
        message: where refused, a regular expression of the error before the first optimizer step.
        gpu: whether it holds on a machine with a GPU.
    """

    name: str
    when: Mapping[str, tuple[str, ...]]
    verdict: Verdict
    reason: str = ""
    message: str = ""
    gpu: bool = True

    def matches(self, values: Mapping[str, str]) -> bool:
        """Whether it speaks of a set-up; one that is not yet complete only where nothing it needs is missing."""
        return all(values.get(factor) in allowed for factor, allowed in self.when.items())


FLOAT16 = "Needs a GPU, and one more for a second process: not run."

RULES = (
    Rule("float16 needs a GPU", {"precision": ("16-mixed",)}, "untested", FLOAT16, gpu=False),
    Rule(
        "float16 on several GPUs",
        {"precision": ("16-mixed",), "devices": ("popen", "spawn")},
        "untested",
        FLOAT16,
    ),
    Rule(
        "float16 with LBFGS",
        {"precision": ("16-mixed",), "optimization": ("lbfgs",)},
        "refused",
        "Refused by Lightning: its GradScaler does not work with LBFGS.",
        message="AMP and the LBFGS optimizer are not compatible",
    ),
    Rule(
        "accumulation in manual optimization",
        {"optimization": ("manual", "two"), "accumulation": ("3",)},
        "refused",
        "Refused by Lightning: `accumulate_grad_batches` with manual optimization, where the steps are yours.",
        message="Automatic gradient accumulation is not supported for manual optimization",
    ),
    Rule(
        "weights of a hard gate",
        {"gate": ("threshold", "topk"), "weighting": ("sqrt", "unbiased")},
        "refused",
        "Refused: the hard gates have no keep-probabilities, which `sqrt` and `unbiased` need.",
        message="needs keep-probabilities, which gate='(threshold|topk)' does not have",
    ),
    Rule(
        "LBFGS under accumulation",
        {"optimization": ("lbfgs",), "accumulation": ("3",)},
        "refused",
        "Refused: Lightning would add up the gradients of all evaluations of an LBFGS step.",
        message=r"(?s)(?=.*LBFGS)(?=.*accumulate_grad_batches)",
    ),
    Rule(
        "LBFGS in bfloat16",
        {"optimization": ("lbfgs",), "precision": ("bf16-true",)},
        "approximate",
        "LBFGS takes its curvature from differences of rounded gradients: in `bf16-true` the rounding decides.",
    ),
    Rule(
        "BatchNorm over the selected rows",
        {"mode": ("partial",), "batchnorm": ("selected",)},
        "approximate",
        'The backward of BatchNorm runs over the selected rows (the default); `batchnorm="exact"` is exact.',
    ),
    Rule(
        "BatchNorm of the selected samples",
        {"mode": ("subset",), "batchnorm": ("selected", "exact")},
        "approximate",
        "BatchNorm sees the selected samples alone: exactly a step on those, not the step with the others masked.",
    ),
    Rule(
        "a compiled backward",
        {"mode": ("partial",), "compile": ("on",)},
        "exact",
        "The backward of the compiled region is a full one: nothing is saved there, and it is said.",
    ),
    Rule(
        "batches without weights",
        {"mode": ("prune",), "accumulation": ("3",), "weighting": ("none",)},
        "exact",
        "Without weights a pruned batch is an ordinary one: under accumulation the mean of the batches' means.",
    ),
    Rule("everything else", {}, "exact"),
)


def rule_of(cell: Cell | Mapping[str, str], *, gpu: bool = False) -> Rule:
    """The rule that speaks of a cell.

    Args:
        cell: a set-up.
        gpu: whether the machine has one.
    """
    values = cell.values if isinstance(cell, Cell) else cell
    return next(rule for rule in RULES if (rule.gpu or not gpu) and rule.matches(values))


def verdict(cell: Cell, *, gpu: bool = False) -> Verdict:
    """What is expected of a cell; ``gpu`` is whether the machine has one."""
    return rule_of(cell, gpu=gpu).verdict


# ------------------------------------------------------------------ the cells

EXTRA = (
    Cell(optimization="manual", accumulation="3"),
    Cell(mode="prune", optimization="two", accumulation="3", weighting="none"),
    Cell(gate="threshold", weighting="sqrt"),
    Cell(mode="prune", gate="topk", weighting="unbiased"),
    Cell(mode="partial", gate="topk", weighting="sqrt", devices="popen"),
    Cell(mode="subset", optimization="manual"),
    Cell(mode="subset", optimization="two", devices="popen"),
    Cell(mode="subset", optimization="lbfgs", accumulation="3"),
    Cell(mode="prune", optimization="lbfgs", accumulation="3", weighting="none"),
    Cell(optimization="lbfgs", precision="16-mixed"),
    Cell(precision="16-mixed", devices="popen"),
    # one large batch: the denominators that the micro-batches and the ranks share
    *(
        Cell(mode=mode, gate=gate, weighting=weighting, accumulation="3", devices=devices)
        for mode in ("mask", "subset", "partial")
        for gate, weighting in (("threshold", "none"), ("soft", "sqrt"), ("soft", "unbiased"))
        for devices in ("1", "popen")
    ),
    *(
        Cell(mode="prune", weighting=w, accumulation="3", devices=d)
        for w in FACTORS["weighting"]
        for d in ("1", "popen")
    ),
    *(Cell(mode=mode, batchnorm="selected") for mode in FACTORS["mode"]),
    Cell(mode="partial", batchnorm="exact"),
)
"""What pairs alone do not reach: every refusal, every rule, the exactness that takes three factors at once."""


def refusable(values: Mapping[str, str]) -> bool:
    """Whether a set-up that may not be complete is already one that is refused or cannot be run on any machine."""
    return any(rule.gpu and rule.verdict in ("refused", "untested") and rule.matches(values) for rule in RULES)


@cache
def possible_pairs() -> tuple[Pair, ...]:
    """Every two values of two factors that occur together in a set-up which trains."""
    deciding = {f for rule in RULES for f in rule.when if rule.gpu and rule.verdict in ("refused", "untested")}
    found = []
    for one, other in itertools.combinations(FACTORS, 2):
        rest = [f for f in FACTORS if f in deciding - {one, other}]
        for left, right in itertools.product(FACTORS[one], FACTORS[other]):
            pair = {one: left, other: right}
            choices = itertools.product(*(FACTORS[f] for f in rest))
            if any(not refusable({**dict(zip(rest, choice)), **pair}) for choice in choices):
                found.append(((one, left), (other, right)))
    return tuple(found)


def pairs_of(cell: Cell) -> set[Pair]:
    """The pairs of values in a cell."""
    return {((a, getattr(cell, a)), (b, getattr(cell, b))) for a, b in itertools.combinations(FACTORS, 2)}


def covered(some: list[Cell]) -> set[Pair]:
    """The pairs that cells train: a refused cell covers none, and one that needs a GPU only float16's own."""
    trained = [c for c in some if not refusable(c.values) and c.batchnorm == "none"]
    return {
        pair for c in trained for pair in pairs_of(c) if c.precision != "16-mixed" or ("precision", "16-mixed") in pair
    }


@cache
def cells() -> tuple[Cell, ...]:
    """The cells: pairwise over all that trains, then :data:`EXTRA`; the same ones in every run."""
    from allpairspy import AllPairs

    known = {name: [v for v in values if v != "16-mixed"] for name, values in FACTORS.items()}
    rows = AllPairs(list(known.values()), filter_func=lambda row: not refusable(dict(zip(known, row))))
    found = [Cell(*row) for row in rows]
    missing = [pair for pair in possible_pairs() if pair not in covered(found)]
    while missing:
        found.append(_cell_with(missing))
        missing = [pair for pair in missing if pair not in covered(found[-1:])]
    return tuple(dict.fromkeys([*found, *EXTRA]))


def _cell_with(missing: list[Pair]) -> Cell:
    """A cell that has the first of these pairs, and others where it can."""
    values: dict[str, Any] = dict(missing[0])
    for factor, choices in FACTORS.items():
        if factor in values:
            continue
        allowed = [v for v in choices if not refusable({**values, factor: v})]
        allowed = [v for v in allowed if v != "16-mixed"] or allowed
        gains = [
            sum((factor, v) in pair and all(values.get(f, w) == w for f, w in pair if f != factor) for pair in missing)
            for v in allowed
        ]
        values[factor] = allowed[gains.index(max(gains))]
    return Cell(**values)


# ------------------------------------------------------------------ the table


def _reasons() -> list[str]:
    """The footnotes, in the order of the rules."""
    return list(dict.fromkeys(rule.reason for rule in RULES if rule.reason))


def _entry(mode: str, factor: str, value: str) -> str:
    """The best that a value reaches in a mode, and the numbers of the rules that have something to say of it."""
    deciding = sorted({name for rule in RULES for name in rule.when if name in FACTORS} - {"mode", factor})
    choices = itertools.product(*(FACTORS[name] for name in deciding))
    base = {**Cell().values, "mode": mode, factor: value}
    verdicts = {rule_of({**base, **dict(zip(deciding, choice))}).verdict for choice in choices}
    best = next(v for v in ("exact", "approximate", "untested", "refused") if v in verdicts)
    spoken_of = [
        rule.reason
        for rule in RULES
        if mode in rule.when.get("mode", (mode,)) and value in rule.when.get(factor, ())
        if rule.verdict != "untested" or best == "untested"
    ]
    notes = [str(number) for number, reason in enumerate(_reasons(), start=1) if reason in spoken_of]
    return best + (f" <sup>{' '.join(notes)}</sup>" if notes else "")


def markdown() -> str:
    """The table for readers: what each value of each factor is in each mode, with the rules as footnotes."""
    modes = FACTORS["mode"]
    lines = ["| | " + " | ".join(f"`{mode}`" for mode in modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for factor, values in {**FACTORS, "batchnorm": BATCHNORM[1:]}.items():
        if factor == "mode":
            continue
        entries = {value: tuple(_entry(mode, factor, value) for mode in modes) for value in values}
        for entry, group in itertools.groupby(values, key=entries.__getitem__):
            shown = ", ".join(LABELS.get(value, f"`{value}`") for value in group)
            lines.append(f"| {LABELS.get(factor, factor)}: {shown} | " + " | ".join(entry) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(_reasons(), start=1))])
