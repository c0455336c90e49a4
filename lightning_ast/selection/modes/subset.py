"""Mode ``subset``: the user's training step on the selected samples in place of the whole batch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_ast.errors import BatchError
from lightning_ast.lightning_internals.method_wrapper import method_of
from lightning_ast.selection.step_state import BatchPlan
from lightning_ast.words import counted

__all__ = ["SubsetStep"]

_MISSING = object()


class SubsetStep:
    """Wraps a module's training step for the length of a fit.

    Args:
        module: The LightningModule.

    Attributes:
        training_step: The module's own.
        plan: The plan of the running batch, or None.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._replaced: Any = _MISSING
        self._installed = False
        self._sliced = False
        self.training_step = module.training_step
        self.plan: BatchPlan | None = None

    def install(self) -> None:
        """Put the wrapper on the instance."""
        self._replaced = self._module.__dict__.get("training_step", _MISSING)
        method = method_of(self._module, "training_step", self.training_step, self._run)
        self._module.__dict__["training_step"] = method
        self._installed = True

    def remove(self) -> None:
        """Take the wrapper off; the instance is as it was. Safe to call twice."""
        if self._installed:
            del self._module.__dict__["training_step"]
            if self._replaced is not _MISSING:
                self._module.__dict__["training_step"] = self._replaced
        self._installed = False
        self.plan = None

    def _run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.plan
        if plan is None or plan.sub_batch is None:
            return self.training_step(batch, *args, **kwargs)
        try:
            output = self.training_step(plan.sub_batch, *args, **kwargs)
        except Exception as error:
            if self._sliced:
                raise
            raise BatchError(
                f"training_step failed on the {counted(plan.forwarded, 'selected sample')} alone "
                f"({type(error).__name__}: {error}): perhaps it keeps a state of the full batch's size (the hidden "
                "state of a recurrent layer), or the batch is not sliced as a whole. Use mode='partial', or override "
                "SparseLossMixin.select_batch."
            ) from error
        self._sliced = True
        return output
