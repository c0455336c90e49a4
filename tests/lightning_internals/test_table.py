"""Every private name that the package uses exists in the installed versions; one that is gone is named with its use."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torchmetrics
from lightning.fabric.utilities import data
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import CombinedLoader

from lightning_ast.lightning_internals.table import PRIVATE_NAMES, PrivateName
from tests.lightning_internals.missing_names import missing_names

NEWEST = "tests.lightning_internals.missing_names.version"


@pytest.fixture(scope="module")
def trainer() -> pl.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oldest Lightning's command line on a new jsonargparse
        import lightning.pytorch.cli  # noqa: F401
    return pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)


def test_no_name_is_gone(trainer: pl.Trainer) -> None:
    assert not (missing := missing_names(trainer)), "\n".join(missing)


GONE: dict[str, Callable[[pytest.MonkeyPatch, pl.Trainer], None]] = {
    "trainer.fit_loop._data_fetcher": lambda patch, t: patch.delattr(t.fit_loop, "_data_fetcher"),
    "trainer.fit_loop._should_accumulate": lambda patch, t: patch.delattr(_FitLoop, "_should_accumulate"),
    "trainer._logger_connector._logged_metrics": lambda patch, t: patch.delattr(t, "_logger_connector"),
    "lightning.fabric.utilities.data._set_sampler_epoch": lambda patch, t: patch.delattr(data, "_set_sampler_epoch"),
    "CombinedLoader._load_state_dicts": lambda patch, t: patch.delattr(CombinedLoader, "_load_state_dicts"),
    "CombinedLoader._mode": lambda patch, t: patch.delattr(CombinedLoader, "__init__"),
    "torchmetrics.MeanMetric._forward_cache": lambda patch, t: patch.setattr(torchmetrics, "MeanMetric", object),
}


@pytest.mark.parametrize("name", GONE)
def test_a_name_that_is_gone_is_told_with_its_use(
    name: str, trainer: pl.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    GONE[name](monkeypatch, trainer)
    (told,) = [sentence for sentence in missing_names(trainer) if f"{name}," in sentence]
    expected = next(entry for entry in PRIVATE_NAMES if f"{entry.owner}.{entry.name}".endswith(name))
    assert expected.why in told
    assert all(version in told for version in expected.checked)


def test_what_only_newer_versions_have_is_not_missed_in_older_ones(
    trainer: pl.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = PrivateName("trainer.fit_loop", "_not_yet", "do more", ("99.0",))
    assert missing_names(trainer, (future,)) == []
    monkeypatch.setattr(NEWEST, lambda package: "99.1")
    (told,) = missing_names(trainer, (future,))
    assert told.startswith("lightning 99.1 has no trainer.fit_loop._not_yet, which is used to do more.")


def test_no_name_is_listed_twice() -> None:
    assert len({(entry.owner, entry.name) for entry in PRIVATE_NAMES}) == len(PRIVATE_NAMES)
