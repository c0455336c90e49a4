"""Samples that are not finite: kept out of the training, counted, named, and no more of them than allowed."""

from __future__ import annotations

import math
import warnings
from dataclasses import astuple, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.core.batch.inputs import all_finite, find_finite, replace_in_batch
from lightning_ast.errors import QuarantineError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.selection.stand_ins import StandIns
from lightning_ast.selection.step_state import StepState
from lightning_ast.words import counted

__all__ = ["Quarantine", "QuarantinedSample"]

_NAMED = 20
_UNKNOWN = -1


@dataclass(frozen=True)
class QuarantinedSample:
    """A sample that was left out of a training step.

    Attributes:
        epoch: The epoch, from 0.
        batch: The index of its batch in the epoch, in its process.
        position: Its position in the batch; -1 in old checkpoints, for a batch that was left out as a whole.
        index: Its index in the data set, or -1 where that is not known.
    """

    epoch: int
    batch: int
    position: int
    index: int

    def __str__(self) -> str:
        """Return the name of the sample in a message."""
        return f"{self.index}" if self.index >= 0 else f"batch {self.batch}, position {self.position}"


@dataclass
class _Pending:
    """The samples of a batch that are not finite, while they are copied to the host."""

    bad: Tensor
    indices: Tensor | None
    epoch: int
    batch: int
    arrived: Any = None


class Quarantine:
    """Finds the samples that are not finite, by their input ahead of the step and by their loss within it."""

    def __init__(self, limit: float | None, processes: Processes) -> None:
        self.limit = limit  # a share of an epoch's samples in [0, 1]; None looks at nothing
        self._processes = processes
        self.samples: list[QuarantinedSample] = []
        self.count = 0
        self._offered = self._expected = 0
        self._epoch = 0
        self._pending: list[_Pending] = []
        self._stand_ins = StandIns()

    def examine(self, step: StepState, batch: Any) -> None:
        """Look at the input of a batch, and put others in the place of bad samples, until :meth:`restore`."""
        finite = None if self.limit is None else find_finite(batch, step.batch_size)
        if finite is None:
            return
        step.quarantine(~finite)
        self._stand_ins.put(batch, replace_in_batch(batch, finite))

    def restore(self) -> None:
        """Give the batch its own values back. Safe to call twice."""
        self._stand_ins.restore()

    def eligible(self, step: StepState, values: Tensor, bad: Tensor | None) -> Tensor | None:
        """Tell which samples may be selected; None where all may, as the host knows.

        Args:
            values: ``(B,)`` norms or losses.
            bad: The samples ``(B,)`` that ``step`` knows to be bad, on the device of ``values``.
        """
        # On an accelerator a dense step waits for nothing: a sample that is not finite is replaced without the host
        # knowing, and is counted when the news arrives.
        if self.limit is None:
            return None
        on_host = values.device.type == "cpu"
        if on_host and bad is None and all_finite(values):
            return None
        finite = values.isfinite()
        if bad is not None:
            finite = finite & ~bad.to(finite.device)
        if on_host and bool(finite.all()):
            return None
        step.quarantine(~finite)
        return finite

    def finite_in_step(self, step: StepState, norms: Tensor) -> Tensor | None:
        """Find samples whose gradient was finite in the scoring pass of ``subset`` and is not in its step.

        Returns:
            ``(k,)`` positions among the selected samples of the finite ones; None where the host knows that all are.
        """
        if self.limit is None or step.selection is None or norms.device.type != "cpu" or all_finite(norms):
            return None
        finite = norms.isfinite()
        bad = torch.zeros(step.batch_size, dtype=torch.bool)
        step.quarantine(bad.index_fill(0, step.selection.indices[~finite], True))
        return finite.nonzero().flatten()

    def lost(self, loss: Tensor) -> bool:
        """Tell whether the loss of a dense step is not finite, where the host can tell without waiting."""
        return self.limit is not None and loss.device.type == "cpu" and not all_finite(loss.detach())

    def finish_batch(self, step: StepState, trainer: pl.Trainer, batch_idx: int) -> None:
        """Count what was found."""
        if trainer.current_epoch != self._epoch:
            self._read(wait=True)
            self._epoch = trainer.current_epoch
            self.count = 0
            self._offered = 0
            self._expected = 0
        self._offered += step.offered
        if step.bad is not None:
            self._pending.append(_Pending(step.bad, step.indices, self._epoch, batch_idx))
            _send(self._pending[-1])
        # Ahead of the epoch's end the share is taken of the samples that it is going to have: one bad sample in the
        # first batch is not yet too many.
        if self._expected == 0:
            batches = trainer.num_training_batches
            self._expected = int(batches * step.offered) if math.isfinite(batches) else 1000
        found = bool(self._pending) and self._read()
        if found and self._processes.count == 1:  # several agree at the epoch's end: one alone must not stop
            self._check(self.count, max(self._offered, self._expected))

    def finish_epoch(self) -> None:
        """Count what is still on its way, over all processes."""
        if self.limit is None:
            return
        self._read(wait=True)
        own = torch.tensor([float(self.count), float(max(self._offered, self._expected))])
        count, offered = (self._processes.mean(own) * self._processes.count).tolist()
        self._check(round(count), round(offered), shared=True)

    def _read(self, *, wait: bool = False) -> bool:
        """Tell whether samples were found among what has arrived."""
        before = self.count
        # In order, and not beyond the first that is on its way: a later one cannot have arrived before it.
        while self._pending and (wait or self._pending[0].arrived is None or self._pending[0].arrived.query()):
            found = self._pending.pop(0)
            if found.arrived is not None:
                found.arrived.synchronize()
            self._add(found)
        return self.count > before

    def _add(self, found: _Pending) -> None:
        positions = found.bad.nonzero().flatten().tolist()
        if not positions:
            return
        names = [_UNKNOWN] * found.bad.numel() if found.indices is None else found.indices.tolist()
        new = [QuarantinedSample(found.epoch, found.batch, position, names[position]) for position in positions]
        if not self.samples:
            warnings.warn(  # in every process: each has its own samples
                f"lightning-ast: NaN or infinity in the input or the loss of {_names(new)} (epoch {new[0].epoch}). "
                "Such samples are left out of the training and counted: see `quarantined` of the callback at the end.",
                stacklevel=2,
            )
        self.samples += new
        self.count += len(new)

    def _check(self, count: int, total: int, *, shared: bool = False) -> None:
        if self.limit is None or count <= self.limit * total:
            return
        latest = [sample for sample in self.samples if sample.epoch == self._epoch]
        # Every process comes here with the same count, and the samples may be in the part of another one.
        everyone = self._processes.gathered(latest) if shared else [latest]
        several = len(everyone) > 1
        names = [_names(found) + f" (process {rank})" * several for rank, found in enumerate(everyone) if found]
        whole = len(latest) > 1 and latest[-2].batch == latest[-1].batch
        raise QuarantineError(
            f"lightning-ast: NaN or infinity in the input or the loss of {counted(count, 'sample')} of epoch "
            f"{self._epoch}, more than quarantine_limit={self.limit:g} of its {total}: {', '.join(names)}. "
            "Mend or remove these samples"
            + ("; if they are whole batches, the model has diverged: lower the learning rate" if whole else "")
            + ". If NaN or infinity in a batch is meant, pass quarantine_limit=None; to allow more, a larger one."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was found: primitives and tensors alone."""
        self._read(wait=True)
        samples = torch.tensor([astuple(sample) for sample in self.samples], dtype=torch.long).reshape(-1, 4)
        return {"samples": samples, "epoch": self._epoch, "count": self.count, "offered": self._offered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.samples = [QuarantinedSample(*row) for row in state["samples"].tolist()]
        self._epoch = state["epoch"]
        self.count = state["count"]
        self._offered = state["offered"]


def _send(found: _Pending) -> None:
    """Start a copy to the host; on CUDA nothing waits for it."""
    if found.bad.device.type == "cuda":
        # Pinned, without which the copy would wait; the event tells when the host may read it.
        host = torch.empty(found.bad.shape, dtype=torch.bool, pin_memory=True)
        found.bad = host.copy_(found.bad, non_blocking=True)
        found.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        found.arrived.record()


def _names(samples: list[QuarantinedSample]) -> str:
    known = all(sample.index >= 0 for sample in samples)
    listed = ", ".join(str(s) if known else f"({s})" for s in samples[:_NAMED])
    more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
    return (f"dataset index {listed}" if known else listed) + more
