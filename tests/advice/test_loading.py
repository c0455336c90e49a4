"""The loader's period on a clock that the data set moves, and the batches that are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ast.advice.loading import CachedBatches, read, steady_period
from lightning_ast.core.batch.samples import batch_size_of
from lightning_ast.errors import AdviceError
from lightning_ast.lightning_internals.leading import make_iterator
from tests.advice.clock import Clock


class Slow(Dataset[Tensor]):
    """Real digits, each of which takes its time."""

    def __init__(self, images: Tensor, clock: Clock, seconds: float) -> None:
        self.images, self.clock, self.seconds = images, clock, seconds

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.clock.now += self.seconds
        return self.images[index]


def facts(combined: CombinedLoader, clock: Clock, seconds: float = 100.0) -> Any:
    return read(combined, seconds=seconds, clock=clock, count=batch_size_of)


def test_the_period_without_workers(digits: tuple[Tensor, Tensor]) -> None:
    clock = Clock()
    loading, kept = facts(CombinedLoader(DataLoader(Slow(digits[0], clock, 0.01), batch_size=32)), clock)
    assert loading.seconds_per_batch == pytest.approx(0.32)
    assert loading.start_seconds == pytest.approx(0.0)
    assert (loading.workers, loading.restarts, loading.batches) == (0, False, 16)
    assert len(kept) == 8
    assert all(torch.equal(batch, digits[0][32 * i : 32 * i + 32]) for i, batch in enumerate(kept))


def test_it_stops_when_it_is_late_or_has_enough(digits: tuple[Tensor, Tensor]) -> None:
    clock = Clock()
    loading, kept = facts(CombinedLoader(DataLoader(Slow(digits[0], clock, 1.0), batch_size=32)), clock, seconds=70)
    assert (loading.batches, len(kept)) == (3, 3), "32 s each, 96 s are more than 70"
    loading, _ = facts(CombinedLoader(DataLoader(Slow(digits[0], clock, 9.0), batch_size=32)), clock, seconds=1)
    assert (loading.batches, loading.seconds_per_batch) == (2, pytest.approx(288)), "two in any case"
    loading, _ = facts(CombinedLoader(DataLoader(Slow(digits[0], clock, 0.01), batch_size=4)), clock)
    assert loading.batches == 24


def test_a_short_last_batch_and_too_large_ones_are_not_kept(
    digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    _, kept = facts(CombinedLoader(DataLoader(Slow(digits[0][:70], clock, 0.01), batch_size=32)), clock)
    assert [len(batch) for batch in kept] == [32, 32]
    monkeypatch.setattr("lightning_ast.advice.loading.MOST_BYTES", 3 * 32 * 64 * 4)
    _, kept = facts(CombinedLoader(DataLoader(Slow(digits[0], clock, 0.01), batch_size=32)), clock)
    assert len(kept) == 3
    monkeypatch.setattr("lightning_ast.advice.loading.MOST_BYTES", 1)
    assert len(facts(CombinedLoader(DataLoader(Slow(digits[0], clock, 0.01), batch_size=32)), clock)[1]) == 1


def test_real_workers_are_counted_and_stopped(digits: tuple[Tensor, Tensor]) -> None:
    loader = DataLoader(digits[0], batch_size=32, num_workers=2, persistent_workers=True)  # type: ignore[arg-type]
    combined = CombinedLoader(loader)
    clock = Clock(tick=0.5)  # the workers' own work moves no clock of ours
    loading, kept = facts(combined, clock)
    assert (loading.workers, loading.restarts, loading.batches) == (2, False, 16)
    assert loading.seconds_per_batch == pytest.approx(0.5)
    assert loader._iterator is None
    assert combined._iterator is None
    assert torch.equal(kept[1], digits[0][32:64])
    assert facts(CombinedLoader(DataLoader(digits[0], 64, num_workers=1)), clock)[0].restarts  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arrivals", "workers", "ahead", "period"),
    [
        ([0.0, 7.0], 0, 0, 7.0),
        ([0.0, 9.0, 10.0, 11.0], 0, 0, 1.0),
        ([0.0, 5.0, 5.0, 5.0, 9.0, 9.0, 9.0, 13.0, 13.0, 13.0], 3, 0, 4 / 3),
        ([0.0, 5.0, 5.0, 5.1, 5.1, 9.0, 9.0, 13.0, 13.0], 2, 4, 2.0),  # the first four were fetched ahead
        ([0.0, 5.0, 5.0, 9.0], 4, 8, 2.0),  # fewer than a burst: all there is
    ],
)
def test_workers_deliver_in_bursts(arrivals: list[float], workers: int, ahead: int, period: float) -> None:
    assert steady_period(arrivals, workers, ahead) == pytest.approx(period)


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(AdviceError, match="gives no batch"):
        facts(CombinedLoader(DataLoader([])), Clock())  # type: ignore[arg-type]


def test_kept_batches_come_as_copies_whose_making_is_known(digits: tuple[Tensor, Tensor]) -> None:
    kept = [{"x": digits[0][:4].clone()}, {"x": digits[0][4:8].clone()}]
    clock = Clock(tick=0.5)
    batches = CachedBatches(kept, clock=clock, copies=True)
    stream = iter(batches)
    first = next(stream)["x"].zero_()
    assert batches.seconds == 0.5
    assert torch.equal(next(stream)["x"], digits[0][4:8])
    assert torch.equal(next(stream)["x"], digits[0][:4]), "changed in place, and yet the same again"
    assert not first.any()
    batches.position = 3
    assert torch.equal(next(stream)["x"], digits[0][4:8])
    uncopied = iter(CachedBatches(kept, clock=clock, copies=False))
    assert next(uncopied)["x"] is kept[0]["x"]


def test_lightning_is_told_the_length_of_the_given_loader(digits: tuple[Tensor, Tensor]) -> None:
    given = CombinedLoader({"a": DataLoader(digits[0], 64), "b": DataLoader(digits[0], 100)}, "max_size")  # type: ignore[arg-type]
    given.limits = [5, 1.0]
    make_iterator(given)
    assert len(given) == 5
    assert given.flattened[0]._iterator is None
