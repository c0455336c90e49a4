"""Wrong set-ups: each is refused with what is wrong and what to do, before the first batch or at it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ast import PIController, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import BatchError, LossCaptureError
from lightning_ast.errors import ConfigurationError, EntryError
from tests.helpers.data import Digits, loader
from tests.helpers.modules import Lbfgs, Manual, PlainNet, fresh
from tests.helpers.training import quiet_trainer


class Iterates(PlainNet):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        raise AssertionError


class NoBatch(PlainNet):
    def training_step(self) -> Tensor:
        raise AssertionError


def step(function: Callable[[PlainNet, Any], Any]) -> type[PlainNet]:
    """A module with this training step."""

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch_idx)
            return function(self, batch)

    return Net


def explicit(
    function: Callable[[PlainNet, Any], Any], reduce: Callable[[Tensor], Tensor] = Tensor.mean
) -> type[PlainNet]:
    """A module with these per-sample losses."""

    class Net(SparseLossMixin, PlainNet):
        def per_sample_loss(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch_idx)
            return function(self, batch)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return reduce(self.per_sample_loss(batch, batch_idx))

    return Net


class HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return scores.square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors
        return gradient * 2 * scores / scores.numel()


def one_hot(batch: Any) -> Tensor:
    return F.one_hot(batch[1], 10).float()


def unused(module: PlainNet, batch: Any) -> Tensor:
    F.cross_entropy(module(batch[0]), batch[1])
    return module(batch[0]).square().mean()


def opaque(module: PlainNet, batch: Any) -> Tensor:
    return F.mse_loss(torch.zeros(3, requires_grad=True), torch.ones(3))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.rand(1, 8, 8), torch.tensor(0)


class Remembering(TensorDataset):
    """Keeps a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def dataset(digits: Digits) -> TensorDataset:
    return TensorDataset(*digits)


def dropping(rows: list[Any]) -> Any:
    rows = rows[:-1]
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


@dataclass(frozen=True)
class Case:
    """A wrong set-up.

    Attributes:
        name: of the fault.
        says: regular expression of what the message must hold.
        settings: of the selection callback, beside mode="mask".
        schedule: of the stages, or None.
        module: to be trained.
        data: from the digits to the training data.
        trainer: options.
        error: its type.
        batches: that the module has seen when it is raised.
    """

    name: str
    says: str
    settings: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None
    module: type[PlainNet] = PlainNet
    data: Callable[[Digits], Any] = loader
    trainer: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = ConfigurationError
    batches: int = 0


def setting(says: str, **settings: Any) -> Case:
    (name, value), *_ = settings.items()
    return Case(f"{name}={value!r}"[:60], says, settings)


def schedule(says: str, trainer: dict[str, Any] | None = None, **options: Any) -> Case:
    return Case(f"schedule {options} {trainer or ''}", says, schedule=options, trainer=trainer or {})


def first_batch(name: str, says: str, module: type[PlainNet], seen: int = 1, **options: Any) -> Case:
    return Case(name, says, module=module, error=options.pop("error", LossCaptureError), batches=seen, **options)


def prune(name: str, says: str, data: Callable[[Digits], Any], **options: Any) -> Case:
    settings = {"mode": "prune", **options.pop("settings", {})}
    return Case(f"prune: {name}", says, settings, options.pop("schedule", {"warmup_epochs": 1}), data=data, **options)


RATE = r"target_activation_rate: expected a rate in \(0, 1\], got "
LOSS = {"significance": "loss"}
LONGER = {"max_epochs": 3}

CASES = [
    setting(RATE + "0", target_activation_rate=0),
    setting(RATE + "1.5", target_activation_rate=1.5),
    setting(RATE + "-0.1", target_activation_rate=-0.1),
    setting(RATE + "nan", target_activation_rate=float("nan")),
    setting(RATE + "'0.4'", target_activation_rate="0.4"),
    setting(RATE + "True", target_activation_rate=True),
    setting("mode: expected one of 'mask', 'subset', 'partial', 'prune', got 'sparse'", mode="sparse"),
    setting("gate: expected one of 'soft', 'threshold', 'topk', got 'hard'", gate="hard"),
    setting("significance: expected one of 'gradient', .*'el2n', .* or a callable", significance="gradients"),
    setting("significance: a callable must take .losses, logits, inputs, targets.", significance=lambda losses: losses),
    setting("weighting: expected one of 'none', 'sqrt', 'unbiased', got 'p'", weighting="p"),
    setting("weighting='sqrt' needs keep-probabilities, which gate='topk'", weighting="sqrt", gate="topk"),
    setting("min_selected: expected an int >= 1 or a share of the batch in .0, 1., got 0", min_selected=0),
    setting("min_selected: .* got 1.5", min_selected=1.5),
    setting("seed: expected an int, got 1.5", seed=1.5),
    setting("controller: expected a PIController or None, got 'pi'", controller="pi"),
    setting("batchnorm: expected one of 'selected', 'exact', got 'all'", batchnorm="all"),
    setting("quarantine_limit: expected a share .* in .0, 1. or None, got 2", quarantine_limit=2),
    setting("quarantine_limit: .* got -0.1", quarantine_limit=-0.1),
    setting("count_flops: expected True or False, got .no.", count_flops="no"),
    Case("a controller in prune", "leave controller=None", {"mode": "prune", "controller": PIController()}),
    schedule("warmup_epochs: expected an int >= 0 or a float in .0, 1., got -1", warmup_epochs=-1),
    schedule("warmup_epochs: .* got 1.5", warmup_epochs=1.5),
    schedule("leave no sparse step", {"max_epochs": 3}, warmup_epochs=0.6, cooldown_epochs=0.5),
    schedule("leave no sparse step", {"max_epochs": -1, "max_steps": 8}, warmup_epochs=2),
    schedule("cooldown_epochs: .* got True", cooldown_epochs=True),
    schedule("cooldown_epochs: .* got '1'", cooldown_epochs="1"),
    schedule(r"TwoStageScheduler\(target_activation_rate\): expected a rate", target_activation_rate=2),
    schedule("leave no sparse step in a run of 2 epochs: shorten them", {"max_epochs": 2}, warmup_epochs=5),
    schedule("leave no sparse step", {"max_epochs": 2}, warmup_epochs=1, cooldown_epochs=1),
    schedule("needs a run of known length: set Trainer", {"max_epochs": -1}, cooldown_epochs=1),
    schedule("needs a run of known length", {"max_epochs": -1}, warmup_epochs=0.5),
    Case(
        "a share of a run without length",
        "optimizer steps of the run are not known, with a dataloader without a length",
        schedule={"warmup_epochs": 0.5},
        data=lambda digits: DataLoader(Endless(), batch_size=8),
        trainer={"max_epochs": 2, "limit_train_batches": 1.0},
    ),
    Case(
        "a cooldown counted in the steps of manual optimization",
        "not known in epochs, with manual optimization and max_steps",
        schedule={"cooldown_epochs": 1},
        module=Manual,
        trainer={"max_epochs": -1, "max_steps": 30},
    ),
    Case("dataloader_iter", "fetches its own batches: take `batch`", module=Iterates),
    Case("a step without a batch", "training_step takes no batch", module=NoBatch),
    Case(
        "LBFGS under accumulation", "LBFGS .* set accumulate_grad_batches=1", module=Lbfgs,
        trainer={"accumulate_grad_batches": 2},
    ),
    # at the first batch
    first_batch(
        "by hand", "no torch loss function has a part", step(lambda m, b: (m(b[0]) - one_hot(b)).square().mean()),
        settings=LOSS,
    ),
    first_batch(
        "hidden in a function of autograd", "no torch loss function", step(lambda m, b: HiddenLoss.apply(m(b[0]))),
        settings=LOSS,
    ),
    first_batch("not used", "no torch loss function has a part in the loss", step(unused), settings=LOSS),
    first_batch(
        "deprecated reduction", "deprecated size_average/reduce", settings=LOSS,
        module=step(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduce=True)),
    ),
    first_batch(
        "not of the batch", "nothing in the graph of the loss was seen to depend on one of the 64", step(opaque),
        error=EntryError,
    ),
    first_batch(
        "a scalar as losses", r"per-sample losses, .* of shape \(64,\), got shape \(\)", settings=LOSS,
        module=explicit(lambda m, b: F.cross_entropy(m(b[0]), b[1])),
    ),
    first_batch(
        "one loss a class", r"shape \(64,\), got shape \(64, 10\)", settings=LOSS,
        module=explicit(lambda m, b: (m(b[0]) - one_hot(b)).square()),
    ),
    first_batch(
        "a score of regression", "'confidence' is defined for classification", error=ValueError,
        settings={"significance": "confidence"}, module=step(lambda m, b: F.mse_loss(m(b[0]), one_hot(b))),
    ),
    first_batch(
        "a score of the wrong shape", r"expected significance of shape \(64,\), one value a sample, got shape \(10,\)",
        PlainNet, error=ValueError, settings={"significance": lambda *_: torch.zeros(10)},
    ),
    first_batch(
        "a batch without a batch dimension", "without any. Use SparseLossMixin and override `count_samples", PlainNet, 0,
        data=lambda digits: DataLoader([1.0, 2.0], batch_size=None), error=BatchError,
    ),
    first_batch(
        "a packed sequence", "a PackedSequence has no batch dimension", PlainNet, 0, error=BatchError,
        data=lambda digits: DataLoader([pack_sequence([torch.zeros(3, 2)])], batch_size=None),
    ),
    # prune
    prune("iterable", "has to skip a sample before it is loaded", lambda d: DataLoader(Endless(), batch_size=8), trainer=LONGER),
    prune(
        "all of the ready batches", "left out: use prune_steps='follow'", trainer=LONGER,
        settings={"target_coverage": 0.9}, data=lambda d: DataLoader(dataset(d), batch_size=None),
    ),
    prune(
        "a batch sampler of samples", "a batch sampler of lists of dataset indices: list yields others", trainer=LONGER,
        data=lambda d: DataLoader(dataset(d), batch_sampler=[0, 1, 2]),
    ),
    prune(
        "two loaders", "several dataloaders needs as many batches of each", trainer=LONGER,
        data=lambda d: CombinedLoader({"a": loader(d), "b": loader(d)}, "max_size"),
    ),
    prune(
        "out of order", "needs in_order=True", trainer=LONGER,
        data=lambda d: DataLoader(dataset(d), batch_size=64, num_workers=1, in_order=False),
    ),
    prune(
        "a loader that saves the dataset's state", "saves the state of the dataset with its own", trainer=LONGER,
        data=lambda d: StatefulDataLoader(Remembering(*dataset(d).tensors), batch_size=64),
    ),
    prune("no pruned epoch", "no epoch would be pruned", loader, trainer={"max_epochs": 1}, schedule={"warmup_epochs": 0.6}),
    prune(
        "a collate function that drops samples", "batch 0 holds 63 samples where 64 were drawn", trainer=LONGER,
        data=lambda d: DataLoader(dataset(d), batch_size=64, collate_fn=dropping),
    ),
]  # fmt: skip


def name_of(case: str) -> str:
    """The case's name without addresses in memory, which differ between the processes that run the tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", case)


@pytest.mark.filterwarnings(
    "ignore:.set_vital. is deprecated", "ignore:size_average and reduce args will be deprecated"
)
@pytest.mark.parametrize("case", CASES, ids=[name_of(c.name) for c in CASES])
def test_a_wrong_set_up_says_what_to_do(digits: Digits, case: Case) -> None:
    module = fresh(case.module)
    callbacks: list[pl.Callback] = [SparseSelectionCallback(**{"mode": "mask", **case.settings})]
    if case.schedule is not None:
        callbacks.append(TwoStageScheduler(**case.schedule))
    with pytest.raises(case.error, match=rf"(?s){case.says}"):
        quiet_trainer(callbacks=callbacks, **case.trainer).fit(module, case.data(digits))
    assert len(module.seen) == case.batches
    assert "training_step" not in module.__dict__, "the module is left as it was"


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("warm", [False, True])
def test_faults_of_the_first_batch_are_found_in_the_warmup_too(digits: Digits, warm: bool) -> None:
    for case in CASES:
        if case.error is LossCaptureError:
            callbacks = [
                SparseSelectionCallback(mode="partial", **case.settings),
                TwoStageScheduler(warmup_epochs=2 if warm else 0),
            ]
            with pytest.raises(LossCaptureError, match=rf"(?s){case.says}"):
                quiet_trainer(callbacks=callbacks, max_epochs=4).fit(fresh(case.module), case.data(digits))
