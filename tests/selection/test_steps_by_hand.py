"""A real Trainer, real images, and the same steps written out by hand."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast import PIController, SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.logs import warned
from tests.helpers.modules import Lbfgs, Manual, PlainNet, Trained, fresh
from tests.helpers.training import BATCH_MODES, assert_close_weights, assert_same_weights, fit, half, weights


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_one_step_equals_the_step_by_hand(digits: Digits, kind: str, mode: str) -> None:
    module, reference = fresh(dropout=0.0, batchnorm=False), fresh(dropout=0.0, batchnorm=False)
    fit(module, loader(digits, kind=kind), half(mode=mode), max_steps=3)

    optimizer = reference.configure_optimizers()
    for step in range(3):
        x, y = (part[64 * step : 64 * (step + 1)] for part in digits)
        losses = F.cross_entropy(reference(x), y, reduction="none")
        kept = losses.topk(32).indices.sort().values
        optimizer.zero_grad()
        losses[kept].mean().backward()
        optimizer.step()
    assert_close_weights(weights(module), weights(reference))
    assert module.seen == ([64, 32] * 3 if mode == "subset" else [64] * 3), "subset scores the whole batch first"


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_soft_gate_gradient_equals_the_weighted_sum_by_hand(digits: Digits, mode: str, weighting: str) -> None:
    module, reference = fresh(dropout=0.0, batchnorm=False), fresh(dropout=0.0, batchnorm=False)
    callback = SparseSelectionCallback(target_activation_rate=0.3, mode=mode, weighting=weighting)
    gradients = []

    class Spy(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gradients.append([p.grad.clone() for p in pl_module.parameters()])

    fit(module, loader(digits), callback, Spy(), max_steps=1)
    kept, w = callback.last_selection.indices, callback.last_selection.weights
    x, y = digits[0][:64], digits[1][:64]
    losses = F.cross_entropy(reference(x), y, reduction="none")
    if weighting == "none":
        assert w is None
        loss = losses[kept].sum() / len(kept)
    elif weighting == "sqrt":
        loss = (w * losses[kept]).sum() / w.sum()
    else:
        loss = (w * losses[kept]).sum() / 64
    expected = torch.autograd.grad(loss, list(reference.parameters()))
    for got, want in zip(gradients[0], expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_cooldown_is_bitwise_the_plain_run_from_there(digits: Digits) -> None:
    """The last epoch of a sparse run equals a plain epoch that starts from the same weights, momenta and order."""
    start: dict[str, Any] = {}

    class Remember(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                momenta = [s["momentum_buffer"].clone() for s in trainer.optimizers[0].state.values()]
                start.update(weights=weights(pl_module), momenta=momenta)

    sparse = fresh(dropout=0.0)
    callback = SparseSelectionCallback()
    fit(
        sparse,
        loader(digits),
        callback,
        TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1),
        Remember(),
        max_epochs=3,
    )
    assert callback.stage == "cooldown"
    plain = fresh(dropout=0.0)
    plain.load_state_dict(start["weights"])
    optimizer = plain.configure_optimizers()
    for parameter, momentum in zip(plain.parameters(), start["momenta"]):
        optimizer.state[parameter]["momentum_buffer"] = momentum
    plain.train()
    for x, y in loader(digits):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert_same_weights(weights(plain), weights(sparse))


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_the_reported_loss_is_the_users_own(digits: Digits, mode: str) -> None:
    """That of the whole batch, in ``subset`` of what the step saw: the selected samples."""
    module, reference = fresh(dropout=0.0), fresh(dropout=0.0)
    reported = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            reported.append(trainer.callback_metrics["train_loss"].item())

    callback = half(mode=mode)
    fit(module, loader(digits), callback, Spy(), max_steps=1, log_every_n_steps=1)
    seen = callback.last_selection.indices if mode == "subset" else torch.arange(64)
    assert reported[0] == pytest.approx(F.cross_entropy(reference(digits[0][seen]), digits[1][seen]).item(), rel=1e-5)


def test_lbfgs_sees_one_selection_a_batch(digits: Digits) -> None:
    for mode in ("mask", "subset", "partial"):
        module, callback = fresh(Lbfgs, dropout=0.0, batchnorm=False), SparseSelectionCallback(mode=mode, seed=1)
        fit(module, loader(digits), callback, max_steps=2)
        assert len(module.seen) > 4, "the optimizer evaluated the step several times a batch"
        assert len(set(module.seen) - {64}) in ((1, 2) if mode == "subset" else (0,)), "one size a batch"


def test_manual_optimization(digits: Digits) -> None:
    options = {"dropout": 0.0, "batchnorm": False}
    manual, automatic = fresh(Manual, **options), fresh(**options)
    callbacks = [half(mode="mask"), half(mode="mask")]
    fit(manual, loader(digits), callbacks[0], max_steps=3)
    fit(automatic, loader(digits), callbacks[1], max_steps=3)
    assert_same_weights(weights(manual), weights(automatic))
    conv, linear = 2 * 9 * 8 * 64, 2 * 8 * 64 * 10  # a multiply-add is 2; no gradient for the images
    assert vars(callbacks[0].ledger.flops) == {"forward": conv + linear, "backward": conv + 2 * linear}
    assert callbacks[0].ledger.flops == callbacks[1].ledger.flops, "a backward inside the step is counted apart"
    manual, automatic = fresh(Manual, **options), fresh(**options)
    for module in (manual, automatic):
        fit(module, loader(digits), half(mode="subset"), max_steps=3)
    assert_same_weights(weights(manual), weights(automatic))


def test_accumulation_and_bf16_and_a_ragged_last_batch(digits: Digits) -> None:
    module, callback = fresh(), SparseSelectionCallback(target_activation_rate=0.5)
    data = loader((digits[0][:300], digits[1][:300]))  # 64, 64, 64, 64, 44
    fit(module, data, callback, accumulate_grad_batches=2, precision="bf16-mixed", gradient_clip_val=1.0)
    assert callback.ledger.offered == 300
    assert callback.ledger.selected == pytest.approx(150, abs=6)
    assert all(torch.isfinite(t).all() for t in weights(module).values())


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_a_compiled_network_inside_the_module(digits: Digits, mode: str) -> None:
    plain, compiled = fresh(dropout=0.0), fresh(dropout=0.0)
    compiled.net = torch.compile(compiled.net, backend="aot_eager")
    callbacks = [half(mode=mode, **({"batchnorm": "exact"} if mode == "partial" else {})) for _ in range(2)]
    with warned() as said:
        fit(plain, loader(digits), callbacks[0], max_steps=3)
        fit(compiled, loader(digits), callbacks[1], max_steps=3)
    told = [text for text in said if "torch.compile" in text]
    assert len(told) == (2 if mode == "partial" else 0), "before the first batch, and after the first sparse one"
    of_compiled = dict(zip(weights(plain), weights(compiled).values(), strict=True))  # its names begin with _orig_mod
    assert_close_weights(of_compiled, weights(plain), rtol=1e-4)
    assert callbacks[1].savings["flops"] is None, "not counted, so unknown"
    assert callbacks[0].savings["flops"] is not None


def test_a_second_fit_starts_its_books_anew(digits: Digits) -> None:
    callback = SparseSelectionCallback(controller=PIController())
    for _ in range(2):
        fit(fresh(), loader(digits), callback, max_steps=4)
        assert callback.ledger.offered == 4 * 64
        assert callback.ledger.stages["sparse"].steps == 4


def test_a_target_below_the_minimum_is_said(digits: Digits) -> None:
    with pytest.warns(UserWarning, match="min_selected keeps 2 of 8 samples"):
        fit(fresh(), loader(digits, batch_size=8), SparseSelectionCallback(target_activation_rate=0.06), max_steps=2)


def test_frozen_layers_and_aux_terms(digits: Digits) -> None:
    """An additive penalty stays whole; the data term alone is selected."""

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            penalty = sum((p**2).sum() for p in self.parameters())
            return {"loss": 0.5 * F.cross_entropy(self(batch[0]), batch[1]) + 0.01 * penalty}

    module, reference = fresh(Net, dropout=0.0, batchnorm=False), fresh(Net, dropout=0.0, batchnorm=False)
    fit(module, loader(digits), half(mode="mask"), max_steps=1)
    optimizer = reference.configure_optimizers()
    losses = F.cross_entropy(reference(digits[0][:64]), digits[1][:64], reduction="none")
    penalty = sum((p**2).sum() for p in reference.parameters())
    (0.5 * losses.topk(32).values.mean() + 0.01 * penalty).backward()
    optimizer.step()
    assert_close_weights(weights(module), weights(reference))


def test_tokens_with_ignored_ones_end_to_end() -> None:
    """A token model: the selected rows weigh by samples; the step of ``subset`` divides by its own valid tokens."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 7, (32, 5)), torch.randint(0, 7, (32, 5))
    labels[torch.rand(32, 5) < 0.3] = -100

    class Tokens(Trained):
        lr = 1.0

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.head(self.embed(batch["tokens"]))
            return F.cross_entropy(scores.view(-1, 7), batch["labels"].view(-1))

    data = torch.utils.data.DataLoader([{"tokens": t, "labels": y} for t, y in zip(tokens, labels)], batch_size=32)
    for mode in ("mask", "subset", "partial"):
        module, reference = Tokens(), Tokens()
        fit(module, data, half(mode=mode), max_steps=1)
        scores = reference.head(reference.embed(tokens))
        sums = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none").sum(1)
        counts = (labels != -100).sum(1)
        kept = sums.topk(16).indices  # what each adds to the loss
        valid = counts[kept].sum() if mode == "subset" else counts.sum() / 2
        (sums[kept].sum() / valid).backward()
        torch.optim.SGD(reference.parameters(), lr=1.0).step()
        assert_close_weights(weights(module), weights(reference))


@pytest.mark.parametrize("signature", ["batch", "args", "kwargs"])
def test_signatures_of_training_step(digits: Digits, signature: str) -> None:
    class OnlyBatch(PlainNet):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch, 0)

    class Args(PlainNet):
        def training_step(self, *args: Any) -> Tensor:
            assert len(args) == 2
            return super().training_step(*args)

    class Kwargs(PlainNet):
        def training_step(self, batch: Any, **kwargs: Any) -> Tensor:
            return super().training_step(batch, 0)

    module = fresh({"batch": OnlyBatch, "args": Args, "kwargs": Kwargs}[signature])
    fit(module, loader(digits), half(), max_steps=2)
    assert module.seen == [64, 32] * 2
