"""The words of jsonargparse, as a person would write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command import BORING, boring, run

MISSING = "module 'wording_module' has no attribute 'Nett'"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*boring(), "--trainer.limit_train_batches=abc"), "trainer.limit_train_batches: expected int or float, got abc"),
        ((*boring(), "--trainer.logger=3"), "trainer.logger: expected Iterable or bool, got 3"),
        ((*boring(), "--trainer.max_epochs=int"), "trainer.max_epochs: expected int, got int"),
        (("fit", "--seed_everything=1", "--model", "wording_module.Nett"), f"model: wording_module.Nett: {MISSING}"),
        (("fit", "--seed_everything=1", "--model", "wording_modul.Net"), "model: wording_modul.Net: No module named 'wording_modul'"),
        (("fit", "--seed_everything=1", "--model", BORING, "--data", "wording_module.Nett"), f"data: wording_module.Nett: {MISSING}"),
        ((*boring(), "--trainer.callbacks=wording_module.Nett"), f"wording_module.Nett: {MISSING}"),
    ],
)  # fmt: skip
def test_alternatives_are_told_in_a_line(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    (tmp_path / "wording_module.py").write_text("class Net: pass\n")
    assert told in run(*arguments, cwd=tmp_path, status=2).last


def test_several_choices(tmp_path: Path) -> None:
    last = run(*boring(), "--trainer.precision=7", cwd=tmp_path, status=2).last
    assert last.count("expected ") == 1
    assert last.count(" or one of ") >= 1
    assert last.endswith(", got 7")
