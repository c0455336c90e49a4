"""The ideas that might make pruning better: one idea, one seed, one record, on a small CIFAR-10 run.

    python benchmarks/prune_ideas.py --idea class-balance --seed 0 --root cifar10.npz

Every idea changes one thing of `mode="prune"` at the same number of samples loaded: where an idea has more dense
epochs, its sparse ones have fewer samples. What is worth keeping must beat `prune` itself over several seeds.
`benchmarks/summarize.py` makes the table.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from cifar10 import equal, prune_stages, run_parser, run_size
from record import QUIET, kind, provenance, save
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import SampleSelector, SignificanceHistory, select_rows
from lightning_ast.core.significance import el2n
from lightning_ast.demo import ImageData, ResNet9
from lightning_ast.pruning import sample_book as _prune

LABELS = torch.empty(0)
"""Of the training images, for ideas that look at classes."""


class ClassBalance(SignificanceHistory):
    """Every class gives the same share: significance relative to its class's mean."""

    def significance(self, *, trim: float = 0.0) -> Tensor:
        scores = super().significance(trim=trim)
        sums = torch.zeros(10).index_add(0, LABELS, scores) / LABELS.bincount(minlength=10)
        return scores / sums[LABELS]


class SomeEasy(SignificanceHistory):
    """Some easy samples in every batch: half of the mean significance added to all."""

    def significance(self, *, trim: float = 0.0) -> Tensor:
        scores = super().significance(trim=trim)
        return scores + 0.5 * scores.mean()


class Progress(SignificanceHistory):
    """The change since the visit before counts as much as the score itself."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._change = torch.zeros(size)

    def fold(self, maximum: Any = None) -> None:
        before = self._scores.clone()
        known = self.seen
        super().fold(maximum)
        moved = (self._scores - before).abs()
        self._change = torch.where(known & (moved > 0), moved, self._change)

    def significance(self, *, trim: float = 0.0) -> Tensor:
        return super().significance(trim=trim) + self._change


class Relative(SignificanceHistory):
    """Scores relative to the mean of the epoch in which they were made: old ones do not look large."""

    def fold(self, maximum: Any = None) -> None:
        seen = self._recent >= 0
        if seen.any():
            self._recent[seen] /= self._recent[seen].mean()
        super().fold(maximum)


class Rank(SignificanceHistory):
    """The rank of the score in place of its value."""

    def significance(self, *, trim: float = 0.0) -> Tensor:
        scores = super().significance(trim=trim)
        return scores.argsort().argsort().float() / len(scores)


class MeanOfVisits(SignificanceHistory):
    """The running mean over visits in place of the last visit: what one augmentation hides, another shows."""

    def fold(self, maximum: Any = None) -> None:
        before = self._scores.clone()
        known = self.seen
        super().fold(maximum)
        self._scores = torch.where(known, 0.5 * (before + self._scores), self._scores)


class Age(SignificanceHistory):
    """The longer ago a score was made, the less it is believed: it moves towards the mean."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._age = torch.zeros(size)

    def fold(self, maximum: Any = None) -> None:
        visited = self._recent.cpu() >= 0
        super().fold(maximum)
        self._age = torch.where(visited, 0, self._age + 1)

    def significance(self, *, trim: float = 0.0) -> Tensor:
        scores = super().significance(trim=trim)
        belief = 0.8**self._age
        return belief * scores + (1 - belief) * scores.mean()


class AveragedScores(pl.Callback):
    """EL2N of an exponential moving average of the weights, by a forward of its own (its cost is not in the FLOPs)."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.net = copy.deepcopy(pl_module.net).requires_grad_(False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pairs = zip(self.net.state_dict().values(), pl_module.net.state_dict().values(), strict=True)
        for mine, theirs in pairs:
            if mine.is_floating_point():
                mine.lerp_(theirs, 0.02)

    def score(self, losses: Tensor, logits: Any, inputs: Any, targets: Any) -> Tensor:
        with torch.no_grad():
            return el2n(losses, self.net(inputs), inputs, targets)


class PartialInside(ResNet9):
    """A partial backward over two thirds of each batch of a pruned epoch."""

    selection: Any = None

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.per_sample_loss(batch, batch_idx)
        if self.selection.stage != "sparse":
            return losses.mean()
        kept = self.selector.select(losses.detach())
        return select_rows(losses, kept.indices, kept.weights) / len(kept.indices)

    def on_fit_start(self) -> None:
        self.selector = SampleSelector(target_activation_rate=2 / 3, weighting="none")


HISTORIES: dict[str, type[SignificanceHistory]] = {
    "class-balance": ClassBalance,
    "some-easy": SomeEasy,
    "progress": Progress,
    "relative": Relative,
    "rank": Rank,
    "mean-of-visits": MeanOfVisits,
    "age": Age,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "loss": {"significance": "loss"},
    "sqrt": {"weighting": "sqrt"},
    "unbiased": {"weighting": "unbiased"},
    "topk": {"gate": "topk"},
    "random": {"significance": equal},
}
WARMUPS = {"warmup-3": 3, "warmup-5": 5}
COOLDOWNS = {"cooldown-0": 0, "cooldown-1": 1, "cooldown-4": 4}
IDEAS = ["prune", "dense", *HISTORIES, *SETTINGS, *WARMUPS, *COOLDOWNS, "averaged-model", "partial-inside"]


def schedule(idea: str, rate: float, epochs: int) -> tuple[int, int, float]:
    """Return warmup and cooldown in epochs, and the rate that gives the same samples as `prune`'s own schedule."""
    usual = prune_stages(epochs)
    warmup = WARMUPS.get(idea, usual[0])
    cooldown = COOLDOWNS.get(idea, usual[1])
    loaded = sum(usual) + rate * (epochs - sum(usual))
    return warmup, cooldown, (loaded - warmup - cooldown) / (epochs - warmup - cooldown)


def main() -> None:
    """Train once and write the record."""
    parser = run_parser(__doc__, width=8, train_limit=20_000)
    parser.add_argument("--idea", choices=IDEAS, required=True)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    global LABELS  # noqa: PLW0603 - the histories are made by the callback
    pl.seed_everything(options.seed, verbose=False)
    model = (PartialInside if options.idea == "partial-inside" else ResNet9)(3, width=options.width)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = ImageData("cifar10", options.root, options.batch_size, train_limit=options.train_limit)
    data.setup("fit")
    LABELS = data.images.train_labels.long()
    _prune.SignificanceHistory = HISTORIES.get(options.idea, SignificanceHistory)  # type: ignore[misc]
    settings: dict[str, Any] = dict(SETTINGS.get(options.idea, {}))
    extra: list[pl.Callback] = []
    if options.idea == "averaged-model":
        averaged = AveragedScores()
        settings["significance"] = averaged.score
        extra.append(averaged)
    warmup, cooldown, rate = schedule(options.idea, options.rate, options.epochs)
    if options.idea == "dense":
        rate = 1.0
    selection = SparseSelectionCallback(mode="prune", target_activation_rate=rate, seed=options.seed, **settings)
    model.selection = selection
    pl.seed_everything(options.seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        precision="bf16-mixed",
        callbacks=[selection, TwoStageScheduler(warmup_epochs=warmup, cooldown_epochs=cooldown), *extra],
        check_val_every_n_epoch=options.epochs,
        **QUIET,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    record = {
        "benchmark": "prune-ideas",
        "idea": options.idea,
        "rate": options.rate,
        "sparse_rate": round(rate, 4),
        "seed": options.seed,
        "settings": {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "width": options.width,
            "train_images": len(LABELS),
            "precision": "bf16-mixed, channels_last",
        },
        "accuracy": round(float(trainer.callback_metrics["val_acc"]), 4),
        "samples_offered": selection.ledger.offered,
        "samples_selected": selection.ledger.selected,
        **provenance(),
    }
    size = run_size(options, len(LABELS))
    name = f"prune-ideas-{kind()}-{options.idea}-r{options.rate:g}-{size}-s{options.seed}"
    path = save(record, name, folder=options.out)
    print(f"{path}: accuracy {record['accuracy']}")


if __name__ == "__main__":
    main()
