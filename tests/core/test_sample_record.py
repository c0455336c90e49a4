"""How often a sample was trained on, where it was very often, and several times in a batch."""

from __future__ import annotations

import torch

from lightning_ast.core.sample_record import SampleRecord


def test_samples_are_counted_as_often_as_they_stand_in_batches() -> None:
    record = SampleRecord(4)
    for indices in ([0, 1, 1], [3], [1, 0, 3]):
        record.count(torch.tensor(indices), epoch=0)
    assert record.state_dict()["times"].tolist() == [2, 3, 0, 2]


def test_a_count_stays_at_the_largest_that_it_can_hold() -> None:
    record = SampleRecord(2)
    most = torch.iinfo(torch.int16).max
    record.load_state_dict(record.state_dict() | {"times": torch.tensor([most - 1, 5])})
    for _ in range(3):
        record.count(torch.tensor([0, 1, 0]), epoch=0)
    assert record.state_dict()["times"].tolist() == [most, 8]
    assert record.state_dict(total=lambda times: 2 * times)["times"].tolist() == [most, 16]
