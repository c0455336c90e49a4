"""The callbacks' states in a checkpoint: those of earlier and later releases, and those that cannot be read."""

from __future__ import annotations

import copy
import gzip
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_ast import CheckpointError, SparseSelectionCallback
from tests.helpers.logs import Meter
from tests.helpers.modules import OneLayer
from tests.helpers.training import quiet_trainer
from tests.selection.saved import BATCH, BATCHES, EPOCHS, LANDED, MODES, SaveMidEpoch, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:.set_vital. is deprecated",
    "ignore:You're resuming",
    "ignore:.*NaN or",
    "ignore:lightning-ast. mode='subset' at an activation rate",  # the only layer needs no gradient of its input
)


def frozen(value: Any) -> Any:
    """A state that can be compared, NaN included."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(part) for key, part in value.items()}
    return [frozen(part) for part in value] if isinstance(value, (list, tuple)) else repr(value)


def known(value: Any) -> Any:
    """A state without what a later release has added."""
    if isinstance(value, dict):
        return {key: known(part) for key, part in value.items() if key != "added later"}
    return [known(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module", params=[*MODES, "original"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[pl.Callback], dict[str, Any], Path]:
    """The callbacks behind a run, and a checkpoint from its midst."""
    folder, original = tmp_path_factory.mktemp("run"), request.param == "original"
    mode = "partial" if original else request.param
    callbacks = train(mode, folder, SaveMidEpoch(folder / "run.ckpt"), original=original)
    return callbacks, torch.load(folder / "run.ckpt", weights_only=True), folder / "run.ckpt"


TABLES = {"stages", "accuracies", "seconds", "classes", "thresholds", "sections", "joules", "offered"}
"""Their keys are data: stages, epochs, meters."""


def with_more(state: Any) -> Any:
    """A state as a later release might write it, with a further key in each of its parts."""
    if not isinstance(state, dict):
        return [with_more(part) for part in state] if isinstance(state, list) else state
    more = {key: value if key in TABLES else with_more(value) for key, value in state.items()}
    return {**more, "added later": 1} if all(isinstance(key, str) for key in state) else more


def test_a_key_that_a_later_release_adds_is_ignored(run: Any) -> None:
    callbacks, checkpoint, _ = run
    for callback in callbacks:
        state = checkpoint["callbacks"][callback.state_key]
        callback.load_state_dict(state)
        before = frozen(callback.state_dict())
        callback.load_state_dict(with_more(state))
        assert frozen(known(callback.state_dict())) == before


@pytest.mark.parametrize(
    ("position", "change", "fault"),
    [
        (0, {"version": 2}, "a later release of lightning-ast wrote it: update lightning-ast"),
        (1, {"version": 2}, "a later release of lightning-ast wrote it"),
        (2, {"version": 2}, "a later release of lightning-ast wrote it"),
        (0, {"rule": None}, "damaged, or not one of lightning-ast's .TypeError: "),
        (0, {"ledger": {}}, "damaged, or not one of lightning-ast's .KeyError: 'flops'"),
        (1, {"progress": {}}, "damaged, or not one of lightning-ast's .KeyError: 'accuracies'"),
        (2, {"epochs": 3}, "damaged, or not one of lightning-ast's .TypeError: "),
    ],
)
def test_a_fit_from_a_checkpoint_that_cannot_be_read(run: Any, position: int, change: Any, fault: str) -> None:
    """One error; the module and the Trainer are the user's again."""
    callbacks, checkpoint, path = run
    key = callbacks[position].state_key
    mode = callbacks[0].mode
    damaged = copy.deepcopy(checkpoint)
    damaged["callbacks"][key] |= change
    torch.save(damaged, path.with_name("damaged.ckpt"))
    own: list[Any] = []

    class Keep(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            own.extend([trainer, pl_module])

    with pytest.raises(CheckpointError, match=fault) as error:
        train(mode, path.parent, Keep(), ckpt_path=path.with_name("damaged.ckpt"))
    assert error.value.owner == key
    trainer, module = own
    assert "training_step" not in vars(module)
    assert type(trainer.fit_loop).__module__.startswith("lightning.")


def test_a_state_without_its_place_in_the_run_is_refused(run: Any) -> None:
    callbacks, checkpoint, path = run
    part = "epochs" if callbacks[0].mode == "prune" else "resumption"
    damaged = copy.deepcopy(checkpoint)
    del damaged["callbacks"][callbacks[0].state_key][part]
    torch.save(damaged, path.with_name("lacking.ckpt"))
    with pytest.raises(CheckpointError, match=f"KeyError: '{part}'"):
        train(callbacks[0].mode, path.parent, ckpt_path=path.with_name("lacking.ckpt"))


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_damaged_checkpoint_can_be_tested(run: Any) -> None:
    """To test a model nothing of the selection is read."""
    callbacks, checkpoint, path = run
    damaged = path.with_name("damaged.ckpt")
    states = {**checkpoint["callbacks"], "SparseSelectionCallback": {"ledger": 5}}
    torch.save({**checkpoint, "callbacks": states}, damaged)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 6), torch.ones(4).long()))
    module = OneLayer()
    quiet_trainer(callbacks=[SparseSelectionCallback(mode=callbacks[0].mode)]).validate(
        module, loader, ckpt_path=damaged, verbose=False
    )


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_of_the_first_release_are_resumed(tmp_path: Path, mode: str) -> None:
    """They have no version, and lack the keys that were added since."""
    with gzip.open(LANDED) as file:
        checkpoint = torch.load(file, weights_only=True)[mode]
    states = checkpoint["callbacks"]
    assert all("version" not in state for state in states.values())
    path = tmp_path / "landed.ckpt"
    torch.save(checkpoint, path)
    selection, monitor, energy = train(mode, tmp_path, ckpt_path=path)
    then = states["SparseSelectionCallback"]["ledger"]["stages"]
    assert then["warmup"].items() <= selection.state_dict()["ledger"]["stages"]["warmup"].items()
    done = sum(totals["offered"] for totals in then.values())
    assert 0 < done < selection.ledger.offered <= BATCH * BATCHES * EPOCHS
    assert [costs.epoch for costs in energy.epochs] == list(range(EPOCHS))
    assert sorted(monitor.state_dict()["progress"]["accuracies"]) == list(range(EPOCHS))
    assert selection.state_dict()["version"] == 1


def test_a_counter_that_begins_anew_is_not_a_negative_cost(tmp_path: Path) -> None:
    """What was drawn then is not known; the checkpoint can be resumed."""

    class Restarting(Meter):
        def read_joules(self) -> float:
            return super().read_joules() if self.joules < 4 else -super().read_joules()

    with pytest.warns(UserWarning, match=r"energy is no longer measured: a meter fell from .* to -"):
        energy = train("partial", tmp_path, SaveMidEpoch(tmp_path / "run.ckpt"), meter=Restarting())[2]
    assert None in [costs.gpu_joules for costs in energy.epochs]
    assert all(costs.gpu_joules is None or costs.gpu_joules >= 0 for costs in energy.epochs)
    train("partial", tmp_path, ckpt_path=tmp_path / "run.ckpt")


def test_a_checkpoint_without_the_selections_state(tmp_path: Path) -> None:
    """The ledger begins anew: energy of samples that are not in it is no saving of its own."""
    path = tmp_path / "run.ckpt"
    train("partial", tmp_path, SaveMidEpoch(path))
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["SparseSelectionCallback"]
    torch.save(checkpoint, path)
    selection, _, energy = train("partial", tmp_path, SaveMidEpoch(tmp_path / "again.ckpt"), ckpt_path=path)
    assert selection.savings["joules"] is None
    assert all(totals.joules_offered <= totals.offered for totals in selection.ledger.stages.values())
    assert len(energy.epochs) == EPOCHS
