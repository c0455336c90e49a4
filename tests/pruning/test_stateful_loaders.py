"""Loaders that save their own position: ``prune`` keeps the place, and asks them for nothing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ast import SparseSelectionCallback
from lightning_ast.errors import ConfigurationError
from tests.helpers.training import SaveAt, assert_same_weights, quiet_trainer, weights
from tests.pruning.own_batch_samplers import MADE
from tests.pruning.prune_by_hand import SIZE, Cycle, Indexed, epochs_by_hand, fit, fresh, loader, pruned

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

POINTS = [("epoch end", 1, None), ("batch end", 0, 4), ("batch end", 2, 1), ("batch end", 3, 5)]


def stateful(**options: Any) -> Any:
    dataset = options.pop("dataset", None) or Indexed()
    return StatefulDataLoader(dataset, **{"batch_size": 32, **options})


def test_what_reaches_the_model_is_the_plan() -> None:
    module = fresh()
    fit(module, stateful(), pruned())
    assert module.epochs() == epochs_by_hand(module)


@pytest.mark.parametrize("workers", [0, 2])
def test_dense_epochs_are_bitwise_the_plain_run(workers: int) -> None:
    runs = []
    for callbacks in ([], [pruned(target_activation_rate=1.0)]):
        module = fresh(Cycle)
        torch.manual_seed(5)
        data = stateful(shuffle=True, num_workers=workers, dataset=Indexed(noise=0.1))
        quiet_trainer(callbacks=callbacks, max_epochs=2).fit(module, data)
        runs.append((module, torch.rand(2)))
    assert runs[0][0].batches == runs[1][0].batches
    assert torch.equal(runs[0][1], runs[1][1])
    assert_same_weights(*(weights(module) for module, _ in runs))


MAKE = {
    "shuffled": lambda **options: stateful(shuffle=True, **options),
    "own batch sampler": lambda **options: stateful(batch_sampler=MADE["grouped"](), batch_size=1, **options),
}


@pytest.mark.parametrize(("make", "workers"), [("shuffled", 0), ("shuffled", 2), ("own batch sampler", 0)], ids=str)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Any, make: str, workers: int) -> None:
    def run(*saves: pl.Callback, seed: int, ckpt_path: Any = None) -> tuple[Any, Any]:
        module = fresh(Cycle, seed=seed, batchnorm=False)
        torch.manual_seed(seed + 100)
        data = MAKE[make](num_workers=workers, dataset=Indexed(noise=0.0 if workers else 0.1))
        fit(module, data, pruned(), *saves, ckpt_path=ckpt_path)
        assert data._iterator is None, "the user's loader has never run"
        return module, torch.rand(1)

    points = [POINTS[2]] if workers else POINTS
    straight, after = run(*(SaveAt(tmp_path / f"{p[:2]}", *p) for p in points), seed=0)
    for point in points:
        path = tmp_path / f"{point[:2]}"
        assert "combined_loader" not in torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]
        again, our_after = run(seed=7, ckpt_path=path)
        assert 0 < len(again.batches) < len(straight.batches)
        assert [b[:3] for b in again.batches] == [b[:3] for b in straight.batches[-len(again.batches) :]], point
        assert_same_weights(weights(straight), weights(again))
        assert torch.equal(after, our_after)


def test_a_position_that_another_mode_has_saved_is_passed_over(tmp_path: Any) -> None:
    path = tmp_path / "run.ckpt"
    others = [SparseSelectionCallback(mode="mask", target_activation_rate=0.5), SaveAt(path, "epoch end", 0)]
    quiet_trainer(callbacks=others, max_epochs=2).fit(fresh(), stateful(shuffle=True))
    module, data = fresh(), stateful(shuffle=True)
    fit(module, data, pruned(), ckpt_path=path)
    assert [len(indices) for indices in module.epochs().values()] == [120, 120, SIZE]
    assert len(list(data)) == 10, "the user's loader begins at its first batch"


def test_after_the_fit_the_loader_saves_its_position_again(tmp_path: Any) -> None:
    path, data = tmp_path / "run.ckpt", stateful(shuffle=True)
    callback = pruned()
    trainer = fit(fresh(), data, callback, max_epochs=3)
    trainer.callbacks[:] = [SaveAt(path, "batch end", 3, 4)]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(fresh(), data)
    (state,) = torch.load(path, weights_only=False)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert state["_num_yielded"] in (5, 6)


def test_a_dataset_with_a_state_of_its_own_is_refused() -> None:
    class Counting(Indexed):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    with pytest.raises(ConfigurationError, match="saves the state of the dataset with its own"):
        fit(fresh(), stateful(dataset=Counting()), pruned())
    fit(fresh(), loader(dataset=Counting()), pruned())


def test_it_may_validate_too() -> None:
    val = StatefulDataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=150)
    module = fresh()
    fit(module, stateful(), pruned(), val=val)
    assert module.epochs() == epochs_by_hand(module)
