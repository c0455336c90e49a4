"""Choosing what the fit loop fetches its batches from, and hearing of each epoch before every callback does."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import CombinedLoader

from lightning_ast.lightning_internals.class_patch import change_class

__all__ = ["lead"]


_Load = Callable[[CombinedLoader], CombinedLoader]
_Begin = Callable[[int], None]
_led: WeakKeyDictionary[_FitLoop, tuple[list[tuple[_Load, _Begin]], Callable[[], None]]] = WeakKeyDictionary()
"""By loop: those that lead it, the first one first, and what puts its class back."""


def lead(loop: _FitLoop, *, load: _Load, begin: _Begin) -> Callable[[], None]:
    """Choose what the fit loop fetches its batches from, and hear of each epoch before every callback does.

    Several may lead a loop: each fetches from what those before it made, and they may be undone in any order, each by
    the function that is returned.

    Args:
        loop: The fit loop of the trainer.
        load: Takes the user's loaders whenever they are set up, and returns those to fetch from.
        begin: Gets the number of the epoch that is about to run, when its loaders are set up.
    """
    if loop not in _led:
        leaders: list[tuple[_Load, _Begin]] = []
        _led[loop] = leaders, _follow(loop, leaders)
    leaders, put_back = _led[loop]
    leader = load, begin
    leaders.append(leader)

    def undo() -> None:
        leaders.remove(leader)
        if not leaders:
            put_back()
            del _led[loop]

    return undo


def _follow(loop: _FitLoop, leaders: list[tuple[_Load, _Begin]]) -> Callable[[], None]:
    """Give the loop a class that asks the leaders; return what takes it away again."""
    own = type(loop)

    # Lightning gives its data fetcher the user's loaders after the samplers are final and before an index is drawn or a
    # worker runs. Only what the fetcher gets is replaced: `trainer.train_dataloader` stays the user's, and may be read
    # at any time.
    def fetcher(self: _FitLoop) -> _DataFetcher | None:
        found: _DataFetcher | None = self.__dict__["_data_fetcher"]
        return found

    def set_fetcher(self: _FitLoop, value: _DataFetcher | None) -> None:
        last = self.__dict__["_data_fetcher"]
        self.__dict__["_data_fetcher"] = value
        if value is not None:
            value.setup = lambda combined: set_up(value, last, combined)  # type: ignore[method-assign, assignment]

    def set_up(fetcher: _DataFetcher, last: _DataFetcher | None, loaded: CombinedLoader) -> None:
        del fetcher.setup  # the fetcher has Lightning's own method again
        for load, _ in leaders:
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
        for _, begin in leaders:
            begin(epoch)
        own.on_advance_start(self)

    return change_class(loop, {"_data_fetcher": property(fetcher, set_fetcher), "on_advance_start": on_advance_start})
