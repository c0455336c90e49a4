"""What a SparseLossMixin overrides: losses, significance, slicing and counting of the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast import SparseLossMixin, SparseSelectionCallback
from lightning_ast.errors import LossCaptureError
from tests.helpers.data import Digits, loader
from tests.helpers.modules import ExplicitNet, PlainNet, Trained, fresh
from tests.helpers.training import BATCH_MODES, assert_close_weights, fit, half, weights


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_explicit_losses_train_as_captured_ones(digits: Digits, mode: str, weighting: str) -> None:
    captured, explicit = fresh(dropout=0.0), fresh(ExplicitNet, dropout=0.0)
    for module in (captured, explicit):
        callback = SparseSelectionCallback(target_activation_rate=0.3, mode=mode, weighting=weighting)
        fit(module, loader(digits), callback, max_steps=4)
    assert_close_weights(weights(captured), weights(explicit), rtol=1e-4)


def test_mixin_default_losses_on_an_unmodified_step(digits: Digits) -> None:
    class Net(SparseLossMixin, PlainNet):
        pass

    module = fresh(Net, dropout=0.0)
    module.log = lambda *_, **__: None
    x, y = digits[0][:8], digits[1][:8]
    torch.testing.assert_close(module.per_sample_loss((x, y), 0), F.cross_entropy(module(x), y, reduction="none"))


def test_own_significance_and_own_slicing_win(digits: Digits) -> None:
    calls: list[str] = []

    class Net(SparseLossMixin, PlainNet):
        def significance(self, losses: Tensor, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
            assert inputs.shape == (64, 1, 8, 8)
            assert logits.shape == (64, 10)
            return torch.arange(64.0)  # the last ones matter most

        def select_batch(self, batch: Any, indices: Tensor) -> Any:
            calls.append(str(indices.tolist()))
            return super().select_batch(batch, indices)

    module = fresh(Net)
    fit(module, loader(digits), half(target_activation_rate=0.25, significance="gradient"), max_steps=2)
    assert calls.count(str(list(range(48, 64)))) == 2, "the other calls follow a sample through the first batch"


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_losses_by_hand_are_scored_where_the_step_uses_them(digits: Digits, mode: str) -> None:
    class Absolute(SparseLossMixin, PlainNet):
        def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return (self(batch[0]).sum(1) - batch[1]).abs()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.per_sample_loss(batch, batch_idx).mean()

    module, reference = (fresh(Absolute, dropout=0.0, batchnorm=False) for _ in range(2))
    callback = half(mode=mode)
    fit(module, loader(digits), callback, max_steps=1)
    losses = reference.per_sample_loss((digits[0][:64], digits[1][:64]), 0)
    assert callback.last_selection.indices.tolist() == losses.topk(32).indices.sort().values.tolist()
    losses.topk(32).values.mean().backward()
    reference.configure_optimizers().step()
    assert_close_weights(weights(module), weights(reference))
    assert "per_sample_loss" not in vars(module)


def test_losses_of_another_shape_are_refused(digits: Digits) -> None:
    class Net(SparseLossMixin, PlainNet):
        def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return (self(batch[0]) - 1).square()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.per_sample_loss(batch, batch_idx).mean()

    with pytest.raises(LossCaptureError, match=r"shape \(64,\), got shape \(64, 10\)"):
        fit(fresh(Net), loader(digits), half(), max_steps=1)


class TimeMajor(SparseLossMixin, Trained):
    """Sequences as (T, B): everything about the batch is overridden."""

    lr = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def count_samples(self, batch: Tensor) -> int:
        return batch.shape[1]

    def select_batch(self, batch: Tensor, indices: Tensor) -> Tensor:
        return batch[:, indices]

    def per_sample_loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        scores = self.head(self.embed(batch[:-1]))
        return F.cross_entropy(scores.permute(1, 2, 0), batch[1:].t(), reduction="none").mean(1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch, batch_idx).mean()


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_a_time_major_batch_by_overrides(mode: str) -> None:
    tokens = torch.randint(0, 7, (12, 5), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(tokens, batch_size=12, collate_fn=lambda rows: torch.stack(rows, 1))
    module, reference = TimeMajor(), TimeMajor()
    callback = half(mode=mode)
    fit(module, data, callback, max_steps=1)
    assert (callback.ledger.offered, callback.ledger.selected) == (12, 6)
    losses = reference.per_sample_loss(tokens.t(), 0)
    losses.topk(6).values.mean().backward()
    torch.optim.SGD(reference.parameters(), lr=1.0).step()
    assert_close_weights(weights(module), weights(reference))


def test_packed_sequences_by_overrides() -> None:
    from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

    class Packed(SparseLossMixin, Trained):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4), nn.Linear(4, 1)

        def count_samples(self, batch: Any) -> int:
            return len(batch[1])

        def select_batch(self, batch: Any, indices: Tensor) -> Any:
            padded, lengths = pad_packed_sequence(batch[0])
            rows = [padded[: lengths[i], i] for i in indices]
            return pack_sequence(rows, enforce_sorted=False), batch[1][indices]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.head(self.rnn(batch[0])[1][0]).squeeze(1), batch[1])

    rows = [(torch.randn(n, 3), torch.tensor(float(n))) for n in (2, 5, 3, 4)]
    data = torch.utils.data.DataLoader(
        rows,
        batch_size=4,
        collate_fn=lambda r: (pack_sequence([a for a, _ in r], enforce_sorted=False), torch.stack([b for _, b in r])),
    )
    callback = half()
    with pytest.warns(UserWarning, match="is taken from the sizes of tensors: a PackedSequence has no batch dimension"):
        fit(Packed(), data, callback, max_steps=1)
    assert callback.ledger.selected == 2


def test_the_mixin_says_when_the_losses_are_missing(digits: Digits) -> None:
    class Net(SparseLossMixin, PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.per_sample_loss(batch, batch_idx).mean()

    with pytest.raises(LossCaptureError, match="which the module does not define"):
        fit(fresh(Net), loader(digits), SparseSelectionCallback(), max_steps=1)
