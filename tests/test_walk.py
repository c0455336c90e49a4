"""The way of a batch: a real one is followed through the files, and compared with what docs/architecture.md lists."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import pytest

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.mode_facts import Mode
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer

ROOT = Path(__file__).parent.parent
PACKAGE = f"{ROOT / 'lightning_ast'}/"
MODES = get_args(Mode)
HELPERS = (
    "core/(batch/|partial/|losses/|dependence/records|entries/(layout|node_facts))|lightning_internals/"
    "|(schedule|mode_facts|mixin)\\.py"
)
"""What the page says that it leaves out."""
SPARSE_STEP = 14  # the warmup has 9 steps; the batches before this one are those that are traced and counted


def documented(mode: str) -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    part = text.split(f"<!-- walk: {'partial' if mode == 'mask' else mode} -->")[1].split("<!-- walk")[0]
    files = re.findall(r"^\d+\. `([^`]+)`", part, re.MULTILINE)
    return [file for file in files if mode != "mask" or file != "core/partial/gradient.py"]


@contextmanager
def recorded(files: list[str], is_on: list[bool]) -> Iterator[None]:
    """List the files of the package in the order in which a call first comes to them."""

    def note(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if (
            is_on[0]
            and event == "call"
            and name.startswith(PACKAGE)
            and (file := name.removeprefix(PACKAGE)) not in files
        ):
            files.append(file)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_passes_the_files_in_the_order_that_is_documented(mode: Any, digits: Digits) -> None:
    is_on = [False]
    files: list[str] = []

    class Begin(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            is_on[0] = trainer.global_step == SPARSE_STEP

    class End(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            is_on[0] = False

    callbacks = [Begin(), SparseSelectionCallback(mode=mode), TwoStageScheduler(warmup_epochs=1), End()]
    data = loader(tuple(part[:288] for part in digits), batch_size=32)
    with recorded(files, is_on):
        quiet_trainer(max_epochs=4, callbacks=callbacks).fit(PlainNet(), data)
    walk = documented(mode)
    assert [file for file in files if file in walk] == walk
    assert [file for file in files if file not in walk and not re.match(HELPERS, file)] == []


def test_every_file_that_is_named_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = {name for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", text)}
    assert len(names) > 40
    for name in names:
        assert any((ROOT / base / name).exists() for base in ("", "lightning_ast", "lightning_ast/core")), name
