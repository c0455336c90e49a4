"""What is wrong with what is asked for single samples."""

from __future__ import annotations

from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.selection.value_faults import is_number, percent_hint

__all__ = ["sample_faults"]


def sample_faults(settings: SelectionSettings) -> list[str]:
    """List the faults of the settings of samples, each with what to do."""
    found = []
    keeps: object = settings.samples.keep_scores
    if not (isinstance(keeps, int) and not isinstance(keeps, bool) and keeps >= 0):
        found.append(f"keep_scores: expected a number of epochs, an int >= 0, got {keeps!r}.")
    floor: object = settings.samples.class_floor
    if not (is_number(floor) and 0 <= floor < 1):
        found.append(f"class_floor: expected a share of each class in [0, 1), got {floor!r}.{percent_hint(floor)}")
    elif is_number(settings.target_activation_rate) and floor > settings.target_activation_rate > 0:
        found.append(
            f"class_floor={floor:g} keeps more of each class than target_activation_rate="
            f"{settings.target_activation_rate:g} keeps of all samples: give a smaller floor."
        )
    for name in ("always", "never"):
        if getattr(settings.samples, name) is not None and settings.mode != "prune":
            found.append(
                f"{name} names samples by their dataset index, which mode={settings.mode!r} does not know: use "
                "mode='prune'."
            )
    return found
