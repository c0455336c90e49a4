"""A Trainer, module and data that stand in for the user's: probes run on them, and the user's stay as they are."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_ast.errors import AdviceError
from lightning_ast.lightning_internals.leading import copied_loader, copy_combined
from lightning_ast.lightning_internals.random_state import kept_random_state
from lightning_ast.lightning_internals.trainer_copy import copied_trainer
from lightning_ast.pruning.loader import loader_generators

__all__ = ["Twin", "make_twin", "out_of_sight"]

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


@dataclass
class Twin:
    """Copies to measure on."""

    trainer: pl.Trainer  # with the settings of the user's, but none of its callbacks, loggers, profiler and progress
    module: pl.LightningModule
    data: dict[str, Any]  # the arguments of ``trainer.fit``
    # that the user's loaders draw from, and the states to put them back to: copied loaders share them
    generators: list[tuple[Any, torch.Tensor]] = field(default_factory=list)


class _StandInLogger(DummyLogger):
    """A logger that writes nothing; what a module writes beside it goes to a folder that is removed."""

    folder = ""

    @property
    def save_dir(self) -> str:
        return self.folder  # ``trainer.log_dir`` is it too

    log_dir = root_dir = save_dir


def make_twin(trainer: pl.Trainer, module: pl.LightningModule, data: Any, val_data: Any) -> Twin:
    """Copy what a fit would change: not the datasets, which may fill the memory."""
    try:
        module_twin = copy.deepcopy(module)
        trainer_twin = copied_trainer(trainer, module_twin, _StandInLogger)
    except Exception as error:
        raise AdviceError(
            f"the Trainer or the module cannot be copied ({type(error).__name__}: {error}), and advise measures on "
            "copies: keep what cannot be copied (open files, locks, non-leaf tensors) out of both until fit."
        ) from error
    trainer_twin.should_stop = False
    trainer_twin.num_sanity_val_steps = 0
    trainer_twin.accumulate_grad_batches = 1  # its share of the optimizer is reckoned
    module_twin.__dict__["configure_callbacks"] = list  # ModelCheckpoint and the like: they would write files
    twin = Twin(trainer_twin, module_twin, {})
    if isinstance(data, pl.LightningDataModule):
        twin.data["datamodule"] = datamodule = copy.copy(data)
        _detach_loaders(datamodule, twin)
    elif data is not None:
        twin.data["train_dataloaders"] = _detached(data, twin)
    if val_data is not None:
        twin.data["val_dataloaders"] = _detached(val_data, twin)
    _detach_loaders(module_twin, twin)
    return twin


def _detach_loaders(owner: Any, twin: Twin) -> None:
    """Let the loaders that a module or datamodule makes be copies too."""
    # Lightning asks the instance for them, but takes a hook that its class does not override for no hook at all
    parent = pl.LightningDataModule if isinstance(owner, pl.LightningDataModule) else pl.LightningModule
    for name in ("train_dataloader", "val_dataloader"):
        if is_overridden(name, owner, parent=parent):
            own = getattr(owner, name)
            owner.__dict__[name] = functools.wraps(own)(lambda own=own: _detached(own(), twin))


def _detached(loaders: Any, twin: Twin) -> Any:
    """Copy loaders, in whatever collection they come."""
    if isinstance(loaders, CombinedLoader):
        return copy_combined(loaders, [_detached_loader(loader, twin) for loader in loaders.flattened])
    return tree_map(lambda loader: _detached_loader(loader, twin), loaders)


def _detached_loader(loader: Any, twin: Twin) -> Any:
    if not isinstance(loader, DataLoader):
        if hasattr(loader, "__next__"):
            raise AdviceError(
                f"the data is an iterator ({type(loader).__name__}), which can be read only once: pass a DataLoader "
                "or another collection of batches."
            )
        return loader
    # The copy shares dataset and sampler, but no iterator and no workers; what iterates itself is copied too.
    known = {id(generator) for generator, _ in twin.generators}
    twin.generators += [(g, g.get_state()) for g in loader_generators(loader) if id(g) not in known]
    dataset = copy.deepcopy(loader.dataset) if isinstance(loader.dataset, IterableDataset) else loader.dataset
    return copied_loader(loader, dataset=dataset)


@contextmanager
def out_of_sight(twin: Twin) -> Iterator[None]:
    """Measure without a trace: random states are put back, and warnings and logs are silent meanwhile."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        with kept_random_state(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            for logger in twin.trainer.loggers:
                logger.folder = folder  # type: ignore[attr-defined]
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for generator, state in twin.generators:
            generator.set_state(state)
