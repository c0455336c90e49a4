from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch

from lightning_ast.energy import EnergyUnavailableError, NvmlMeter, RaplMeter, ReplayedMeter, find_meters

UUID = "GPU-0b6fd1f4-2a0c-4f4e-9d5c-3a7c2c1f9a11"


class FakeNvml(types.ModuleType):
    """NVML as nvidia-ml-py shows it, for one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, readings: list[int], *, counts: bool = True) -> None:
        super().__init__("pynvml")
        self.readings, self.counts = list(readings), counts

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        assert handle == "handle"
        return "NVIDIA H200"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counts:
            raise self.NVMLError("Not Supported")
        return self.readings.pop(0)


def install(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> FakeNvml:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_nvml_counts_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml([7_000, 7_000, 12_500]))
    meter = NvmlMeter(UUID)
    assert (meter.name, meter.kind, meter.identity) == ("NVIDIA H200 (NVML)", "gpu", UUID)
    assert meter.read_joules() == 7.0
    assert meter.read_joules() == 12.5


def test_a_gpu_without_a_counter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml([], counts=False))
    with pytest.raises(EnergyUnavailableError, match=r"NVIDIA H200 \(NVML\) has no energy counter.*Not Supported"):
        NvmlMeter(UUID)
    with pytest.raises(EnergyUnavailableError, match="NVML does not know GPU-1: Not Found"):
        NvmlMeter("GPU-1")


def test_nvml_on_a_machine_without_the_driver() -> None:
    pytest.importorskip("pynvml")
    if torch.cuda.is_available():
        pytest.skip("this machine has the driver")
    with pytest.raises(EnergyUnavailableError, match="NVML does not know"):
        NvmlMeter(UUID)


def test_without_nvidia_ml_py_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(EnergyUnavailableError, match=r"pip install 'lightning-ast\[energy\]'"):
        NvmlMeter(UUID)


@pytest.mark.parametrize("device", [torch.device("cuda", 3)])
def test_the_meter_of_a_device_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    install(monkeypatch, FakeNvml([1_000, 2_000]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(uuid=UUID[4:], index=d))
    meters, missing = find_meters(device)
    assert [meter.identity for meter in meters] == [UUID]
    assert meters[0].read_joules() == 2.0
    assert len(missing) <= 1  # RAPL's, where this machine has none


def zone(root: Path, name: str, kind: str, microjoules: int, most: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def test_rapl_adds_packages_and_memory_and_nothing_twice(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000)  # lies inside the package
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    platform = zone(tmp_path, "intel-rapl:2", "psys", 0)  # all of it once more
    meter = RaplMeter(tmp_path)
    assert (meter.kind, meter.name) == ("cpu", "CPU, 3 RAPL counters")
    for folder, joules in ((first, 15), (core, 90), (memory, 3), (second, 7), (platform, 900)):
        (folder / "energy_uj").write_text(f"{joules * 1_000_000}")
    assert meter.read_joules() == 10 + 1 + 7
    (second / "energy_uj").write_text("9000000")
    assert meter.read_joules() == 10 + 1 + 9


def test_a_rapl_counter_that_came_round_goes_on(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 90_000_000, most=100_000_000)
    meter = RaplMeter(tmp_path)
    (folder / "energy_uj").write_text("5000000")
    assert meter.read_joules() == 15.0
    (folder / "energy_uj").write_text("6000000")
    assert meter.read_joules() == 16.0
    assert meter.longest_interval_seconds == 0.1  # 100 J at 1000 W


def test_rapl_that_is_missing_or_not_readable_says_so(tmp_path: Path) -> None:
    with pytest.raises(EnergyUnavailableError, match="no RAPL counters"):
        RaplMeter(tmp_path)
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    if os.geteuid() != 0:
        (folder / "energy_uj").chmod(0)
        with pytest.raises(EnergyUnavailableError, match="sudo chmod"):
            RaplMeter(tmp_path)


def test_rapl_that_root_alone_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)

    read_text = Path.read_text

    def refused(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(EnergyUnavailableError, match=r"root alone: sudo chmod a\+r .*energy_uj"):
        RaplMeter(tmp_path)


@pytest.mark.parametrize("broken", ["missing range", "empty", "no range"])
def test_rapl_that_a_virtual_machine_only_shows(tmp_path: Path, broken: str) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 1, most=0 if broken == "no range" else 100)
    if broken == "missing range":
        (folder / "max_energy_range_uj").unlink()
    elif broken == "empty":
        (folder / "energy_uj").write_text("")
    with pytest.raises(EnergyUnavailableError, match=r"cannot be read|have no range"):
        RaplMeter(tmp_path)


def test_a_meter_goes_to_another_process_and_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(monkeypatch, FakeNvml([1_000, 2_000, 3_000]))
    meter = pickle.loads(pickle.dumps(NvmlMeter(UUID)))
    assert (meter.identity, meter.read_joules()) == (UUID, 3.0)
    assert nvml.readings == []


def test_a_recording_ends() -> None:
    meter = ReplayedMeter([3.0], kind="cpu", identity="x")
    assert (meter.read_joules(), meter.kind, meter.identity) == (3.0, "cpu", "x")
    with pytest.raises(EnergyUnavailableError, match="the recording is over"):
        meter.read_joules()


def test_nothing_to_measure_has_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> RaplMeter:
        raise EnergyUnavailableError("no counters here")

    monkeypatch.setattr("lightning_ast.energy.meters.RaplMeter", none)
    assert find_meters(torch.device("cpu")) == ([], ["no counters here"])
