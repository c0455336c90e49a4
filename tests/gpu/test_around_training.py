"""What goes with training on the device: joules, loaders, commands, a process group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_ast import EnergyMonitor
from lightning_ast.__main__ import main
from lightning_ast.advice import advise
from lightning_ast.energy import find_meters
from tests.gpu.runs import accelerator_of, callbacks_of, finite, train
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, quiet_trainer


def test_joules(digits: Digits, cuda: str) -> None:
    """The GPU's own counter, and what a sparse run saves of it."""
    meters, missing = find_meters(torch.device(cuda, 0))
    assert "gpu" in [meter.kind for meter in meters], missing
    monitor = EnergyMonitor()
    callbacks = callbacks_of("prune", warmup=4)
    data = loader(digits, batch_size=8)
    trainer = train(fresh(), digits, cuda, *callbacks, monitor, data=data, max_epochs=8)
    assert any(name.endswith("(NVML)") for name in monitor.names)
    assert len(monitor.epochs) == 8
    gpu = [costs.gpu_joules for costs in monitor.epochs]
    print(f"{monitor.names}: {gpu} J, {monitor.seconds:.2f} s, saved {callbacks[0].savings}")
    assert None not in gpu
    assert sum(gpu) > 0
    watts = sum(gpu) / monitor.seconds
    assert 20 < watts < 1500
    assert callbacks[0].savings["joules"] is not None
    logged = trainer.callback_metrics
    assert {"energy/gpu_joules", "energy/total_joules", "energy/epoch_seconds", "ast/savings_joules"} <= logged.keys()


def test_seconds_of_the_sections(digits: Digits, device: str) -> None:
    """On CUDA they are measured by events."""
    monitor = EnergyMonitor(meters=[])
    train(fresh(), digits, device, *callbacks_of("subset"), monitor, max_epochs=2)
    for costs in monitor.epochs:
        assert 0 < costs.forward_backward_seconds < costs.epoch_seconds
        assert 0 <= costs.loading_seconds < costs.epoch_seconds
    assert monitor.epochs[1].scoring_seconds > 0


@pytest.mark.parametrize("mode", MODES)
def test_loaders_with_workers_and_pinned_memory(digits: Digits, device: str, mode: str) -> None:
    module = fresh()
    callbacks = callbacks_of(mode, gate="soft")
    data = loader(
        digits, shuffle=True, num_workers=2, persistent_workers=True, pin_memory=device == "cuda", kind="dict"
    )
    trainer = train(module, digits, device, *callbacks, data=data, max_epochs=3, log_every_n_steps=1)
    callback = callbacks[0]
    assert trainer.strategy.root_device.type == device
    assert finite(module)
    assert callback.ledger.offered == 3 * 512
    assert callback.ledger.selected == pytest.approx(512 + 2 * 256, rel=0.15)
    assert callback.savings["flops"] is not None
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(values)
    assert {"train_loss", "ast/activation_rate", "ast/savings_samples"} <= values.keys()
    assert all(map(math.isfinite, values.values()))
    state = callback.state_dict()
    assert all(tensor.device.type == "cpu" for tensor in tensors(state)), "a checkpoint opens without a GPU"


def tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)


@pytest.mark.parametrize("mode", ["partial", "prune"])
def test_the_demo(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--mode", mode, "--epochs", "3", "--width", "4", "--train-limit", "512", "--rate", "0.4"]) == 0
    out = capsys.readouterr().out
    assert f"AST, {mode}, r = 0.4" in out
    assert "dense" in out


def test_advice(digits: Digits, device: str) -> None:
    trainer = quiet_trainer(accelerator=accelerator_of(device), max_epochs=10)
    advice = advise(trainer, PlainNet(), loader(digits), budget_seconds=1.0)
    print(advice)
    for mode in MODES:
        predicted = advice.at(mode, 0.4)
        assert predicted is not None
        assert predicted.step_seconds > 0
        assert predicted.run_seconds > 0
    if device == "cuda":
        assert advice.at("partial", 0.4).memory_bytes > 0
        assert torch.cuda.get_device_name() in str(advice)


@pytest.fixture
def _no_group_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_no_group_left")
@pytest.mark.parametrize("mode", ["mask", "partial", "subset", "prune"])
def test_one_process_of_ddp(digits: Digits, device: str, mode: str) -> None:
    """NCCL on CUDA, gloo on a CPU."""
    module = fresh()
    callbacks = callbacks_of(mode)
    trainer = train(module, digits, device, *callbacks, strategy="ddp", max_epochs=2)
    assert torch.distributed.get_backend() == ("nccl" if device == "cuda" else "gloo")
    assert trainer.world_size == 1
    assert finite(module)
    assert callbacks[0].ledger.selected == 512 + 256
