"""The measured facts that predictions start from, each with its unit; what is not known is None."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_ast.core.partial.rows import BatchNormBackward
from lightning_ast.mode_facts import Mode, PruneSteps
from lightning_ast.schedule import Schedule

__all__ = [
    "CoverageFacts",
    "Curve",
    "DenseBackward",
    "Facts",
    "LoadingFacts",
    "MemoryEstimate",
    "Phases",
    "RunFacts",
    "StepAt",
    "StepFacts",
    "ValidationFacts",
]


@dataclass(frozen=True)
class RunFacts:
    """The run that the Trainer, the loader and the callbacks make."""

    epochs: float  # > 0; a fraction where ``max_steps`` ends a dense run within an epoch
    batches_per_epoch: int  # of a dense epoch, ``limit_train_batches`` included
    batch_size: int
    samples_per_epoch: int  # a short last batch counted as it is
    schedule: Schedule  # in epochs or shares of the run, not in steps
    drop_last: bool = False
    accumulate: dict[int, int] = field(default_factory=lambda: {0: 1})  # batches to a step, from which epoch on
    max_epochs: int | None = None
    max_steps: int | None = None
    min_selected: int | float = 2  # samples of a batch (in ``prune`` of an epoch), or a share in (0, 1)
    # what the Trainer's own callbacks ask for, None without one: a rate or a coverage, in (0, 1], but not both
    own_mode: Mode | None = None
    own_rate: float | None = None
    own_coverage: float | None = None
    prune_steps: PruneSteps = "replan"


@dataclass(frozen=True)
class LoadingFacts:
    """The training loader, iterated as fast as it goes."""

    seconds_per_batch: float  # the steady period, what was fetched ahead left out
    start_seconds: float = 0.0  # to the first batch, besides the period: workers that start, a shuffle
    workers: int = 0  # 0 loads in the training process
    restarts: bool = False  # whether each epoch starts its workers anew
    batches: int = 1  # that were read


@dataclass(frozen=True)
class StepAt:
    """The steps at one activation rate, median over the cycles."""

    rate: float  # as observed, in (0, 1]
    seconds: float  # of a whole step on batches that are in memory, transfer included
    peak_bytes: int | None = None  # the device's; None where it does not tell


Curve = tuple[StepAt, ...]
"""Steps of one mode, by rising rate."""


class Phases(NamedTuple):
    """A dense step on batches in memory, cut up; medians, so that the parts need not add up to the step."""

    gap_seconds: float  # from the end of a step to the start of the next: transfer, Lightning
    forward_seconds: float
    backward_seconds: float
    rest_seconds: float  # after the backward: optimizer, logs


@dataclass(frozen=True)
class MemoryEstimate:
    """An **estimate** of memory, where the device does not count it."""

    static_bytes: int  # parameters, gradients and optimizer state
    activation_bytes: int  # distinct storages that autograd saves in a dense step, parameters left out


class DenseBackward(NamedTuple):
    """What ``partial`` spent on every sample at one rate."""

    rate: float  # as asked for, in (0, 1]
    share: float | None  # of the backward's FLOPs, in [0, 1]; None where that is not counted
    ops: dict[str, int]  # the backward ops that ran over all samples, and their calls in the probe


@dataclass(frozen=True)
class StepFacts:
    """The training steps on batches in memory."""

    dense: StepAt  # plain, without any callback
    curves: dict[Mode, Curve] = field(default_factory=dict)  # of ``partial`` and ``subset``, where measured
    # Steps on a part of a batch alone, without scoring it, by rising share; the lowest is on a few samples. The cost of
    # those few over the dense step is what does not shrink with the samples. None where ``subset`` is refused.
    parts: Curve | None = None
    host_share: float | None = None
    few_samples: int | None = None
    refused: dict[Mode, str] = field(default_factory=dict)  # why a mode cannot run here
    phases: Phases | None = None  # None where the dense step's backward was not seen
    # What scoring and selecting add, >= 0: ``mask``, which computes all the rest too, less the dense step.
    selection_seconds: float | None = None
    cycles: int = 1  # that the medians were taken over
    batchnorm_layers: int = 0  # that train
    batchnorm: BatchNormBackward = "selected"  # as the user's callback has it
    dense_backwards: tuple[DenseBackward, ...] = ()  # by rising rate
    compiled: bool = False  # whether a part of the module is
    memory: MemoryEstimate | None = None

    def dense_backward(self, rate: float) -> DenseBackward | None:
        """Return what ``partial`` spends on every sample at the measured rate nearest to this one, if any."""
        return min(self.dense_backwards, key=lambda found: abs(found.rate - rate), default=None)


@dataclass(frozen=True)
class ValidationFacts:
    """The time that a validation takes, and when one is due: one of ``every_*`` tells when, the others are None."""

    batches: int  # of one validation
    seconds_per_batch: float  # loading included
    every_epochs: int | None = None
    # with ``every_epochs``, within such an epoch: the share of its batches from one to the next, or their number
    share: float | None = None
    every_batches_of_epoch: int | None = None
    every_batches: int | None = None  # counted over the run
    every_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Return the time of one validation."""
        return self.batches * self.seconds_per_batch


@dataclass(frozen=True)
class CoverageFacts:
    """The activation rates that coverages need, by the significance of samples of the module as it is.

    Attributes:
        samples: The number of samples that were scored.
        rates: The activation rate that each coverage needs, in (0, 1].
    """

    samples: int
    rates: dict[float, float]


@dataclass(frozen=True)
class Facts:
    """Everything that was measured.

    Attributes:
        device: The device, in words.
        run: The lengths of the run.
        loading: The loading of the training data.
        step: The training steps.
        coverage: The rates that coverages need; None where no sample was scored, as where no mode can run.
        validation: The validation; None where the run has none, or where it could not be measured (a note tells why).
        notes: The things that a reader must know of how this was measured, a sentence each.
        seconds: The time that the measurement took.
    """

    device: str
    run: RunFacts
    loading: LoadingFacts
    step: StepFacts
    coverage: CoverageFacts | None = None
    validation: ValidationFacts | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
