"""The measured facts that predictions start from, each with its unit; what is not known is None."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_ast.core.partial import BatchNormBackward
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
    """The run that the Trainer, the loader and the callbacks make.

    Attributes:
        epochs: The length of a dense run, > 0; a fraction where ``max_steps`` ends it within an epoch.
        batches_per_epoch: The batches of a dense epoch, ``limit_train_batches`` included.
        batch_size: The samples of a batch.
        samples_per_epoch: The samples of a dense epoch, a short last batch counted as it is.
        drop_last: True where a last short batch is dropped.
        accumulate: The batches to an optimizer step from each of these epochs on, the first of which is 0.
        max_epochs: The limit in epochs, or None.
        max_steps: The limit in optimizer steps, or None.
        warmup_epochs: The warmup: an int counts epochs, a float in (0, 1) is a share of the run.
        cooldown_epochs: The cooldown, likewise.
        min_selected: The fewest samples of a batch (in ``prune`` of an epoch), a count or a share in (0, 1).
        own_mode: The mode that the Trainer's own callback asks for, or None without one.
        own_rate: The activation rate that the Trainer's own callbacks ask for, in (0, 1], or None without one.
        own_coverage: The coverage that its selection callback asks for in place of a rate, in (0, 1], or None.
        prune_steps: How the optimizer steps of a pruned epoch relate to those of a dense one.
    """

    epochs: float
    batches_per_epoch: int
    batch_size: int
    samples_per_epoch: int
    drop_last: bool = False
    accumulate: dict[int, int] = field(default_factory=lambda: {0: 1})
    max_epochs: int | None = None
    max_steps: int | None = None
    warmup_epochs: int | float = 0.1
    cooldown_epochs: int | float = 0.1
    min_selected: int | float = 2
    own_mode: Mode | None = None
    own_rate: float | None = None
    own_coverage: float | None = None
    prune_steps: PruneSteps = "replan"

    @property
    def schedule(self) -> Schedule:
        """Return warmup and cooldown as a schedule."""
        return Schedule(warmup_epochs=self.warmup_epochs, cooldown_epochs=self.cooldown_epochs)


@dataclass(frozen=True)
class LoadingFacts:
    """The training loader, iterated as fast as it goes.

    Attributes:
        seconds_per_batch: The steady period from batch to batch, what was fetched ahead left out.
        start_seconds: The time from its start to the first batch, besides the period: workers that start, a shuffle.
        workers: The number of processes that load; 0 loads in the training process.
        restarts: True where each epoch starts its workers anew.
        batches: The number of batches that were read.
    """

    seconds_per_batch: float
    start_seconds: float = 0.0
    workers: int = 0
    restarts: bool = False
    batches: int = 1


@dataclass(frozen=True)
class StepAt:
    """The steps at one activation rate, median over the cycles.

    Attributes:
        rate: The observed activation rate, in (0, 1].
        seconds: The time of a whole step on batches that are in memory, transfer included.
        peak_bytes: The highest device memory that was allocated, or None where the device does not tell.
    """

    rate: float
    seconds: float
    peak_bytes: int | None = None


Curve = tuple[StepAt, ...]
"""Steps of one mode, by rising rate."""


class Phases(NamedTuple):
    """A dense step on batches in memory, cut up; medians, so that the parts need not add up to the step.

    Attributes:
        gap_seconds: The time from the end of a step to the start of the next: transfer, Lightning.
        forward_seconds: The time from there to the backward.
        backward_seconds: The time of the backward.
        rest_seconds: The time after the backward: optimizer, logs.
    """

    gap_seconds: float
    forward_seconds: float
    backward_seconds: float
    rest_seconds: float


@dataclass(frozen=True)
class MemoryEstimate:
    """An **estimate** of memory, where the device does not count it.

    Attributes:
        static_bytes: The parameters, gradients and optimizer state.
        activation_bytes: The distinct storages that autograd saves in a dense step, parameters left out.
    """

    static_bytes: int
    activation_bytes: int


class DenseBackward(NamedTuple):
    """What ``partial`` spent on every sample at one rate.

    Attributes:
        rate: The activation rate that was asked for, in (0, 1].
        share: The share of the backward's FLOPs, in [0, 1]; None where that is not counted.
        ops: The backward ops that ran over all samples, and their calls in the probe.
    """

    rate: float
    share: float | None
    ops: dict[str, int]


@dataclass(frozen=True)
class StepFacts:
    """The training steps on batches in memory.

    Attributes:
        dense: The plain steps, without any callback.
        curves: The steps of the modes that were measured, ``partial`` and ``subset``.
        parts: The steps on a part of a batch alone, without scoring it, by rising share of its samples; the lowest is
            on a few samples. None where ``subset`` is refused.
        refused: The modes that cannot run here, and why.
        phases: The parts of the dense step; None where its backward was not seen.
        host_share: The step on a few samples over the dense step, in [0, 1]: what does not shrink with the samples.
            None where ``subset`` is refused.
        few_samples: The number of these samples.
        selection_seconds: The time that scoring and selecting add to a step that computes everything else too (``mask``
            less the dense step), >= 0; None where ``mask`` is refused.
        cycles: The number of cycles that the medians were taken over.
        batchnorm_layers: The number of BatchNorm layers that train.
        batchnorm: The backward of BatchNorm in ``partial``, as the user's callback has it.
        dense_backwards: What ``partial`` spent on every sample, by rising rate.
        compiled: True where a part of the module is compiled.
        memory: An estimate of memory where the device does not count it.
    """

    dense: StepAt
    curves: dict[Mode, Curve] = field(default_factory=dict)
    parts: Curve | None = None
    refused: dict[Mode, str] = field(default_factory=dict)
    phases: Phases | None = None
    host_share: float | None = None
    few_samples: int | None = None
    selection_seconds: float | None = None
    cycles: int = 1
    batchnorm_layers: int = 0
    batchnorm: BatchNormBackward = "selected"
    dense_backwards: tuple[DenseBackward, ...] = ()
    compiled: bool = False
    memory: MemoryEstimate | None = None

    def dense_backward(self, rate: float) -> DenseBackward | None:
        """Return what ``partial`` spends on every sample at the measured rate nearest to this one, if any."""
        return min(self.dense_backwards, key=lambda found: abs(found.rate - rate), default=None)


@dataclass(frozen=True)
class ValidationFacts:
    """The time that a validation takes, and when one is due. One of ``every_*`` tells when; the others are None.

    Attributes:
        batches: The batches of one validation.
        seconds_per_batch: The time of a batch, loading included.
        every_epochs: The epochs from one to the next; ``share`` then tells how often within such an epoch.
        share: The share of an epoch's batches from one validation to the next, in (0, 1].
        every_batches_of_epoch: The batches from one to the next, counted anew in each epoch; with ``every_epochs``.
        every_batches: The batches from one to the next, counted over the run.
        every_seconds: The seconds from one to the next.
        start_seconds: The time of each validation besides its batches: workers that start.
    """

    batches: int
    seconds_per_batch: float
    every_epochs: int | None = None
    share: float | None = None
    every_batches_of_epoch: int | None = None
    every_batches: int | None = None
    every_seconds: float | None = None
    start_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the time of one validation."""
        return self.start_seconds + self.batches * self.seconds_per_batch


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
