"""Text for the person at the terminal, which must not break a progress bar."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tqdm.auto import tqdm

__all__ = ["say"]


def say(trainer: pl.Trainer, text: str) -> None:
    """Print a text above the progress bar, or as it is where there is none."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        bar.progress.console.print(text, soft_wrap=True, markup=False, highlight=False)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        tqdm.write(text)  # works behind the bars' end too
    else:
        print(text)  # noqa: T201 - the terminal is what this callback is for
