"""A real Trainer, real images, and the same step written out by hand."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ast import PIController, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import RowOps
from lightning_ast.core.execution import Mode
from lightning_ast.core.gate import Selection
from lightning_ast.core.selector import SampleSelector
from lightning_ast.errors import EntryError, LossCaptureError
from tests.conftest import PlainNet, assert_same_weights, loader, quiet_trainer, weights

Digits = tuple[Tensor, Tensor]


def fit(module: pl.LightningModule, data: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, data)
    return trainer


def fresh(cls: type[PlainNet] = PlainNet, **options: Any) -> PlainNet:
    torch.manual_seed(0)
    return cls(**options)


def half(**options: Any) -> SparseSelectionCallback:
    """A deterministic selection: exactly the half with the largest loss."""
    return SparseSelectionCallback(
        **{"target_activation_rate": 0.5, "mode": "subset", "gate": "topk", "significance": "loss", **options}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
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
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, weights(reference)[name], rtol=1e-5, atol=1e-6, msg=name)
    assert module.seen == ([64, 32] * 3 if mode == "subset" else [64] * 3), "subset scores the whole batch first"


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
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


def test_subset_leaves_no_trace_of_scoring(digits: Digits) -> None:
    """With BatchNorm and dropout: weights, buffers and random state are those of a run on the selected samples alone."""
    module = fresh()
    picked = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            picked.append(module.net[1].num_batches_tracked.item())

    callback = half()
    indices: list[Tensor] = []
    select = SampleSelector.select

    def remember(self: SampleSelector, *args: Any, **options: Any) -> Selection:
        selection = select(self, *args, **options)
        indices.append(selection.indices)
        return selection

    SampleSelector.select = remember
    try:
        torch.manual_seed(3)
        fit(module, loader(digits), callback, Spy(), max_steps=4)
        after = torch.get_rng_state()
    finally:
        SampleSelector.select = select

    class SelectedOnly(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0][indices[batch_idx]], batch[1][indices[batch_idx]]), batch_idx)

    alone = fresh(SelectedOnly)
    torch.manual_seed(3)
    fit(alone, loader(digits), max_steps=4)
    assert torch.equal(after, torch.get_rng_state())
    assert picked == [1, 2, 3, 4], "BatchNorm saw one forward a step"
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, weights(alone)[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in ("net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"):
        torch.testing.assert_close(weights(module)[name], weights(alone)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_target_one_is_bitwise_dense(digits: Digits, mode: str) -> None:
    plain, ours = fresh(), fresh()
    torch.manual_seed(1)
    fit(plain, loader(digits, shuffle=True), max_epochs=2)
    torch.manual_seed(1)
    callback = SparseSelectionCallback(target_activation_rate=1.0, mode=mode)
    fit(ours, loader(digits, shuffle=True), callback, max_epochs=2)
    assert_same_weights(weights(plain), weights(ours))
    assert callback.savings["flops"] == 0.0
    assert callback.activation_rate == 1.0


class WeightsAfter(pl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps, self.weights, self.rng = steps, {}, None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            self.weights, self.rng = weights(pl_module), torch.get_rng_state()


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_warmup_is_bitwise_the_plain_run(digits: Digits, mode: str) -> None:
    spies = []
    for callbacks in ([], [SparseSelectionCallback(mode=mode), TwoStageScheduler(warmup_epochs=1)]):
        spies.append(WeightsAfter(steps=8))
        module = fresh()
        torch.manual_seed(1)
        fit(module, loader(digits, shuffle=True), spies[-1], *callbacks, max_epochs=2)
    assert_same_weights(spies[0].weights, spies[1].weights)
    assert torch.equal(spies[0].rng, spies[1].rng)


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


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
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


class ExplicitNet(SparseLossMixin, PlainNet):
    """The same cross-entropy, written as per-sample losses."""

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        return F.cross_entropy(self(x), y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch, batch_idx).mean()


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_explicit_losses_train_as_captured_ones(digits: Digits, mode: str, weighting: str) -> None:
    captured, explicit = fresh(dropout=0.0), fresh(ExplicitNet, dropout=0.0)
    for module in (captured, explicit):
        callback = SparseSelectionCallback(target_activation_rate=0.3, mode=mode, weighting=weighting)
        fit(module, loader(digits), callback, max_steps=4)
    for name, tensor in weights(captured).items():
        torch.testing.assert_close(tensor, weights(explicit)[name], rtol=1e-4, atol=1e-6, msg=name)


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


def test_metrics_before_and_after_the_loss_count_once(digits: Digits) -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = MulticlassAccuracy(10), MulticlassAccuracy(10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            scores = self(x)
            self.log("before", self.before(scores, y))
            loss = F.cross_entropy(scores, y)
            self.after.update(scores, y)
            return loss

    module = fresh(Net)
    fit(module, loader(digits), half(), max_steps=3)
    assert module.before._update_count == 3
    assert module.after._update_count == 3
    counted = sum(int(getattr(module.before, s).sum()) for s in ("tp", "fn"))
    assert counted == 3 * 32, "the selected samples, once each"


def test_lbfgs_sees_one_selection_a_batch(digits: Digits) -> None:
    class Net(PlainNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    for mode in ("mask", "subset", "partial"):
        module, callback = fresh(Net, dropout=0.0, batchnorm=False), SparseSelectionCallback(mode=mode, seed=1)
        fit(module, loader(digits), callback, max_steps=2)
        assert len(module.seen) > 4, "the optimizer evaluated the step several times a batch"
        assert len(set(module.seen) - {64}) == (2 if mode == "subset" else 0), "one size a batch"


def test_manual_optimization(digits: Digits) -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__(dropout=0.0, batchnorm=False)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    manual, automatic = fresh(Net), fresh(dropout=0.0, batchnorm=False)
    callbacks = [half(mode="mask"), half(mode="mask")]
    fit(manual, loader(digits), callbacks[0], max_steps=3)
    fit(automatic, loader(digits), callbacks[1], max_steps=3)
    assert_same_weights(weights(manual), weights(automatic))
    conv, linear = 2 * 9 * 8 * 64, 2 * 8 * 64 * 10  # a multiply-add is 2; no gradient for the images
    assert vars(callbacks[0].ledger.flops) == {"forward": conv + linear, "backward": conv + 2 * linear}
    assert callbacks[0].ledger.flops == callbacks[1].ledger.flops, "a backward inside the step is counted apart"
    manual, automatic = fresh(Net), fresh(dropout=0.0, batchnorm=False)
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


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_a_compiled_network_inside_the_module(digits: Digits, mode: str) -> None:
    plain, compiled = fresh(dropout=0.0), fresh(dropout=0.0)
    compiled.net = torch.compile(compiled.net, backend="aot_eager")
    callbacks = [half(mode=mode, **({"batchnorm": "exact"} if mode == "partial" else {})) for _ in range(2)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(plain, loader(digits), callbacks[0], max_steps=3)
        fit(compiled, loader(digits), callbacks[1], max_steps=3)
    told = [str(w.message) for w in said if "torch.compile" in str(w.message)]
    assert len(told) == (2 if mode == "partial" else 0), "before the first batch, and after the first sparse one"
    for (_, want), (name, got) in zip(weights(plain).items(), weights(compiled).items()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=name)
    assert callbacks[1].savings["flops"] is None, "not counted, so unknown"
    assert callbacks[0].savings["flops"] is not None


def test_the_module_is_left_as_it_was(digits: Digits) -> None:
    module = fresh()
    own = module.training_step
    fit(module, loader(digits), half(), max_steps=1)
    assert "training_step" not in module.__dict__
    assert module.training_step == own
    explicit = fresh(ExplicitNet)
    fit(explicit, loader(digits), half(), max_steps=1)
    assert not {"training_step", "per_sample_loss", "log", "log_dict"} & set(explicit.__dict__)

    class Fails(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise RuntimeError("the user's own")
            return super().training_step(batch, batch_idx)

    failing = fresh(Fails)
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(failing, loader(digits), half(), max_steps=3)
    assert "training_step" not in failing.__dict__


@pytest.mark.parametrize("mode", ["mask", "subset", "partial", "prune"])
def test_a_copy_of_the_module_made_within_the_fit_is_its_own(digits: Digits, mode: Mode) -> None:
    """A best model kept, a mean teacher, a module saved whole."""
    kept = []

    class Keeps(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 0:
                buffer = io.BytesIO()
                module._trainer, own = None, module._trainer
                torch.save(module, buffer)
                kept.extend([copy.deepcopy(module), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)])
                module._trainer = own

    module = fresh()
    fit(module, loader(digits), SparseSelectionCallback(mode=mode, target_activation_rate=0.5), Keeps(), max_epochs=2)
    final = weights(module)
    for one in kept:
        before = weights(one)
        fit(one, loader(digits), max_epochs=1)
        assert any(not torch.equal(before[name], value) for name, value in weights(one).items())
    assert_same_weights(final, weights(module))


def test_validate_and_test_need_nothing(digits: Digits) -> None:
    class Net(PlainNet):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    trainer = quiet_trainer(callbacks=[half()])
    module = fresh(Net)
    before = trainer.validate(module, loader(digits), verbose=False)
    assert trainer.test(module, loader(digits), verbose=False) == before
    trainer.fit(module, loader(digits), loader(digits))
    assert trainer.validate(module, loader(digits), verbose=False)[0]["val_acc"] > before[0]["val_acc"]


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_resume_equals_the_uninterrupted_run(digits: Digits, mode: str, tmp_path: Any) -> None:
    def callbacks() -> list[pl.Callback]:
        return [SparseSelectionCallback(mode=mode), TwoStageScheduler(warmup_epochs=1)]

    whole, whole_callbacks = fresh(dropout=0.0), callbacks()
    fit(whole, loader(digits), *whole_callbacks, max_epochs=4)
    first = fresh(dropout=0.0)
    trainer = fit(first, loader(digits), *callbacks(), max_epochs=2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]  # tensors and primitives alone
    assert state["SparseSelectionCallback"]["selector"]["steps"] == 8
    second, resumed = fresh(dropout=0.0), callbacks()
    quiet_trainer(max_epochs=4, callbacks=resumed).fit(second, loader(digits), ckpt_path=path)
    assert_same_weights(weights(whole), weights(second))
    assert resumed[0].threshold == whole_callbacks[0].threshold
    assert resumed[0].ledger.selected == whole_callbacks[0].ledger.selected


def test_a_second_fit_starts_its_books_anew(digits: Digits) -> None:
    callback = SparseSelectionCallback(controller=PIController())
    for _ in range(2):
        fit(fresh(), loader(digits), callback, max_steps=4)
        assert callback.ledger.offered == 4 * 64
        assert callback.ledger.stages["sparse"].steps == 4


def test_regression_substitutes_the_loss_and_says_so(digits: Digits, caplog: pytest.LogCaptureFixture) -> None:
    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    with caplog.at_level("INFO"):
        fit(fresh(Net), loader(digits), SparseSelectionCallback(significance="el2n"), max_steps=2)
    assert "EL2N is not defined for mse_loss" in caplog.text


def test_a_target_below_the_minimum_is_said(digits: Digits) -> None:
    with pytest.warns(UserWarning, match="min_selected keeps 2 of 8 samples"):
        fit(fresh(), loader(digits, batch_size=8), SparseSelectionCallback(target_activation_rate=0.06), max_steps=2)


class Other(PlainNet):
    """Losses that no torch loss function returned as they are."""

    problem = ""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self(batch[0])
        one_hot = F.one_hot(batch[1], 10).float()
        if self.problem == "by hand":
            return ((scores - one_hot) ** 2).mean()
        if self.problem == "several":
            return F.cross_entropy(scores, batch[1]) + F.mse_loss(scores, one_hot)
        if self.problem == "unreduced":
            return F.cross_entropy(scores, batch[1], reduction="none").mean()
        F.cross_entropy(scores, batch[1])
        return ((scores - one_hot) ** 2).mean()


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("problem", ["by hand", "several", "unreduced", "unused"])
def test_losses_of_any_form_train(digits: Digits, problem: str, warm: bool) -> None:
    """Only a score that is made of torch's losses needs one: told at the first batch, in the warmup too."""
    extra = [TwoStageScheduler(warmup_epochs=1)] if warm else []
    for mode in ("mask", "subset", "partial"):
        module, callback = fresh(Other), SparseSelectionCallback(mode=mode)
        module.problem = problem
        fit(module, loader(digits), callback, *extra, max_epochs=2, limit_train_batches=2)
        assert callback.ledger.stages["sparse"].selected < callback.ledger.stages["sparse"].offered
    module = fresh(Other)
    module.problem = problem
    callback = SparseSelectionCallback(significance="loss")
    if problem in ("several", "unreduced"):
        fit(module, loader(digits), callback, *extra, max_epochs=2, limit_train_batches=2)
        return
    with pytest.raises(LossCaptureError, match="no torch loss function has a part in the loss"):
        fit(module, loader(digits), callback, *extra, max_epochs=2)
    assert callback.ledger.offered == 0, "at the first batch"


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
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
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, weights(reference)[name], rtol=1e-5, atol=1e-6, msg=name)
    assert "per_sample_loss" not in vars(module)


def test_losses_of_another_shape_are_refused(digits: Digits) -> None:
    class Net(SparseLossMixin, PlainNet):
        def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return (self(batch[0]) - 1).square()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.per_sample_loss(batch, batch_idx).mean()

    with pytest.raises(LossCaptureError, match=r"shape \(64,\), got shape \(64, 10\)"):
        fit(fresh(Net), loader(digits), half(), max_steps=1)


def test_all_configuration_faults_come_together(digits: Digits) -> None:
    module = fresh()
    callback = SparseSelectionCallback(
        target_activation_rate=1.5, mode="subset", gate="topk", significance="best", weighting="sqrt", min_selected=0
    )
    scheduler = TwoStageScheduler(warmup_epochs=5, cooldown_epochs=1.5)
    with pytest.raises(ValueError, match="cannot run") as error:
        fit(module, loader(digits), scheduler, callback, TwoStageScheduler(), max_epochs=3)
    faults = error.value.faults
    for expected in (
        "target_activation_rate",
        "significance",
        "weighting='sqrt'",
        "min_selected",
        "expected one TwoStage",
        "cooldown_epochs",
    ):
        assert any(expected in fault for fault in faults), expected
    assert module.seen == [], "before the first batch"


def test_a_compiled_lightning_module_is_refused(digits: Digits) -> None:
    module = torch.compile(fresh(), backend="eager")
    with pytest.raises(ValueError, match="compile the network inside it"):
        fit(module, loader(digits), half(), max_steps=1)


@pytest.mark.parametrize("rate", [0.4, 0.1])
@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_flops_counted_over_the_whole_step(digits: Digits, mode: str, rate: float) -> None:
    """The ledger's scaled figure against FlopCounterMode around entire steps, scoring included, of the same run."""
    from torch.utils.flop_counter import FlopCounterMode

    def whole_steps(*callbacks: pl.Callback) -> int:
        with FlopCounterMode(display=False) as counter, RowOps():
            fit(fresh(batchnorm=False), loader(digits, batch_size=128), *callbacks, max_steps=4)
        return counter.get_total_flops()

    callback = SparseSelectionCallback(target_activation_rate=rate, mode=mode)
    share = whole_steps(callback) / whole_steps()
    assert 1 - callback.savings["flops"] == pytest.approx(share, rel=1e-3)
    observed = callback.ledger.selected / callback.ledger.offered
    forward = callback.ledger.flops.forward / callback.ledger.flops.dense
    expected = {"mask": 1.0, "subset": forward + observed, "partial": forward + (1 - forward) * observed}
    assert share == pytest.approx(expected[mode], rel=1e-3)


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
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, weights(reference)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_tokens_with_ignored_ones_end_to_end() -> None:
    """A token model: the selected rows weigh by samples; the step of ``subset`` divides by its own valid tokens."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 7, (32, 5)), torch.randint(0, 7, (32, 5))
    labels[torch.rand(32, 5) < 0.3] = -100

    class Tokens(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.head(self.embed(batch["tokens"]))
            return F.cross_entropy(scores.view(-1, 7), batch["labels"].view(-1))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

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
        for name, tensor in weights(module).items():
            torch.testing.assert_close(tensor, weights(reference)[name], rtol=1e-5, atol=1e-6, msg=f"{mode} {name}")


def test_scoring_logs_nothing_and_draws_nothing(digits: Digits) -> None:
    """What stands before the loss: self.log, Python's and NumPy's generators, autocast."""
    import random

    import numpy as np

    logged, drawn, dtypes = [], [], []

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            draw = (random.random(), float(np.random.rand()))
            scores = self(batch[0])
            if torch.is_grad_enabled():
                drawn.append(draw)
            dtypes.append(scores.dtype)
            self.log("mean_score", scores.float().mean())
            self.log_dict({"again": scores.float().mean()})
            return F.cross_entropy(scores, batch[1])

    module = fresh(Net)

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            logged.append("mean_score" in str(list(trainer._results)))

    random.seed(0)
    np.random.seed(0)
    fit(module, loader(digits), half(), Spy(), max_steps=1, precision="bf16-mixed")
    assert logged == [False], "scoring came first and logged nothing"
    assert dtypes == [torch.bfloat16] * 2, "scoring runs under the trainer's precision"
    random.seed(0)
    np.random.seed(0)
    assert drawn == [(random.random(), float(np.random.rand()))] * 2, "the step draws what scoring drew"


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_flops_of_a_sample_are_the_same_however_counted(digits: Digits, mode: str) -> None:
    conv, linear = 2 * 9 * 8 * 64, 2 * 8 * 64 * 10
    for warm in (True, False):
        callback = half(mode=mode)
        extra = [TwoStageScheduler(warmup_epochs=1)] if warm else []
        fit(fresh(batchnorm=False), loader(digits), callback, *extra, max_epochs=2)
        assert vars(callback.ledger.flops) == {"forward": conv + linear, "backward": conv + 2 * linear}


def test_flops_with_lbfgs_and_with_two_backwards(digits: Digits) -> None:
    conv, linear = 2 * 9 * 8 * 64, 2 * 8 * 64 * 10

    class Lbfgs(PlainNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    class TwoBackwards(PlainNet):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(0.5 * loss, retain_graph=True)
            self.manual_backward(0.5 * loss)
            self.optimizers().step()

    for cls, backwards, warm in ((Lbfgs, 1, 0), (Lbfgs, 1, 1), (TwoBackwards, 2, 0)):
        callback = half(mode="mask")
        fit(fresh(cls, batchnorm=False), loader(digits), callback, TwoStageScheduler(warmup_epochs=warm), max_epochs=2)
        expected = {"forward": conv + linear, "backward": backwards * (conv + 2 * linear)}
        assert vars(callback.ledger.flops) == expected


def test_a_sum_divided_by_the_batch_size(digits: Digits) -> None:
    class Summed(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / batch[0].size(0)

    for mode, weighting in itertools.product(("mask", "subset"), ("none", "sqrt", "unbiased")):
        mean, summed = fresh(dropout=0.0), fresh(Summed, dropout=0.0)
        for module in (mean, summed):
            callback = SparseSelectionCallback(target_activation_rate=0.3, mode=mode, weighting=weighting)
            fit(module, loader(digits), callback, max_steps=2)
        for name, tensor in weights(mean).items():
            torch.testing.assert_close(tensor, weights(summed)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_losses_without_gradient_are_for_logging(digits: Digits) -> None:
    class Net(PlainNet):
        first = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self(batch[0])
            if self.first:
                with torch.no_grad():
                    F.mse_loss(scores, torch.zeros_like(scores))
            loss = F.cross_entropy(scores, batch[1])
            with torch.no_grad():
                self.log("mse", F.mse_loss(scores, torch.zeros_like(scores)))
                F.cross_entropy(scores, batch[1], reduction="none")
            return loss

    plain, logging = fresh(dropout=0.0), fresh(Net, dropout=0.0)
    for module in (plain, logging):
        fit(module, loader(digits), half(), max_steps=2)
    assert_same_weights(weights(plain), weights(logging))
    before = fresh(Net, dropout=0.0)
    before.first = True
    fit(before, loader(digits), half(), max_steps=2)
    assert_same_weights(weights(plain), weights(before))


class TimeMajor(SparseLossMixin, pl.LightningModule):
    """Sequences as (T, B): everything about the batch is overridden."""

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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
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
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, weights(reference)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_packed_sequences_by_overrides() -> None:
    from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

    class Packed(SparseLossMixin, pl.LightningModule):
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

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

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


@pytest.mark.filterwarnings("ignore:.training_step. returned .None")
def test_a_skipped_batch_and_a_batch_of_none(digits: Digits) -> None:
    class Skips(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    callback = SparseSelectionCallback()
    fit(fresh(Skips), loader(digits), callback, TwoStageScheduler(warmup_epochs=0.5))
    assert callback.ledger.offered == 512

    for mode in ("mask", "subset", "partial"):
        callback = SparseSelectionCallback(mode=mode)
        fit(fresh(Skips), loader(digits), callback)
        assert callback.ledger.offered == 512
        assert callback.ledger.stages["sparse"].selected < 512 - 64

    x, y = digits
    batches = [None, (x[:64], y[:64])]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    with pytest.warns(UserWarning, match="yielded None"):
        fit(fresh(), data, callback)
    assert callback.ledger.offered == 64


def test_a_score_that_cannot_be_had_fails_in_the_warmup(digits: Digits) -> None:
    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch_idx)
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    module = fresh(Net)
    with pytest.raises(ValueError, match="'confidence' is defined for classification"):
        fit(
            module,
            loader(digits),
            SparseSelectionCallback(significance="confidence"),
            TwoStageScheduler(warmup_epochs=2),
            max_epochs=4,
        )
    assert module.seen == [0]


def test_the_mixin_says_when_the_losses_are_missing(digits: Digits) -> None:
    class Net(SparseLossMixin, PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.per_sample_loss(batch, batch_idx).mean()

    with pytest.raises(LossCaptureError, match="which the module does not define"):
        fit(fresh(Net), loader(digits), SparseSelectionCallback(), max_steps=1)


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


def test_layers_made_in_setup_are_held_still(digits: Digits) -> None:
    """Lightning calls callbacks' setup before the module's own."""

    class Net(PlainNet):
        def setup(self, stage: str) -> None:
            self.accuracy = MulticlassAccuracy(10)
            self.norm = nn.BatchNorm1d(10)
            self.rnn = nn.GRU(10, 10, num_layers=2, dropout=0.9, batch_first=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self.norm(self(batch[0]))
            self.accuracy.update(scores, batch[1])
            again = [self.rnn(scores.unsqueeze(1))[0] for _ in range(2)]
            if not torch.is_grad_enabled():
                assert torch.equal(*again), "dropout is off while scoring"
            return F.cross_entropy(scores, batch[1])

    module = fresh(Net)
    fit(module, loader(digits), half(), max_steps=3)
    assert module.accuracy._update_count == 3
    assert module.norm.num_batches_tracked == 3


def test_a_batch_whose_samples_are_out_of_sight_is_refused(digits: Digits) -> None:
    class Opaque:
        def __init__(self, x: Tensor) -> None:
            self.x = lambda: x

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden, y = batch["hidden"].x(), batch["all_y"].x()
            return F.cross_entropy(self(hidden), y)

    x, y = digits[0][:64], digits[1][:64]
    data = torch.utils.data.DataLoader(
        [{"hidden": Opaque(x), "all_y": Opaque(y), "id": torch.arange(64)}], batch_size=None
    )
    with pytest.raises(EntryError, match="nothing in the graph of the loss was seen to depend on one of the 64"):
        fit(fresh(Net), data, half(), max_epochs=3)
