"""The global generators of Python and NumPy behind blocks that draw from them, and behind others."""

import random

import numpy as np
import pytest

from lightning_ast.lightning_internals.random_state import HostGenerators


def drawn() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())


def expected(draws: int) -> list[tuple[float, ...]]:
    random.seed(0)
    np.random.seed(0)
    return [drawn() for _ in range(draws)]


def test_every_draw_is_what_it_would_be_without_the_blocks_between() -> None:
    plain = expected(4)
    random.seed(0)
    np.random.seed(0)
    generators = HostGenerators()
    found = []
    for block in (drawn, lambda: None, np.random.randn, lambda: np.random.shuffle([1, 2, 3])):
        with generators.kept():
            block()
        with generators.kept():
            first = drawn()
        with generators.kept():
            assert drawn() == first
        found.append(drawn())
    assert found == plain


def test_a_normal_number_that_is_held_ready_is_kept() -> None:
    np.random.seed(0)
    np.random.randn()  # draws two, and holds the second one ready
    held = np.random.get_state()[4]
    generators = HostGenerators()
    for _ in range(2):
        with generators.kept():
            assert np.random.randn() == held
    assert np.random.randn() == held
    with generators.kept():
        np.random.randn()
    np.random.seed(0)
    states = [np.random.randn() for _ in range(4)]
    np.random.seed(0)
    np.random.randn(2)
    with generators.kept():
        np.random.randn()
    assert [np.random.randn(), np.random.randn()] == states[2:]


def test_a_generator_of_another_kind_and_an_error_are_kept_too() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        generators = HostGenerators()
        state = np.random.get_bit_generator().state
        with pytest.raises(ZeroDivisionError), generators.kept():
            np.random.rand()
            raise ZeroDivisionError
        assert np.random.get_bit_generator().state == state
    finally:
        np.random.set_bit_generator(before)
