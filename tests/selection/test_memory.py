"""What the callback does not need it lets go of: no tensor outlives its batch."""

from __future__ import annotations

import gc
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, quiet_trainer
from tests.selection.plain_and_ours import BATCH, data, only_new_objects, ours, seed


class Watched(PlainNet):
    """Follows the memory of what each training step is given and makes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps = 0
        self.made: list[tuple[int, str, StorageWeakRef]] = []
        self.net[0].register_forward_hook(lambda module, inputs, output: self.watch(hidden=output))

    def watch(self, **tensors: Tensor) -> None:
        self.made += [(self.steps, name, StorageWeakRef(t.untyped_storage())) for name, t in tensors.items()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        scores = self(x)
        self.watch(x=x, y=y, scores=scores)
        loss = F.cross_entropy(scores, y)
        self.watch(loss=loss)
        self.log("train_loss", loss)
        return loss


class Alive(pl.Callback):
    """At the end of each batch: ``(age in steps, name)`` of the tensors that still have their memory."""

    def __init__(self) -> None:
        self.seen: list[set[tuple[int, str]]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        module.watch(loaded=module.unpack(batch)[0])

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        gc.collect()
        module.made = [(step, name, ref) for step, name, ref in module.made if not ref.expired()]
        self.seen.append({(module.steps - step, name) for step, name, _ in module.made})
        module.steps += 1


class Hoarder(pl.Callback):
    """The fault that these tests are there to find."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kept.append(batch[0])


def run_watched(callbacks: list[Any], few: Digits, *, epochs: int = 2) -> None:
    seed()
    with only_new_objects():
        quiet_trainer(callbacks=callbacks, max_epochs=epochs).fit(fresh(Watched), data(few))


@pytest.mark.parametrize(("spoiled", "place"), [(False, "before"), (False, "after"), (True, "after")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
def test_nothing_of_a_batch_outlives_the_next(few: Digits, mode: str, spoiled: bool, place: str) -> None:
    x = few[0].clone()
    if spoiled:
        x[[3, 2 * BATCH + 5, 3 * BATCH], 0, 2, 2] = torch.nan
    plain, alive = Alive(), Alive()
    run_watched([plain], (x, few[1]))
    callbacks = ours(mode, quarantine_limit=1.0)
    run_watched([alive, *callbacks] if place == "before" else [*callbacks, alive], (x, few[1]))

    assert len(alive.seen) == (16 if mode != "prune" else 8 + 4)
    assert any(plain.seen), "the plain run holds its batch: the instrument sees something"
    for step, tensors in enumerate(alive.seen):
        assert not [name for age, name in tensors if age > 0], f"step {step} still holds {tensors}"
        if place == "after":
            assert tensors <= plain.seen[0], f"at the end of step {step}, more than plain Lightning holds"
    assert callbacks[0].ledger.selected < callbacks[0].ledger.offered
    assert bool(callbacks[0].quarantined) == spoiled


def test_the_instrument_finds_what_is_kept(few: Digits) -> None:
    alive = Alive()
    run_watched([Hoarder(), alive], few)
    assert {(15, "x"), (15, "loaded")} <= alive.seen[-1]


class Census(pl.Callback):
    """The most tensors and bytes that were alive at the end of a batch, by epoch; those of the start are not counted."""

    def __init__(self) -> None:
        self.count: dict[int, int] = defaultdict(int)
        self.bytes: dict[int, int] = defaultdict(int)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        gc.collect()
        found = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        size = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        epoch = trainer.current_epoch
        self.count[epoch] = max(self.count[epoch], len(found))
        self.bytes[epoch] = max(self.bytes[epoch], sum(size.values()))


@pytest.mark.parametrize("mode", ["plain", "hoarder", *MODES])
def test_live_tensors_do_not_grow(few: Digits, mode: str) -> None:
    """Five dense epochs, then five sparse ones: 80 steps (60 in ``prune``), no more tensors in the last than in the
    second of each, where the moments of the optimizer and the books are there.
    """
    census = Census()
    before = {"plain": [], "hoarder": [Hoarder()]}.get(mode) or (ours(mode, warmup=5) if mode in MODES else [])
    seed()
    with only_new_objects():
        trainer = quiet_trainer(callbacks=[*before, census], max_epochs=10, log_every_n_steps=1)
        trainer.fit(fresh(), data(few))
    grown = [census.count[last] - census.count[first] for first, last in ((1, 4), (6, 9))]
    more = [census.bytes[last] - census.bytes[first] for first, last in ((1, 4), (6, 9))]
    if mode == "hoarder":
        assert min(grown) >= 3 * 8
        assert min(more) >= 3 * 8 * BATCH * 64 * 4
    else:
        assert max(grown) <= 0
        assert max(more) <= 12 * BATCH, "positions and weights of the last selection, whose size varies"
