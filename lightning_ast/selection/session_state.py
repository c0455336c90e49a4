"""The state of one fit in a checkpoint: what is saved, what is restored, and what a resumed run expects."""

from __future__ import annotations

import uuid
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_ast.core.state import reading, stamped
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.resuming import tells_resumption, written_within
from lightning_ast.mode_facts import MODE_FACTS, Mode
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.modes.base import SelectionMode
from lightning_ast.words import changes

__all__ = ["SessionState"]


class SessionState:
    """Saves and restores the parts of a fit."""

    def __init__(self, parts: FitParts, mode: SelectionMode) -> None:
        self._parts = parts
        self._mode = mode
        # A state that holds this text is this run's own. All processes have the same one: each compares its own with
        # that in the checkpoint, which rank 0 wrote.
        self._token = parts.trainer.strategy.broadcast(uuid.uuid4().hex)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: primitives and tensors alone; every process must ask for it."""
        target = self._parts.target
        return stamped(
            {
                "fit": self._token,
                "rule": self._parts.settings.rule,
                "selector": self._parts.selector.state_dict(),
                "ledger": self._parts.ledger.state_dict(),
                "quarantine": self._parts.quarantine.state_dict(),
                **self._mode.state_dict(),
                **({} if target is None else {"target": target.state_dict()}),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was written; what another mode, gate or score cannot use begins anew."""
        if self._parts.trainer.state.fn != TrainerFn.FITTING:  # it was loaded to validate, test or predict with
            return
        with reading(state, owner=self._parts.owner.state_key):
            self._parts.ledger.load_state_dict(state["ledger"])
            self._parts.quarantine.load_state_dict(state["quarantine"])
            changed = changes({"target": "activation rate", **state["rule"]}, self._parts.settings.rule, repr)
            if changed:
                rank_zero_info(
                    f"lightning-ast: resumed with other settings: {', '.join(changed)}. Books and place in the run go "
                    "on; thresholds begin anew, and so does what is remembered of samples where the score is another."
                )
            self._parts.selector.load_state_dict(state["selector"], controller=not changed)
            if self._parts.target is not None and "target" in state and not changed:
                self._parts.target.load_state_dict(state["target"])
            self._mode.load_state_dict(state)

    def expect_resume(self, checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
        """Prepare for a checkpoint that is being loaded, perhaps one without this callback."""
        if self._parts.trainer.state.fn != TrainerFn.FITTING:
            return
        own = self._mode.name
        with reading(state, owner=self._parts.owner.state_key):
            # A tuner puts a state of this very fit back, which resumes nothing; older Lightnings do not tell.
            if state.get("fit") == self._token and tells_resumption(self._parts.trainer):
                return
            mode: Mode = state["rule"]["mode"] if state else own
            place = "epochs" if MODE_FACTS[mode].plans_epochs else "resumption"
            if state and place not in state:
                raise KeyError(place)
        plans = MODE_FACTS[mode].plans_epochs or MODE_FACTS[own].plans_epochs
        if mode != own and plans and written_within(checkpoint):
            raise ConfigurationError(
                f"this checkpoint was written in the middle of an epoch in mode={mode!r}, and mode={own!r} "
                "cannot continue that epoch: use the same mode, or a checkpoint from an epoch's end."
            )
        self._mode.expect_resume()
