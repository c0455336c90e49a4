"""The state of one fit in a checkpoint: what is saved, what is restored, and what a resumed run expects."""

from __future__ import annotations

import uuid
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_ast.core.ledger import Ledger
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.resuming import tells_resumption, written_within
from lightning_ast.mode_facts import MODE_FACTS, Mode
from lightning_ast.selection.modes.base import FitParts, SelectionMode
from lightning_ast.selection.quarantine import Quarantine
from lightning_ast.selection.saved_state import SELECTION_STATE
from lightning_ast.words import changes

__all__ = ["SessionState"]


class SessionState:
    """Saves and restores the parts of a fit."""

    def __init__(self, parts: FitParts, mode: SelectionMode, ledger: Ledger, quarantine: Quarantine) -> None:
        self._trainer = parts.trainer
        self._selector = parts.selector
        self._rule = parts.settings.rule
        self._owner = parts.owner
        self._mode = mode
        self._ledger = ledger
        self._quarantine = quarantine
        self._target = parts.target
        # A state that holds this text is this run's own. All processes have the same one: each compares its own with
        # that in the checkpoint, which rank 0 wrote.
        self._token = parts.trainer.strategy.broadcast(uuid.uuid4().hex)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: primitives and tensors alone; every process must ask for it."""
        state = {
            "fit": self._token,
            "rule": self._rule,
            "selector": self._selector.state_dict(),
            "ledger": self._ledger.state_dict(),
            "quarantine": self._quarantine.state_dict(),
            **self._mode.state_dict(),
            **({} if self._target is None else {"target": self._target.state_dict()}),
        }
        return SELECTION_STATE.stamped(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was written; what another mode, gate or score cannot use begins anew."""
        # A checkpoint that is loaded to validate, test or predict with changes nothing.
        if self._trainer.state.fn != TrainerFn.FITTING:
            return
        SELECTION_STATE.require(state, owner=self._owner.state_key)
        self._ledger.load_state_dict(state["ledger"])
        self._quarantine.load_state_dict(state["quarantine"])
        changed = changes({"target": "activation rate", **state["rule"]}, self._rule, repr)
        if changed:
            rank_zero_info(
                f"lightning-ast: resumed with other settings: {', '.join(changed)}. Books and place in the run go on; "
                "thresholds begin anew, and so does what is remembered of samples where the score is another."
            )
        self._selector.load_state_dict(state["selector"], controller=not changed)
        if self._target is not None and "target" in state and not changed:
            self._target.load_state_dict(state["target"])
        self._mode.load_state_dict(state)

    def expect_resume(self, checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
        """Prepare for a checkpoint that is being loaded, perhaps one without this callback."""
        if state != {} and self._trainer.state.fn == TrainerFn.FITTING:
            SELECTION_STATE.require(state, owner=self._owner.state_key)
        own = state.get("fit") == self._token and tells_resumption(self._trainer)
        if own or self._trainer.state.fn != TrainerFn.FITTING:  # a tuner's of this fit (older ones do resume); a test's
            return
        mode: Mode = state["rule"]["mode"] if state else self._mode.name
        own_mode = self._mode.name
        if (
            mode != own_mode
            and (MODE_FACTS[mode].plans_epochs or MODE_FACTS[own_mode].plans_epochs)
            and written_within(checkpoint)
        ):
            raise ConfigurationError(
                [
                    f"this checkpoint was written in the middle of an epoch in mode={mode!r}, and mode={own_mode!r} "
                    "cannot continue that epoch: use the same mode, or a checkpoint from an epoch's end."
                ]
            )
        self._mode.expect_resume()
