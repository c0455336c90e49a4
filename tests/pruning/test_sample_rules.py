"""Samples that are always or never trained on, a floor for each class, and scores that a run begins with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ast import SparseLossMixin, SparseSelectionCallback
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import SaveAt, assert_close_weights, assert_same_weights, gloo, weights
from tests.pruning.prune_by_hand import SIZE, Indexed, Witness, fit, fresh, loader, pruned

DIGITS = Indexed()
LABELS = DIGITS.y


def train(module: Any = None, *callbacks: Any, data: Any = None, **options: Any) -> tuple[Any, SparseSelectionCallback]:
    running = {name: options.pop(name) for name in ("warmup", "cooldown", "ckpt_path", "max_epochs") if name in options}
    module, callback = module or fresh(), pruned(**options)
    fit(module, data or loader(), callback, *callbacks, **running)
    return module, callback


def test_always() -> None:
    always = [7, 7, 100, 299]
    module, _ = train(always=always)
    for epoch in (1, 2):
        assert set(always) <= set(module.epochs()[epoch])
        assert len(module.epochs()[epoch]) == 120, "the rest is drawn, to the same number"


def test_always_counts_for_the_coverage() -> None:
    chosen = torch.arange(0, SIZE, 3)
    module, callback = train(always=chosen, target_activation_rate=None, target_coverage=0.3, prune_steps="follow")
    epoch = module.epochs()[1]
    assert set(chosen.tolist()) <= set(epoch)
    assert len(epoch) < 150
    assert callback.coverage is not None


def test_more_than_an_epoch_loads_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"always: 130 samples .* loads 120"):
        train(always=torch.arange(130))


def test_never_is_not_loaded_in_a_pruned_epoch_and_has_no_gradient_in_a_dense_one() -> None:
    never = torch.arange(0, SIZE, 10)
    module, _ = train(fresh(batchnorm=False, dropout=0.0), never=never, max_epochs=2, cooldown=0)
    epochs = module.epochs()
    assert len(epochs[0]) == SIZE
    assert not set(never.tolist()) & set(epochs[1])
    assert len(epochs[1]) == 120
    poisoned = Indexed()
    poisoned.x[never] = 5 * torch.rand_like(poisoned.x[never])
    other, _ = train(
        fresh(batchnorm=False, dropout=0.0), never=never, max_epochs=2, cooldown=0, data=loader(dataset=poisoned)
    )
    assert_close_weights(weights(module), weights(other))


def test_a_batch_of_nothing_else_has_no_gradient() -> None:
    module, _ = train(fresh(batchnorm=False, dropout=0.0), never=torch.arange(32, SIZE), max_epochs=2, cooldown=0)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert set(range(32)) <= set(module.epochs()[1]), "the plan is filled up by samples that have no gradient"


def test_the_indices_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "these.csv").write_text("index,reason\n3,hard\n4,rare\n")
    module, _ = train(always=str(tmp_path / "these.csv"))
    assert {3, 4} <= set(module.epochs()[1]) & set(module.epochs()[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"always": [1, SIZE]}, rf"always: expected dataset indices in \[0, {SIZE}\); got {SIZE}"),
        ({"never": [-1]}, r"never: expected dataset indices .* got -1"),
        ({"always": [0.5]}, "a list of ints"),
        ({"always": torch.ones(3, 2, dtype=torch.long)}, "a list of ints"),
        ({"always": [1, 2], "never": [2]}, "got 2 in both"),
        ({"never": {1, 2}}, "never: expected a tensor, a list of numbers, or a file; got set"),
        ({"always": "no_such.csv"}, "always: expected a file that can be read"),
        ({"class_floor": 0.5}, "class_floor=0.5 keeps more .* target_activation_rate=0.4"),
        ({"class_floor": 20}, r"class_floor: .* \[0, 1\), got 20. Did you mean 0.2"),
        ({"keep_scores": -1}, "keep_scores: expected a number of epochs"),
        ({"mode": "partial", "never": [1]}, "never names samples by their dataset index"),
    ],
)
def test_faults(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        train(**options)


def shares(module: Witness, epoch: int) -> dict[int, float]:
    """The share of each class that an epoch trained on."""
    kept = Counter(LABELS[module.epochs()[epoch]].tolist())
    return {kind: kept[kind] / int((kind == LABELS).sum()) for kind in range(10)}


@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_each_class_keeps_its_floor(gate: Any) -> None:
    without, _ = train(gate=gate)
    module, _ = train(gate=gate, class_floor=0.35)
    assert min(shares(without, 1).values()) < 0.35
    for epoch in (1, 2):
        assert min(shares(module, epoch).values()) >= 0.35
        assert len(module.epochs()[epoch]) == 120


@pytest.mark.parametrize("mode", ["partial", "mask", "subset"])
def test_each_class_of_a_batch_keeps_its_floor(mode: Any) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    class Watch(Witness):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            selection: Any = self.trainer.callbacks[0].last_selection
            kept.append((batch[1], batch[1][selection.indices]))

    train(fresh(Watch), mode=mode, class_floor=0.3, gate="topk", warmup=0, cooldown=0, max_epochs=1, count_flops=False)
    for labels, selected in kept:
        offered, trained = labels.bincount(minlength=10), selected.bincount(minlength=10)
        assert (trained >= 0.3 * offered).all()
        assert trained.sum() < offered.sum()


class Regression(SparseLossMixin, Witness):
    """No loss function is told the classes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]).mean(1) - batch[1] / 10).square().mean()


class Labelled(Regression):
    def sample_labels(self, batch: Any) -> Tensor:
        return batch[1] // 5


@pytest.mark.parametrize("mode", ["partial", "prune"])
def test_classes_from_the_mixin(mode: Any) -> None:
    with pytest.raises(ConfigurationError, match="sample_labels"):
        train(fresh(Regression), mode=mode, class_floor=0.2)
    _, callback = train(fresh(Labelled), mode=mode, class_floor=0.2)
    assert callback.ledger.activation_rate is not None


RULES: dict[str, Any] = {"always": [5, 6], "never": [8, 9], "class_floor": 0.2, "keep_scores": 2}


@pytest.mark.parametrize("point", [("epoch end", 0, None), ("batch end", 1, 1), ("epoch end", 1, None)], ids=str)
def test_a_resumed_run_keeps_to_the_same_rules(tmp_path: Path, point: Any) -> None:
    path = tmp_path / "run.ckpt"
    straight, callback = train(None, SaveAt(path, *point), data=loader(shuffle=True), **RULES)
    again, resumed = train(fresh(seed=3), data=loader(shuffle=True), ckpt_path=path, **RULES)
    assert_same_weights(weights(straight), weights(again))
    one, other = callback.state_dict()["epochs"]["samples"], resumed.state_dict()["epochs"]["samples"]
    assert torch.equal(one["times"], other["times"])
    assert torch.equal(one["labels"], other["labels"])
    assert one["epochs"].keys() == other["epochs"].keys() == {1, 2}
    for epoch in one["epochs"]:
        assert torch.equal(one["epochs"][epoch], other["epochs"][epoch])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_processes(tmp_path: Path) -> None:
    class Both(Witness):
        def on_train_end(self) -> None:
            selection: Any = self.trainer.callbacks[0]
            selection.export_scores(tmp_path / "scores.csv")
            torch.save((self.batches, weights(self)), tmp_path / f"{self.global_rank}.pt")

    module, callback = fresh(Both), pruned(**RULES)
    fit(module, loader(), callback, devices=2, strategy=gloo())
    ranks = [torch.load(tmp_path / f"{rank}.pt")[0] for rank in (0, 1)]
    seen = Counter(index for batches in ranks for _, _, indices, _ in batches for index in indices)
    for epoch in (1, 2):
        indices = [i for batches in ranks for e, _, own, _ in batches if e == epoch for i in own]
        assert {5, 6} <= set(indices)
        assert not {8, 9} & set(indices)
        assert all((LABELS[indices] == kind).sum() >= 0.2 * (kind == LABELS).sum() for kind in range(10))
    rows = [line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines()]
    place = {name: column for column, name in enumerate(rows[0])}
    assert {int(r[0]): int(r[place["times_selected"]]) for r in rows[1:]} == {i: seen[i] for i in range(SIZE)}
    assert [int(r[place["label"]]) for r in rows[1:]] == LABELS.tolist()


def test_a_run_begins_with_scores() -> None:
    scores = torch.rand(SIZE, generator=torch.Generator().manual_seed(1))
    module, _ = train(initial_scores=scores, warmup=0, gate="topk")
    assert set(module.epochs()[0]) == set(scores.topk(120).indices.tolist())


def test_their_unit_does_not_matter() -> None:
    scores = torch.rand(SIZE, generator=torch.Generator().manual_seed(1))
    one, other = (train(initial_scores=s, warmup=0, gate="topk", max_epochs=3)[0] for s in (scores, 1e-3 * scores))
    assert one.epochs() == other.epochs()
    assert set(one.epochs()[1]) != set(one.epochs()[0])


def test_a_checkpoint_wins_over_them(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    scores = torch.rand(SIZE, generator=torch.Generator().manual_seed(1))
    straight, _ = train(None, SaveAt(path, "batch end", 0, 1), initial_scores=scores, warmup=0)
    again, _ = train(fresh(seed=2), initial_scores=1 - scores, warmup=0, ckpt_path=path)
    assert_same_weights(weights(straight), weights(again))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["high"] * SIZE, "a list of numbers, or a file; got list"),
        (torch.ones(5), r"as many as the data set has; got shape \(5,\)"),
        ([1.0] * (SIZE - 1), "as many as the data set has"),
        ([-1.0] * SIZE, r"at least 0, .* got 300 values that are not, such as -1 in row 0"),
        ([1.0] * 299 + [float("nan")], "such as nan in row 299"),
        ([1.0] * 299 + [float("inf")], "such as inf in row 299"),
        ("index,significance\n3,0.5\n3,0.25\n", "each index once; got index 3 several times"),
        ("index,significance\n300,0.5\n", r"in \[0, 300\); got 300"),
        ("index,significance\nx,0.5\n", "expected numbers; got 'x'"),
        ("index,significance\n1,-2\n", "such as -2 in row 0"),
        ("significance\n1\n2\n", r"got shape \(2,\)"),
        ("index,score\n1,2\n", "the column 'significance' in .*; got the columns 'index', 'score'"),
        ("", "the column 'significance' .* got the columns none"),
    ],
)
def test_scores_that_cannot_be_used(scores: Any, message: str, tmp_path: Path) -> None:
    if isinstance(scores, str):
        (tmp_path / "scores.csv").write_text(scores)
        scores = tmp_path / "scores.csv"
    with pytest.raises(ConfigurationError, match=message):
        train(initial_scores=scores, warmup=0)


def test_they_have_no_effect_in_other_modes() -> None:
    with pytest.warns(UserWarning, match="initial_scores has no effect in mode='mask'"):
        train(mode="mask", initial_scores=[1.0] * SIZE, max_epochs=2, cooldown=0)


class Ready(torch.utils.data.Dataset[Any]):
    """A data set of batches."""

    def __getitem__(self, index: int) -> Any:
        x, y, _ = zip(*(DIGITS[i] for i in range(8 * index, 8 * index + 8)))
        return torch.stack(x), torch.stack(y), torch.arange(8 * index, 8 * index + 8)

    def __len__(self) -> int:
        return 20


def test_rules_for_ready_batches(tmp_path: Path) -> None:
    data = torch.utils.data.DataLoader(Ready(), batch_size=None)
    module, callback = train(data=data, always=[3], never=[4, 5], prune_steps="follow")
    for epoch in (1, 2):
        batches = {index // 8 for index in module.epochs()[epoch]}
        assert 3 in batches
        assert not {4, 5} & batches
    times = callback.state_dict()["epochs"]["samples"]["times"]
    assert times[3] == 4, "a batch is a sample"
    assert times.max() == 4
    with pytest.raises(ConfigurationError, match="class_floor counts samples"):
        train(data=data, class_floor=0.1, prune_steps="follow")


class Halves(torch.utils.data.Sampler[list[int]]):
    """Batches of even and of odd indices."""

    def __iter__(self) -> Any:
        for start in range(0, SIZE, 60):
            yield list(range(start, start + 60, 2))
            yield list(range(start + 1, start + 60, 2))

    def __len__(self) -> int:
        return 10


def test_rules_for_a_batch_sampler() -> None:
    data = torch.utils.data.DataLoader(Indexed(), batch_sampler=Halves())
    module, _ = train(data=data, **RULES)
    for epoch in (1, 2):
        kept = set(module.epochs()[epoch])
        assert {5, 6} <= kept
        assert not {8, 9} & kept
        assert min(shares(module, epoch).values()) >= 0.2
    with pytest.raises(ConfigurationError, match="always: 200 samples"):
        train(data=data, always=torch.arange(200))


def test_an_unknown_argument_is_named_with_the_callback() -> None:
    with pytest.raises(TypeError, match="SparseSelectionCallback got an unexpected keyword argument 'class_flor'"):
        SparseSelectionCallback(class_flor=0.1)  # type: ignore[call-arg]
