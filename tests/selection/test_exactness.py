"""What the callback computes is what it says: unbiased weights, two processes as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast import PIController, SparseSelectionCallback
from lightning_ast.core import SampleSelector, select_rows
from lightning_ast.core.gate import FLOOR, Selection
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import BATCH_MODES, assert_same_weights, gloo, quiet_trainer, weights

# ---------------------------------------------------------------------- 1. unbiased weights

SIZE, RATE = 48, 0.4
DRAWN = [pytest.param("mask", marks=pytest.mark.slow), "subset", "partial"]
"""Mask and partial select alike within one backward: partial alone is tried in the fast suite."""


class Linear(PlainNet):
    """Small enough to look at each coordinate of its gradient; trained a little, so that the samples differ."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def trained(digits: Digits) -> Linear:
    torch.manual_seed(0)
    module = Linear().double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(digits[0][256:].double()), digits[1][256:]).backward()
        optimizer.step()
    return module


@pytest.fixture
def batch(digits: Digits) -> Digits:
    return digits[0][:SIZE].double(), digits[1][:SIZE]


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients]).detach().clone()


def dense_gradient(module: nn.Module, batch: Digits) -> Tensor:
    return flat(torch.autograd.grad(F.cross_entropy(module(batch[0]), batch[1]), list(module.parameters())))


def el2n(module: nn.Module, batch: Digits) -> Tensor:
    with torch.no_grad():
        return (module(batch[0]).softmax(1) - F.one_hot(batch[1], 10)).norm(dim=1)


def inclusion(scores: Tensor, rate: float) -> Tensor:
    """``clip(score / threshold, floor, 1)`` with the threshold at which they sum up to the rate: by bisection."""
    low, high = 1e-12, float(scores.max()) / rate * len(scores)
    for _ in range(200):
        middle = (low + high) / 2
        if float((scores / middle).clamp(FLOOR, 1).sum()) > rate * len(scores):
            low = middle
        else:
            high = middle
    return (scores / high).clamp(FLOOR, 1)


def excess(draws: Tensor, expected: Tensor, *, error_rate: float = 1e-3) -> float:
    """How far the mean of draws ``(n, d)`` is from what is expected, as a share of what chance allows.

    The largest z-score over the coordinates, by each one's empirical standard error, divided by the critical value
    that chance exceeds with ``error_rate`` for all coordinates together (Bonferroni). Below 1: no bias is seen.
    """
    count = draws.shape[0]
    error = draws.std(0) / count**0.5
    varies = error > 1e-12 * expected.abs().max()
    torch.testing.assert_close(draws.mean(0)[~varies], expected[~varies], rtol=1e-9, atol=1e-12)
    z = (draws.mean(0) - expected)[varies].abs() / error[varies]
    share = torch.tensor(1 - error_rate / (2 * int(varies.sum())), dtype=torch.float64)
    critical = float(torch.special.ndtri(share))
    if count < 1000:  # Student's t, by the expansion of Abramowitz and Stegun, 26.7.5
        n, x = count - 1, critical
        critical += (x**3 + x) / (4 * n) + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * n**2)
    return float(z.max()) / critical


def core_gradient(mode: str, module: nn.Module, batch: Digits, kept: Selection, weighting: Any) -> Tensor:
    """As a plain training loop on the core would."""
    x, y = batch
    weights = torch.ones(len(kept.indices)) if kept.weights is None else kept.weights
    divisor = len(x) if weighting == "unbiased" else weights.sum()
    if mode == "subset":
        losses = F.cross_entropy(module(x[kept.indices]), y[kept.indices], reduction="none")
        total = (losses * weights.to(losses)).sum()
    else:
        losses = F.cross_entropy(module(x), y, reduction="none")
        if mode == "partial":
            total = select_rows(losses, kept.indices, weights.to(losses))
        else:
            total = (losses[kept.indices] * weights.to(losses)).sum()
    loss = total / divisor
    return flat(torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("mode", DRAWN)
def test_the_mean_over_many_draws_is_the_dense_gradient(trained: Linear, batch: Digits, mode: str) -> None:
    scores, expected = el2n(trained, batch), dense_gradient(trained, batch)
    assert float(scores.max() / scores.min()) > 10, "the samples differ: the test can fail"
    draws: dict[str, list[Tensor]] = {"unbiased": [], "none": []}
    kept = torch.zeros(SIZE, dtype=torch.float64)
    count = 2000
    for weighting, gradients in draws.items():
        for seed in range(count if weighting == "unbiased" else 500):
            selector = SampleSelector(target_activation_rate=RATE, weighting=weighting, seed=seed)  # type: ignore[arg-type]
            selection = selector.select(scores)
            gradients.append(core_gradient(mode, trained, batch, selection, weighting))
            if weighting == "unbiased":
                kept[selection.indices] += 1 / count
    probability = inclusion(scores, RATE)
    assert excess(torch.stack(draws["unbiased"]), expected) < 1
    assert excess(torch.stack(draws["none"]), expected) > 3, "the same draws without weights are biased"
    spread = (probability * (1 - probability) / count).sqrt()
    assert bool(((kept - probability).abs() <= 4.5 * spread + 1e-12).all()), "each is kept with its probability"


class FirstGradient(pl.Callback):
    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.gradient = flat(p.grad for p in module.parameters())


@pytest.mark.parametrize("mode", DRAWN)
def test_the_mean_over_trainers_is_the_dense_gradient(trained: Linear, batch: Digits, mode: str) -> None:
    """Through the callback, one step a Trainer, by seed; along three directions and a few coordinates."""
    expected = dense_gradient(trained, batch)
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(3, len(expected), generator=generator, dtype=torch.float64)
    axes = torch.cat([expected[None], axes, torch.eye(len(expected), dtype=torch.float64)[-10:]])
    found = {}
    for weighting in ("unbiased", "none"):
        rows = []
        for seed in range(40 if weighting == "unbiased" else 20):
            selection = SparseSelectionCallback(mode=mode, target_activation_rate=RATE, weighting=weighting, seed=seed)  # type: ignore[arg-type]
            spy, module = FirstGradient(), Linear().double()
            module.load_state_dict(trained.state_dict())
            trainer = quiet_trainer(callbacks=[selection, spy], max_steps=1, precision="64-true")
            trainer.fit(module, loader(batch, batch_size=SIZE))
            rows.append(axes @ spy.gradient)
        found[weighting] = excess(torch.stack(rows), axes @ expected)
    assert found["unbiased"] < 1
    assert found["none"] > 1, "the same draws without weights are biased"


# ---------------------------------------------------------------------- 2. two processes


class Record(pl.Callback):
    """What a rank kept of the micro-batches of its first optimizer step, and the gradient of that step."""

    def __init__(self, folder: Path, selection: SparseSelectionCallback, window: int) -> None:
        self.folder, self.selection, self.window = folder, selection, window
        self.batches: list[Any] = []
        self.kept: list[Any] = []
        self.thresholds: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.batches) < self.window:
            self.batches.append(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.kept) < self.window:
            kept = self.selection.last_selection
            self.kept.append((kept.indices, kept.weights))
            self.thresholds.append(self.selection.threshold)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.gradient = flat(p.grad for p in module.parameters())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        found = {n: getattr(self, n) for n in ("batches", "kept", "thresholds", "gradient")}
        torch.save({**found, "weights": weights(module)}, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_equal_one_process_on_the_union(
    digits: Digits, tmp_path: Path, mode: str, weighting: str, accumulate: int
) -> None:
    """To 1e-6 in float64; the weights of the samples too are computed by hand, from score and threshold."""
    size = 32
    torch.manual_seed(0)
    module, reference = (PlainNet(dropout=0.0, batchnorm=False).double() for _ in range(2))
    reference.load_state_dict(module.state_dict())
    data = digits[0].double(), digits[1]
    options: dict[str, Any] = {"target_activation_rate": 0.3, "weighting": weighting}
    cut = F.cross_entropy(reference(data[0]), data[1], reduction="none").median().item()
    if weighting == "none":
        fixed = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=cut)
        options |= {"gate": "threshold", "significance": "loss", "controller": fixed}
    selection = SparseSelectionCallback(mode=mode, **options)  # type: ignore[arg-type]
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[selection, Record(tmp_path, selection, accumulate)],
        max_steps=2,
        accumulate_grad_batches=accumulate,
        precision="64-true",
    )
    trainer.fit(module, loader(data, batch_size=size))

    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_weights(ranks[0]["weights"], ranks[1]["weights"])
    assert torch.equal(ranks[0]["gradient"], ranks[1]["gradient"])
    picked, factors, counts = [], [], []
    for rank in ranks:
        assert len(rank["batches"]) == len(rank["kept"]) == accumulate
        for (x, y), (indices, given), threshold in zip(rank["batches"], rank["kept"], rank["thresholds"]):
            losses = F.cross_entropy(reference(x), y, reduction="none")
            if weighting == "none":
                assert torch.equal(indices, (losses > cut).nonzero().squeeze(1))
                factors.append(torch.ones_like(losses[indices]))
            else:
                exponent = {"sqrt": -0.5, "unbiased": -1.0}[weighting]
                by_hand = (el2n(reference, (x, y)) / threshold).clamp(FLOOR, 1)[indices] ** exponent
                torch.testing.assert_close(given.double(), by_hand, rtol=5e-7, atol=0.0)  # scores are float32
                factors.append(given.double())
            picked.append(losses[indices])
            counts.append(len(indices))
    assert ranks[0]["thresholds"] == ranks[1]["thresholds"], "one controller for all"
    assert len(set(counts)) > 1 or weighting != "none", "the ranks keep different numbers: the test can fail"
    total = torch.cat(factors).sum() if weighting != "unbiased" else 2 * accumulate * size
    loss = (torch.cat(factors) * torch.cat(picked)).sum() / total
    expected = flat(torch.autograd.grad(loss, list(reference.parameters())))
    assert float((ranks[0]["gradient"] - expected).norm() / expected.norm()) < 1e-6


class TwoHeads(PlainNet):
    """Two losses, one of them by hand, and a learned weight between them."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batchnorm=False)
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.side = nn.Linear(64, 1)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        side = (self.side(x.flatten(1)).squeeze(1) - y).abs()
        return F.cross_entropy(self(x), y, reduction="none") + self.weight * side

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        side = (self.side(x.flatten(1)).squeeze(1) - y).abs().mean()
        return F.cross_entropy(self(x), y) + self.weight * side


def norms(module: TwoHeads, x: Tensor, y: Tensor) -> Tensor:
    """The norm of each sample's gradient at the outputs of both heads."""
    with torch.no_grad():
        one = (module(x).softmax(1) - F.one_hot(y, 10)).norm(dim=1)
        return (one.square() + module.weight.square()).sqrt()


@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_weigh_every_sample_of_two_heads_alike(digits: Digits, tmp_path: Path, mode: str) -> None:
    module, reference = fresh(TwoHeads), fresh(TwoHeads)
    cut = norms(reference, *digits).median().item()
    fixed = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=cut)
    selection = SparseSelectionCallback(mode=mode, gate="threshold", controller=fixed)  # type: ignore[arg-type]
    callbacks = [selection, Record(tmp_path, selection, 1)]
    trainer = quiet_trainer(devices=2, strategy=gloo(), callbacks=callbacks, max_steps=2)
    trainer.fit(module, loader(digits))

    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_weights(ranks[0]["weights"], ranks[1]["weights"])
    x, y = (torch.cat([rank["batches"][0][part] for rank in ranks]) for part in (0, 1))
    kept = norms(reference, x, y) > cut
    counts = [int(rows.sum()) for rows in kept.split(64)]
    assert [len(rank["kept"][0][0]) for rank in ranks] == counts
    assert counts[0] != counts[1], "the ranks keep different numbers: the test can fail"
    parameters = dict(reference.named_parameters())
    parts = ranks[0]["gradient"].split([parameter.numel() for parameter in parameters.values()])
    got = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
    del parameters["weight"]  # it is the loss's own, and sees every sample
    expected = torch.autograd.grad(reference.losses(x, y)[kept].mean(), list(parameters.values()))
    for name, want in zip(parameters, expected, strict=True):
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-6)
