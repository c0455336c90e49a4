"""Energy meters: counters of joules that only grow, read now and then. A GPU's through NVML, a CPU's through RAPL."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from lightning_ast.errors import EnergyUnavailableError

__all__ = ["EnergyKind", "EnergyMeter", "NvmlMeter", "RaplMeter", "ReplayedMeter", "find_meters"]

EnergyKind = Literal["gpu", "cpu"]

_POWERCAP = Path("/sys/class/powercap")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MOST_WATTS = 1000.0  # a CPU package or its memory draws less: how soon a RAPL counter can come round


@runtime_checkable
class EnergyMeter(Protocol):
    """A counter that :class:`~lightning_ast.EnergyMonitor` reads; anything that counts joules can be one.

    Attributes:
        name: The hardware that is measured, and how.
        kind: The kind of hardware, ``"gpu"`` or ``"cpu"``.
        identity: A name of the hardware, the same for all its meters: processes that share it count it once.
        longest_interval_seconds: The longest time between two readings; infinite for most meters.
    """

    name: str
    kind: EnergyKind
    identity: str
    longest_interval_seconds: float

    def read_joules(self) -> float:
        """Return the joules since a moment that stays the same.

        Raises:
            EnergyUnavailableError: The counter cannot be read any more.
        """


class NvmlMeter:
    """The energy counter of an NVIDIA GPU (Volta or later): the whole board, whoever uses it.

    Source: NVML, ``nvmlDeviceGetTotalEnergyConsumption``, millijoules since the driver was loaded.

    Args:
        uuid: The GPU's name as ``nvidia-smi -L`` gives it: ``"GPU-..."``.

    Raises:
        EnergyUnavailableError: The package nvidia-ml-py is missing, or the GPU has no such counter (a MIG slice has
            none).
    """

    kind: EnergyKind = "gpu"
    longest_interval_seconds = math.inf

    def __init__(self, uuid: str) -> None:
        try:
            import pynvml
        except ModuleNotFoundError as error:
            raise EnergyUnavailableError("nvidia-ml-py is missing: pip install 'lightning-ast[energy]'") from error
        self._nvml: Any = pynvml
        self.identity = uuid
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            name = pynvml.nvmlDeviceGetName(self._device)  # older versions of nvidia-ml-py return bytes
            self.name = f"{name.decode() if isinstance(name, bytes) else name} (NVML)"
        except pynvml.NVMLError as error:
            raise EnergyUnavailableError(f"NVML does not know {uuid}: {error}") from error
        self.read_joules()

    def __reduce__(self) -> tuple[Any, ...]:
        # a handle of NVML is an address in this process: a copy, or a spawned process, must ask for its own
        return type(self), (self.identity,)

    @classmethod
    def of(cls, device: torch.device) -> NvmlMeter:
        """Make the meter of a CUDA device of this process."""
        # by its UUID: NVML numbers all GPUs of the machine, CUDA only those that CUDA_VISIBLE_DEVICES leaves
        return cls(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def read_joules(self) -> float:
        """Return the joules since the driver was loaded; the counter moves about every 20 to 100 ms."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3
        except self._nvml.NVMLError as error:
            raise EnergyUnavailableError(f"{self.name} has no energy counter that can be read: {error}") from error


class RaplMeter:
    """The energy counters of the CPU packages and, where they are apart, their memory: the whole machine's.

    Source: Linux powercap, ``intel-rapl:*/energy_uj`` (AMD's CPUs too); a counter that came round is recognised by
    its smaller value.

    Args:
        root: The folder in which the kernel shows the counters.

    Raises:
        EnergyUnavailableError: There are no counters, or this user cannot read them.

    Attributes:
        longest_interval_seconds: A time in which a counter cannot come round twice.
    """

    kind: EnergyKind = "cpu"

    def __init__(self, root: str | Path = _POWERCAP) -> None:
        domains = [zone for zone in sorted(Path(root).glob("intel-rapl:*")) if _counts(zone)]
        if not domains:
            raise EnergyUnavailableError("the kernel shows no RAPL counters (virtual machines rarely do)")
        self.name = f"CPU, {len(domains)} RAPL counters" if len(domains) > 1 else "CPU (RAPL)"
        self.identity = f"cpu of {_machine()}"
        try:
            self._ranges = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in domains}
            self._last = {zone: _microjoules(zone) for zone in domains}
        except PermissionError as error:
            raise EnergyUnavailableError(
                f"RAPL counters are readable by root alone: sudo chmod a+r {root}/intel-rapl:*/energy_uj"
            ) from error
        except (OSError, ValueError) as error:  # virtual machines show counters that cannot be read
            raise EnergyUnavailableError(f"the kernel's RAPL counters cannot be read: {error}") from error
        if min(self._ranges.values()) <= 0:
            raise EnergyUnavailableError("the kernel's RAPL counters have no range")
        self.longest_interval_seconds = min(self._ranges.values()) / 1e6 / _MOST_WATTS
        self._microjoules = 0

    def read_joules(self) -> float:
        """Return the joules since the meter was made."""
        for zone, last in self._last.items():
            try:
                now = _microjoules(zone)
            except (OSError, ValueError) as error:
                raise EnergyUnavailableError(f"{self.name} can no longer be read: {error}") from error
            self._microjoules += now - last + (self._ranges[zone] if now < last else 0)
            self._last[zone] = now
        return self._microjoules / 1e6


class ReplayedMeter:
    """A meter that gives recorded readings, one after the other.

    Args:
        readings: The joules since some moment, never falling.
        kind: The kind of hardware that they were recorded on.
        identity: A name of that hardware.

    Example:
        >>> meter = ReplayedMeter([10.0, 12.5])
        >>> meter.read_joules(), meter.read_joules()
        (10.0, 12.5)
    """

    longest_interval_seconds = math.inf

    def __init__(self, readings: Iterable[float], *, kind: EnergyKind = "gpu", identity: str = "replayed") -> None:
        self._readings = iter(readings)
        self.name = f"{kind} (replayed)"
        self.kind: EnergyKind = kind
        self.identity = identity

    def read_joules(self) -> float:
        """Return the next reading.

        Raises:
            EnergyUnavailableError: There are no more readings.
        """
        try:
            return float(next(self._readings))
        except StopIteration:
            raise EnergyUnavailableError("the recording is over") from None


def find_meters(device: torch.device) -> tuple[list[EnergyMeter], list[str]]:
    """Find the meters for a process that trains on a device; return them, and for each that is missing the reason."""
    meters: list[EnergyMeter] = []
    missing: list[str] = []
    if device.type == "cuda" and torch.version.hip is not None:
        missing.append("NVML measures NVIDIA's GPUs alone: pass EnergyMonitor(meters=[...]) for others")
    elif device.type == "cuda":
        try:
            meters.append(NvmlMeter.of(device))
        except Exception as error:  # a driver or its library may fail in any way
            missing.append(str(error))
    try:
        meters.append(RaplMeter())
    except Exception as error:
        missing.append(str(error))
    return meters, missing


def _machine() -> str:
    """Name the machine, alike for all processes and containers that one kernel runs."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _counts(zone: Path) -> bool:
    """Tell whether a RAPL zone is a package or memory: parts of a package, and the whole platform, are left out."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _microjoules(zone: Path) -> int:
    return int((zone / "energy_uj").read_text())
