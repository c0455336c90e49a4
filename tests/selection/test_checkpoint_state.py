"""The callbacks' states in a checkpoint: read as a whole before anything is applied, and refused by the field's name."""

from __future__ import annotations

import copy
import gzip
import pickle
import re
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
from tests.selection.mutations import changed, paths, values
from tests.selection.saved import BATCH, BATCHES, EPOCHS, LANDED, MODES, SaveMidEpoch, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:.set_vital. is deprecated",
    "ignore:You're resuming",
    "ignore:.*NaN or",
    "ignore:lightning-ast. mode='subset' at an activation rate",  # the only layer needs no gradient of its input
)

LARGE = {"huge", "huge float", "enormous"}
REAL = {"-1", "1.5", "huge", "huge float"}
LEGAL: list[tuple[str, set[str]]] = [
    (r"version|.*validation_reloaded|.*\.feedforward|.*\.integral_limit|rule\.target|epochs\.(spread|steps|split\.(sample_filter|own_parts))", {"missing"}),
    (r".*\.held_ema|selector\.(coverage|expected_rate)|epochs\.sizes", {"missing", "none"}),
    (r".*\.dense_steps|epochs\.history\.is_foreign", {"missing"}),
    (r"epochs\.samples", {"missing", "none"}),
    (r"epochs\.samples\.labels", {"none"}),
    (r"epochs\.samples\.epochs", {"dict"}),
    (r"epochs\.samples\.times", {"values large"}),
    # what is not known, or has not begun
    (r".*\.(activation_rate_ema|threshold|level|flops|reloaded|validation_reloaded|plan|weights|cuda)", {"none"}),
    (r"selector\.activation_rate|.*(batch size|data set length)\.0|.*_joules|.*\.python\.2", {"none"}),
    (r"ledger\.stages\.\w+|epochs\.(drained|generators)\.0|progress\.(seconds|accuracies)\..*", {"missing"}),
    (r"epochs\.\d|running\.(book\.(joules|offered|meters)|sections)\..*|history\.(classes|thresholds)\.\d", {"missing"}),
    (r"epochs\.(drained|generators)|epochs|progress\.seconds\.\w+|running\.book\.meters", {"list"}),
    (r"running|running\.(sections|book\.(joules|offered))|progress\.(seconds|accuracies)", {"dict"}),
    (r"history\.(classes|thresholds)", {"dict"}),
    # another value of the same meaning
    (r"fit|running\.book\.meters\.0", {"text"}),
    (r".*\.feedforward", {"true"}),
    (r".*\.(forward|backward|joules|\w+_seconds|\w+_joules|running|monitoring)", {"1.5"}),
    (r"progress\.seconds\..*|running\.(sections|seconds)\..*|progress\.before\.[123]", {"1.5"}),
    (r".*\.integral", {"-1", "1.5"}),
    (r".*\.other_seconds", {"-1", "1.5"}),
    (r".*\.integral_limit", {"infinity", "1.5", *LARGE}),
    (r".*\.(numpy\.4|python\.2)|progress\.accuracies\..*", REAL),
    (r"progress\.loss_sum", {"nan", "infinity", "1.5", "huge float"}),
    (r"running\.book\.joules\..*", {"nan", "1.5"}),
    (r".*\.(threshold|level|scores|recent|weights|worth|offered|numpy\.1)|history\.thresholds\.1", {"values large"}),
    (r".*\.level", {"values -2"}),  # a logarithm
    (r".*\.cuda", {"bytes"}),  # not looked at where there is no such device
    (r"history\.(classes|thresholds)\.1", {"values nan"}),
    (r"history\.classes\.1", {"tensor", "one more"}),
]  # fmt: skip


def named(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def is_legal(path: tuple[Any, ...], name: str, value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() == 0:
        return name in ("one more", "values -2", "values large", "values nan", "values -inf")  # tables of no samples
    return any(re.fullmatch(pattern, named(path)) and name in names for pattern, names in LEGAL)


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


def refusal(callback: Any, state: Any) -> CheckpointError | None:
    try:
        callback.load_state_dict(state)
    except CheckpointError as error:
        return error
    return None


def assert_names(error: CheckpointError, path: tuple[Any, ...], what: str) -> None:
    """Each fault says what was expected and found; one is of the field, of one beside it, or speaks of its part."""
    assert all(re.search(r": expected .+(, got |missing)", fault) for fault in error.faults), what
    spelled = [re.sub(r"\[(\d+)\]", r".\1", fault) for fault in error.faults]
    beside = named(path[: -2 if isinstance(path[-1], int) else -1])
    assert any(f.startswith((named(path), beside)) or f"the {path[0]}'s" in f for f in spelled), (what, error.faults)


@pytest.mark.parametrize("run", ["partial", "prune", "original"], indirect=True)
def test_every_change_of_a_field_is_refused_by_name_or_legal(run: Any) -> None:
    callbacks, checkpoint, _ = run
    refused: set[str] = set()
    for callback in callbacks:
        state = checkpoint["callbacks"][callback.state_key]
        callback.load_state_dict(state)
        before = frozen(callback.state_dict())
        for path, value in paths(state):
            for name, new in values(value):
                what = f"{type(callback).__name__}: {named(path)} {name}"
                legal = is_legal(path, name, value)
                if legal:  # it will be applied: compare before what was refused so far
                    assert frozen(callback.state_dict()) == before, f"half-applied before {what}"
                error = refusal(callback, changed(state, path, new))
                if error is None:
                    assert legal, f"{what} was accepted"
                    callback.load_state_dict(state)
                    continue
                assert_names(error, path, what)
                refused.add(name)
        assert frozen(callback.state_dict()) == before, f"half-applied: {type(callback).__name__}"
    assert refused >= {"missing", "nan", "-1", "1.5", "huge", "text", "shape", "one more"}


def test_a_threshold_is_not_negative(run: Any) -> None:
    """Without feed-forward the level is the threshold itself; with it, its logarithm."""
    callbacks, checkpoint, _ = run
    state = checkpoint["callbacks"][callbacks[0].state_key]
    level = ("selector", "controller", "level")
    error = refusal(callbacks[0], changed(state, level, torch.tensor(-2.0)))
    assert (error is None) == state["selector"]["controller"]["feedforward"]


def test_a_key_that_a_later_release_adds_is_ignored(run: Any) -> None:
    callbacks, checkpoint, _ = run
    tables = r"epochs\.samples\.epochs|ledger\.stages|progress\.(accuracies|seconds)|history\.(classes|thresholds)|running\.(sections|book\..*)"
    for callback in callbacks:
        state = checkpoint["callbacks"][callback.state_key]
        callback.load_state_dict(state)
        before = frozen(callback.state_dict())
        added = copy.deepcopy(state)
        for path, value in [((), added), *paths(added)]:
            if isinstance(value, dict) and not re.fullmatch(tables, named(path)):
                value["added later"] = 1
        callback.load_state_dict(added)
        assert frozen(known(callback.state_dict())) == before


def test_a_later_version_is_refused(run: Any) -> None:
    callbacks, checkpoint, _ = run
    for callback in callbacks:
        state = {**checkpoint["callbacks"][callback.state_key], "version": 2}
        with pytest.raises(CheckpointError, match="version: expected at most 1, got 2; a later release") as error:
            callback.load_state_dict(state)
        assert len(error.value.faults) == 1
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize(
    ("position", "field", "value", "fault"),
    [
        (0, ("ledger", "stages", "sparse", "selected"), -3, "selected: expected an int >= 0, got -3"),
        (0, ("rule", "mode"), None, r"rule.mode: expected one of 'mask'.* got None"),
        (1, ("progress", "before"), [0.0], r"progress.before: expected a list of 4, got a list of 1"),
        (2, ("running", "seconds"), None, "running.seconds: expected a list of 2, got None"),
    ],
)
def test_a_fit_from_a_damaged_checkpoint(run: Any, position: int, field: Any, value: Any, fault: str) -> None:
    """One error; the module and the Trainer are the user's again."""
    callbacks, checkpoint, path = run
    key, mode = callbacks[position].state_key, callbacks[0].mode
    damaged = path.with_name("damaged.ckpt")
    torch.save(changed(checkpoint, ("callbacks", key, *field), value), damaged)
    own: list[Any] = []

    class Keep(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            own.extend([trainer, pl_module])

    with pytest.raises(CheckpointError, match=fault) as error:
        train(mode, path.parent, Keep(), ckpt_path=damaged)
    assert error.value.owner == key
    trainer, module = own
    assert "training_step" not in vars(module)
    assert type(trainer.fit_loop).__module__.startswith("lightning.")


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_damaged_checkpoint_can_be_tested(run: Any) -> None:
    """To test a model nothing of the selection is read."""
    callbacks, checkpoint, path = run
    damaged = path.with_name("damaged.ckpt")
    key = ("callbacks", "SparseSelectionCallback")
    torch.save(changed(checkpoint, key, {"ledger": 5}), damaged)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 6), torch.ones(4).long()))
    module = OneLayer()
    quiet_trainer(callbacks=[SparseSelectionCallback(mode=callbacks[0].mode)]).validate(
        module, loader, ckpt_path=damaged, verbose=False
    )


def test_all_faults_are_named_together(run: Any) -> None:
    callbacks, checkpoint, _ = run
    state = copy.deepcopy(checkpoint["callbacks"][callbacks[0].state_key])
    state["selector"]["steps"] = -1
    del state["quarantine"]["count"]
    state["ledger"]["stages"]["warmup"]["offered"] = float("nan")
    with pytest.raises(CheckpointError) as error:
        callbacks[0].load_state_dict(state)
    assert [fault.split(":")[0] for fault in error.value.faults] == [
        "selector.steps",
        "ledger.stages.warmup.offered",
        "quarantine.count",
    ]
    assert "remove 'SparseSelectionCallback' from the checkpoint's 'callbacks'" in str(error.value)
    with pytest.raises(CheckpointError, match=r"the state: expected a dict, got a list of 1"):
        callbacks[0].load_state_dict([1])


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
