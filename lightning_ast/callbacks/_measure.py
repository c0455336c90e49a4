"""Measuring a run from the callback's hooks: FLOPs once, seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.flop_counter import FlopCounterMode

from lightning_ast.core.ledger import FlopsPerSample, Ledger

__all__ = ["FlopCount", "StepClock"]

SETTLE_STEPS = 3
"""First steps of each stage that are not timed: caches, compilation, the step whose FLOPs are counted."""


class FlopCount:
    """Counts forward and backward of the first training batch with torch's FlopCounterMode.

    It watches the operations of the step as it runs; results are unchanged. An optimizer that evaluates the step often
    (LBFGS) has its first evaluation counted. A module with compiled parts is not counted (a counter would switch
    compilation off): the ledger's FLOPs then stay None, which is said once.

    Args:
        module: the LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._done = any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in module.modules())
        self._open = ExitStack()
        self._counter: FlopCounterMode | None = None
        self._forward: int | None = None
        self._backward = 0
        self._expects_backward = False
        if self._done:
            rank_zero_info("lightning-ast: FLOPs of compiled modules are not counted: no ast/savings_flops.")

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count the training step inside, once; backwards inside it (manual optimization) are counted as such."""
        if self._done or self._forward is not None:
            self._expects_backward = False
            yield
            return
        self._expects_backward = True
        with FlopCounterMode(display=False) as counter:
            yield
        self._forward = counter.get_total_flops() - self._backward

    def start_backward(self) -> None:
        """Begin to count a backward of the counted step."""
        if not self._done and self._expects_backward and self._counter is None:
            self._counter = self._open.enter_context(FlopCounterMode(display=False))

    def stop_backward(self) -> None:
        """End the backward's count."""
        if self._counter is not None:
            self._backward += self._counter.get_total_flops()
            self.close()
            if self._forward is not None:  # the backward of the counted step, not of the optimizer's next evaluation
                self._expects_backward = False

    def finish_batch(self, ledger: Ledger, samples: int) -> None:
        """Write the cost of one sample to the ledger, once it is known.

        Args:
            ledger: left alone where it knows already (restored from a checkpoint).
            samples: what the counted forward ran on.
        """
        self.close()
        if not self._done and ledger.flops is None and self._forward and self._backward:
            ledger.flops = FlopsPerSample(self._forward / samples, self._backward / samples)
        self._done = True

    def close(self) -> None:
        """Stop counting wherever an exception left it."""
        self._open.close()
        self._counter = None


class StepClock:
    """Wall time from the end of one training batch to the end of the next, loading included."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._steps: dict[str, int] = {}

    def interrupt(self) -> None:
        """Something else than training happens now: the running step is not timed."""
        self._last = None

    def finish_batch(self, ledger: Ledger, stage: str, *, offered: int) -> None:
        """Add the step that ends now to the ledger, if it stands for its stage."""
        now = time.perf_counter()
        self._steps[stage] = self._steps.get(stage, 0) + 1
        if self._last is not None and self._steps[stage] > SETTLE_STEPS:
            ledger.record_seconds(stage, seconds=now - self._last, offered=offered)
        self._last = now
