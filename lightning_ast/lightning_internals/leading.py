"""What the fit loop fetches its batches from: the user's loaders, and others that take their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.combined_loader import _SUPPORTED_MODES
from torch.utils.data import DataLoader

from lightning_ast.lightning_internals.class_patch import change_class

__all__ = ["StandInLoader", "copied_loader", "copy_combined", "dealt_sampler", "lead", "make_iterator", "same_mode"]


_Load = Callable[[CombinedLoader], CombinedLoader]
_Begin = Callable[[int], None]
_Leaders = list[tuple[_Load, _Begin, bool]]


def lead(loop: _FitLoop, *, load: _Load, begin: _Begin, keeps_place: bool = False) -> Callable[[], None]:
    """Choose what the fit loop fetches its batches from, and hear of each epoch before every callback does.

    ``load`` takes the user's loaders whenever they are set up, and returns those to fetch from. ``begin`` gets the
    number of the epoch that is about to run, when its loaders are set up. A leader that ``keeps_place`` saves and
    restores the place in the epoch, in place of loaders that do so.

    Several may lead a loop: each fetches from what those before it made, and they may be undone in any order, each by
    the function that is returned.
    """
    if not hasattr(type(loop), "leaders"):
        _follow(loop, [])
    led: Any = type(loop)
    leader = load, begin, keeps_place
    led.leaders.append(leader)

    def undo() -> None:
        led.leaders.remove(leader)
        if not led.leaders:
            loop.__class__ = led.__base__

    return undo


def _follow(loop: _FitLoop, leaders: _Leaders) -> None:
    """Give the loop a class that asks the leaders, which it holds: copies of the loop have none."""
    own = type(loop)

    # Lightning gives its data fetcher the user's loaders after the samplers are final and before an index is drawn or a
    # worker runs. Only what the fetcher gets is replaced: `trainer.train_dataloader` stays the user's, and may be read
    # at any time.
    def set_fetcher(self: _FitLoop, value: _DataFetcher | None) -> None:
        last = self.__dict__["_data_fetcher"]
        self.__dict__["_data_fetcher"] = value
        if value is not None:
            value.setup = lambda combined: set_up(value, last, combined)  # type: ignore[method-assign, assignment]

    def set_up(fetcher: _DataFetcher, last: _DataFetcher | None, loaded: CombinedLoader) -> None:
        del fetcher.setup  # the fetcher has Lightning's own method again
        for load, _, _ in leaders:
            loaded = load(loaded)
        if last is not None and last._combined_loader is not loaded:
            # Else its workers would live until they are collected as garbage, perhaps in another worker process.
            last.combined_loader.reset()
            last.iterator = None
        fetcher.setup(loaded)

    def on_advance_start(self: _FitLoop) -> None:
        # Lightning's own method does these two steps and then calls on_train_epoch_start of each callback. The leaders
        # come between: the plan of an epoch has to stand before any callback asks for its length. What is done here,
        # such as a reload, Lightning then finds done.
        self.setup_data()
        assert self._combined_loader is not None
        epoch = self.epoch_progress.current.processed  # type: ignore[attr-defined]
        for loader in self._combined_loader.flattened:
            _set_sampler_epoch(loader, epoch)
        for _, begin, _ in leaders:
            begin(epoch)
        own.on_advance_start(self)

    fetcher = property(lambda loop: loop.__dict__["_data_fetcher"], set_fetcher)
    parts = {"_data_fetcher": fetcher, "on_advance_start": on_advance_start, **_placeless(own, leaders)}
    change_class(loop, {"leaders": leaders, **parts})


def _placeless(own: type[_FitLoop], leaders: _Leaders) -> dict[str, Any]:
    """Make methods that leave the state of the loaders out of checkpoints where a leader keeps the place itself."""

    def keeps_place() -> bool:
        return any(keeps for _, _, keeps in leaders)

    # Lightning asks the user's loader, which does not run in this fit: it would start its workers to answer.
    def on_save_checkpoint(self: _FitLoop) -> dict[str, Any]:
        combined = self._combined_loader
        if keeps_place():
            self._combined_loader = None
        try:
            return own.on_save_checkpoint(self)
        finally:
            self._combined_loader = combined

    def load_states(self: _FitLoop) -> None:
        if keeps_place():
            self._combined_loader_states_to_load = []
        own._load_combined_loader_states(self)

    return {"on_save_checkpoint": on_save_checkpoint, "_load_combined_loader_states": load_states}


def copied_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Copy a DataLoader without its iterator and workers, with attributes that it refuses to be assigned."""
    copied = copy.copy(loader)
    # torchdata's StatefulDataLoader keeps a place to go on from, which is the user's loader's
    place = {"next_iter_state": None, "_initial_iter_for_state_dict": False}
    fresh = {name: value for name, value in place.items() if name in vars(loader)}
    copied.__dict__.update(_iterator=None, **fresh, **changes)
    return copied


def dealt_sampler(sampler: Any) -> Any:
    """Return the user's sampler that Lightning's ``DistributedSamplerWrapper`` deals out; None for any other one."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)


def copy_combined(given: CombinedLoader, loaders: list[Any]) -> CombinedLoader:
    """Copy what combines loaders, to combine others in the same way; it has no iterator."""
    copied = copy.copy(given)
    copied._iterator = None
    copied.flattened = loaders
    return copied


def same_mode(given: CombinedLoader) -> Any:
    """Return the mode in which the loaders are combined, for another CombinedLoader."""
    return given._mode


class StandInLoader(CombinedLoader):
    """Loaders in the place of the user's, which are left alone with all that they hold."""

    def __init__(self, given: CombinedLoader, loaders: list[Any]) -> None:
        # `trainer.train_dataloader` gives what is passed here: the user's own loader.
        super().__init__(given.iterables, same_mode(given))
        self.given = given
        self.flattened = loaders

    def __iter__(self) -> StandInLoader:
        """Start the loaders, and lend their iterator to the user's, which Lightning asks for the length of an epoch."""
        super().__iter__()
        self.given._iterator = self._iterator
        return self

    def reset(self) -> None:
        """Stop the workers."""
        super().reset()
        self.given._iterator = None


def make_iterator(given: CombinedLoader) -> None:
    """Give the user's loader an iterator that is not started; it tells the length of an epoch."""
    kind: Any = _SUPPORTED_MODES[given._mode]["iterator"]
    given._iterator = kind(given.flattened, given.limits)
