"""The costs of a run: meters of joules, and the seconds and joules of its epochs."""

from lightning_ast.energy.meters import EnergyKind, EnergyMeter, NvmlMeter, RaplMeter, ReplayedMeter, find_meters
from lightning_ast.errors import EnergyUnavailableError

__all__ = [
    "EnergyKind",
    "EnergyMeter",
    "EnergyUnavailableError",
    "NvmlMeter",
    "RaplMeter",
    "ReplayedMeter",
    "find_meters",
]
