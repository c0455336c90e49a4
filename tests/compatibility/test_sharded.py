"""FSDP2 against DDP, two processes on the CPU: the same samples, the same weights, and a resume that is bit-exact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compatibility.train_sharded import MODES

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"),
        reason="this torch (2.6) cannot run fully_shard on a CPU, whose streams have no events there",
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes found; all runs share them, for a start takes longer than a run."""
    folder = tmp_path_factory.mktemp("sharded")
    own = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in own} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.compatibility.train_sharded", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def assert_equal_runs(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    """Compare what two runs trained, and what they selected."""
    torch.testing.assert_close(one["weights"], other["weights"], **tolerance)
    assert (one["selected"], one["offered"]) == (other["selected"], other["offered"])
    assert one["threshold"] == pytest.approx(other["threshold"], rel=1e-5)


@pytest.mark.parametrize("shards", ["fsdp2", "fsdp2-root"])
@pytest.mark.parametrize("mode", MODES)
def test_fsdp2_trains_as_ddp_does(mode: str, shards: str, found: list[dict[Any, Any]]) -> None:
    for own in found:
        assert_equal_runs(own[mode, shards], own[mode, "ddp"])
        sparse = own[mode, shards]
        assert 0 < sparse["selected"] < sparse["offered"]
        assert sparse["dense_ops"] == {}, "partial saves as much as with whole parameters"


@pytest.mark.parametrize("setting", ["accumulated", "bf16"])
def test_fsdp2_with_accumulation_and_with_mixed_precision(setting: str, found: list[dict[Any, Any]]) -> None:
    for own in found:
        assert_equal_runs(own[setting, "fsdp2"], own[setting, "ddp"], rtol=1e-4, atol=1e-6)


def test_a_resumed_fsdp2_run_goes_on_bit_for_bit(found: list[dict[Any, Any]]) -> None:
    for own in found:
        assert_equal_runs(own["resumed"], own["saving"], rtol=0, atol=0)


def test_layers_that_are_split_are_refused_before_the_first_batch(found: list[dict[Any, Any]]) -> None:
    for own in found:
        assert "tensor_parallel_size=1" in own["split"]
        assert "2 processes share 1 part(s) of the data" in own["split"]
