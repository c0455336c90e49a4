"""The compatibility matrix, cell by cell: trained with Lightning, and compared with a plain loop written by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_ast.demo.data import load_images
from tests.compatibility.compare import GPU, check, distance, flat
from tests.compatibility.matrix import (
    FACTORS,
    LABELS,
    RULES,
    Cell,
    cells,
    covered,
    markdown,
    possible_pairs,
    rule_of,
    verdict,
)
from tests.compatibility.oracle import Micro, network, replay, windows
from tests.compatibility.train_cell import error_file, run, stepped_file
from tests.test_layout import imports

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning-ast. a part of the module is compiled"),
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]


def started(*how: str) -> list[object]:
    """The cells whose processes are started in one of these ways; each spawned pair imports everything anew: slow."""
    return [
        pytest.param(cell, id=cell.id, marks=[pytest.mark.slow] if cell.devices == "spawn" else [])
        for cell in cells()
        if cell.devices in how
    ]


@pytest.mark.parametrize("cell", started("1"))
def test_one_process(cell: Cell, tmp_path: Path) -> None:
    trained_here(cell, tmp_path)


@pytest.mark.parametrize("cell", started("spawn"))
def test_two_spawned_processes(cell: Cell, tmp_path: Path) -> None:
    trained_here(cell, tmp_path)


@pytest.fixture(scope="module")
def popen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have trained all cells of theirs, one after another."""
    folder = tmp_path_factory.mktemp("popen")
    own = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    command = [sys.executable, "-m", "tests.compatibility.train_cell", "popen", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("cell", started("popen"))
def test_two_launched_processes(cell: Cell, popen: Path) -> None:
    expected = verdict(cell, gpu=GPU)
    if expected == "untested":
        pytest.skip(rule_of(cell, gpu=GPU).reason)
    errors = [error_file(popen / cell.id, rank) for rank in (0, 1)]
    if expected == "refused":
        for file in errors:
            assert re.search(rule_of(cell).message, file.read_text())
        assert not stepped_file(popen / cell.id).exists()
        return
    for file in errors:
        assert not file.exists(), file.read_text()
    check(cell, popen / cell.id)


def trained_here(cell: Cell, folder: Path) -> None:
    """Train a cell from this process, and hold it to its verdict."""
    rule = rule_of(cell, gpu=GPU)
    if rule.verdict == "untested":
        pytest.skip(rule.reason)
    if rule.verdict == "refused":
        with pytest.raises(Exception, match=rule.message):
            run(cell, folder)
        assert not stepped_file(folder / cell.id).exists()
        return
    check(cell, run(cell, folder))


# ------------------------------------------------------------------ the oracle itself


def micros(*sizes: int, epoch: int = 0) -> list[Micro]:
    """Micro-batches of real digits, of which every second sample is selected, with weights."""
    found = []
    for number, size in enumerate(sizes):
        rows = torch.arange(size) + 40 * number + sum(sizes)
        images = load_images("digits")
        x, y = images.train_images[rows].float() / 255, images.train_labels[rows]
        kept = torch.arange(0, size, 2)
        found.append(Micro(epoch, x, y, kept, 1 + kept.float() / size))
    return found


def joined(parts: list[Micro]) -> Micro:
    """One batch of all of them."""
    offsets = torch.tensor([0, *(part.y.numel() for part in parts)]).cumsum(0)
    indices = torch.cat([part.indices + offset for part, offset in zip(parts, offsets)])
    x, y, w = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "weights"))
    return Micro(parts[0].epoch, x, y, indices, w)


@pytest.mark.parametrize("weighting", ["sqrt", "unbiased"])
def test_the_loop_by_hand_takes_a_window_for_one_large_batch(weighting: str) -> None:
    ranks, cell = [micros(24, 9, 15), micros(20, 7, 3)], Cell(accumulation="3", weighting=weighting)
    whole = flat(replay([[joined([*ranks[0], *ranks[1]])]], replace(cell, accumulation="1")))
    torch.testing.assert_close(flat(replay(ranks, cell)), whole, rtol=1e-5, atol=1e-7)
    each = flat(replay([[joined([a, b])] for a, b in zip(*ranks)], cell))
    assert distance(each, whole) > 1e-3 * distance(whole, flat(list(network().parameters()))), "not a mean of means"


def test_a_short_last_window_keeps_lightnings_share() -> None:
    cell, start = Cell(accumulation="3"), flat(list(network().parameters()))
    short = flat(replay([micros(24, 9)], cell)) - start
    whole = flat(replay([[joined(micros(24, 9))]], replace(cell, accumulation="1"))) - start
    torch.testing.assert_close(short, whole * 2 / 3, rtol=1e-4, atol=1e-6)
    assert [len(window) for window in windows([*micros(9, 9, 9, 9, 9), *micros(9, epoch=1)], 3)] == [3, 2, 1]


def test_the_loop_by_hand_knows_nothing_of_the_package() -> None:
    assert not {name for name in imports(ROOT / "tests" / "compatibility" / "oracle.py") if name.startswith("light")}


# ------------------------------------------------------------------ the matrix itself


def test_every_possible_pair_is_in_some_cell_that_trains() -> None:
    assert set(possible_pairs()) <= covered(list(cells()))
    assert len(possible_pairs()) > 400
    impossible = (("optimization", "manual"), ("accumulation", "3"))
    assert impossible not in possible_pairs()


def test_every_rule_has_a_cell() -> None:
    hit = {rule_of(cell, gpu=gpu).name for cell in cells() for gpu in (False, True)}
    assert hit == {rule.name for rule in RULES}


def test_the_cells_are_the_same_each_time() -> None:
    again = cells.__wrapped__()
    assert again == cells()
    assert len({cell.id for cell in again}) == len(again)


def test_most_cells_are_exact() -> None:
    count = Counter(verdict(cell) for cell in cells())
    assert count["exact"] >= 50
    assert count["approximate"] + count["refused"] >= 10


def test_the_table_names_every_value() -> None:
    table = markdown()
    for factor, values in FACTORS.items():
        for value in values:
            assert LABELS.get(value, f"`{value}`") in table, (factor, value)
    for number, reason in enumerate(dict.fromkeys(rule.reason for rule in RULES if rule.reason), start=1):
        assert f"\n{number}. {reason}" in table
        assert re.search(rf"<sup>[\d ]*\b{number}\b", table), f"{reason}: said of some value"
