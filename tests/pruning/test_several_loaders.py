"""Several loaders at once: each is pruned by the significance of its own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ast.core import SampleSelector, SignificanceHistory, plan_epoch
from lightning_ast.errors import ConfigurationError, EntryError
from tests.helpers.modules import PlainNet
from tests.helpers.training import SaveAt, assert_same_weights, gloo, quiet_trainer, weights
from tests.pruning.prune_by_hand import Indexed, fit, fresh, pruned

SIZES = {"a": 200, "b": 120}
BATCHES = {"a": 20, "b": 12}


class Both(PlainNet):
    """Two losses over two forwards; writes down what each step saw, with each sample's EL2N by hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[int, dict[str, list[int]], dict[str, list[float]]]] = []

    def loss(self, scores: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        return sum(nn.functional.cross_entropy(scores[name], labels[name]) for name in scores)  # type: ignore[return-value]

    def scores(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self(x) for name, x in inputs.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = dict(zip("ab", batch, strict=True)) if isinstance(batch, (list, tuple)) else batch
        labels = {name: part[1] for name, part in batch.items()}
        scores = self.scores({name: part[0] for name, part in batch.items()})
        errors = {
            name: (scores[name].detach().softmax(1) - nn.functional.one_hot(labels[name], 10)).norm(dim=1).tolist()
            for name in scores
        }
        self.seen.append((self.trainer.current_epoch, {n: part[2].tolist() for n, part in batch.items()}, errors))
        return self.loss(scores, labels)

    def epochs(self, name: str) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for epoch, indices, _ in self.seen:
            found.setdefault(epoch, []).extend(indices[name])
        return found


class Joined(Both):
    """One forward over both, one behind the other."""

    def scores(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = self(torch.cat([inputs["a"], inputs["b"]])).split([len(inputs["a"]), len(inputs["b"])])
        return {"a": a, "b": b}


class Mixed(Both):
    """The network sees differences of samples of both loaders."""

    pick = slice(12)

    def scores(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mixed = self(inputs["a"][self.pick] - inputs["b"])
        return {"a": self(inputs["a"]).detach(), "b": mixed}

    def loss(self, scores: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(scores["b"], labels["b"])


class MixedLast(Mixed):
    pick = slice(-12, None)


class Alternating(Both):
    """Trains on the samples of one loader, then on those of the other."""

    def loss(self, scores: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        name = "ab"[len(self.seen) % 2]
        return nn.functional.cross_entropy(scores[name], labels[name])


def loaders(batches: dict[str, int] = BATCHES, sizes: dict[str, int] = SIZES, **options: Any) -> dict[str, Any]:
    return {n: DataLoader(Indexed(sizes[n]), batch_size=batches[n], drop_last=True, **options) for n in sizes}


def remembered(module: Both, name: str, before: int, sizes: dict[str, int]) -> SignificanceHistory:
    """What was remembered of one loader's samples: their last error; its scale does not matter."""
    latest = {
        index: error
        for epoch, indices, errors in module.seen
        if epoch < before
        for index, error in zip(indices[name], errors[name], strict=True)
    }
    history = SignificanceHistory(sizes[name])
    history.observe(torch.tensor(list(latest)), torch.tensor(list(latest.values())))
    history.fold()
    return history


def planned(module: Both, name: str, epoch: int, *, count: int, sizes: dict[str, int] = SIZES) -> list[int]:
    """What a pruned epoch must load of one loader whose samples come in order."""
    offered = torch.arange(sizes[name])
    selector = SampleSelector(weighting="none")
    history = remembered(module, name, epoch, sizes)
    return plan_epoch(history, offered, epoch=epoch, count=count, selector=selector).indices.tolist()


@pytest.mark.parametrize("kind", [Both, Joined])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_loader_is_pruned_by_its_own_history(kind: Any, workers: int) -> None:
    module = fresh(kind)
    fit(module, loaders(num_workers=workers), pruned())
    for name, size in SIZES.items():
        seen = module.epochs(name)
        assert seen[0] == seen[3] == list(range(size))
        for epoch in (1, 2):
            assert seen[epoch] == planned(module, name, epoch, count=4 * BATCHES[name])


def test_the_shorter_of_two_ends_the_epoch() -> None:
    module = fresh(Both)
    both = loaders(sizes={"a": 300, "b": 120})
    fit(module, CombinedLoader(both, "min_size"), pruned())
    assert [len(module.epochs("a")[epoch]) for epoch in range(4)] == [200, 80, 80, 200]
    assert [len(module.epochs("b")[epoch]) for epoch in range(4)] == [120, 48, 48, 120]


@pytest.mark.parametrize("workers", [0, 2])
def test_dense_is_the_plain_run(workers: int) -> None:
    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        runs.append(fresh(Both))
        torch.manual_seed(5)
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(runs[-1], list(loaders(shuffle=True, num_workers=workers).values()))
    assert runs[0].seen == runs[1].seen
    assert_same_weights(*map(weights, runs))


@pytest.mark.parametrize(
    ("point", "workers"),
    [(("epoch end", 1, None), 0), (("batch end", 2, 1), 0), (("batch end", 2, 1), 2), (("batch end", 3, 4), 0)],
    ids=str,
)
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, point: Any, workers: int) -> None:
    path = tmp_path / "run.ckpt"
    runs = []
    for save, start, seed in ((SaveAt(path, *point), None, 0), (None, path, 7)):
        runs.append(fresh(Both, seed=seed))
        data = loaders(shuffle=True, num_workers=workers)
        fit(runs[-1], data, pruned(prune_steps="follow"), *([save] if save else []), ckpt_path=start)
    straight, again = runs
    assert again.seen == straight.seen[-len(again.seen) :]
    assert_same_weights(weights(straight), weights(again))


class Saves(pl.Callback):
    """Saves what each process saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        torch.save(pl_module.seen, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_processes_share_one_plan(tmp_path: Path) -> None:
    sizes = {"a": 400, "b": 240}
    fit(fresh(Both), loaders(sizes=sizes), pruned(), Saves(tmp_path), devices=2, strategy=gloo())
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    both = Both()
    both.seen = sorted(ranks[0] + ranks[1], key=lambda step: step[0])
    for name in sizes:
        for epoch in (1, 2):
            shares = [[index for step in seen if step[0] == epoch for index in step[1][name]] for seen in ranks]
            assert len(shares[0]) == len(shares[1]) == 4 * BATCHES[name]
            whole = planned(both, name, epoch, count=8 * BATCHES[name], sizes=sizes)  # whatever order they come in
            assert sorted(shares[0] + shares[1]) == whole


@pytest.mark.parametrize("kind", [Mixed, MixedLast])
def test_a_step_that_mixes_the_loaders_is_refused(kind: Any) -> None:
    with pytest.raises(EntryError, match=r"which rows belong to which of them cannot be told: .*StackDataset"):
        fit(fresh(kind), loaders(), pruned())


def test_a_graph_that_changes_again_and_again_is_refused() -> None:
    with pytest.raises(EntryError, match="another form again and again"):
        fit(fresh(Alternating), loaders(), pruned())


REFUSED = [
    (lambda: CombinedLoader(loaders(sizes={"a": 300, "b": 120}), "max_size_cycle"), {}, "use CombinedLoader"),
    (lambda: CombinedLoader(loaders(), "max_size"), {}, "use CombinedLoader"),
    (lambda: {"a": loaders(), "b": loaders()["b"]}, {}, "in a flat list or dict"),
    (lambda: {n: DataLoader(Indexed(s), batch_size=16) for n, s in SIZES.items()}, {}, "use CombinedLoader"),
    (lambda: {n: DataLoader(Indexed(100), batch_size=16) for n in "ab"}, {}, "needs full batches"),
    (lambda: loaders({"a": 2, "b": 2}, {"a": 20, "b": 20}), {}, "another batch_size in each, above their number"),
    (lambda: loaders({"a": 20, "b": 20}), {}, "another batch_size in each, .*; got 20, 20"),
    (loaders, {"weighting": "sqrt"}, "no weighting"),
    (loaders, {"never": torch.tensor([3])}, "no dataset index names one sample"),
    (loaders, {"class_floor": 0.1}, "no dataset index names one sample"),
    (loaders, {"prune_steps": "keep"}, "batches that keep their sizes"),
    (
        loaders,
        {"target_activation_rate": None, "target_coverage": 0.9, "prune_steps": "follow"},
        "keep their",
    ),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_cannot_be_pruned_together_is_refused(make: Any, options: Any, message: str) -> None:
    module = fresh(Both)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, make(), pruned(**options))
    assert module.seen == []
