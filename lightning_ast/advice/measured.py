"""What was measured before a prediction is made: frozen facts, every one with its unit; what is not known is None."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_ast.core.execution import Mode

__all__ = [
    "Curve",
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
        epochs: length of a dense run, > 0; a fraction where ``max_steps`` ends it within an epoch.
        batches_per_epoch: of a dense epoch, ``limit_train_batches`` included.
        batch_size: samples of a batch.
        samples_per_epoch: of a dense epoch, a short last batch counted as it is.
        drop_last: whether a last short batch is dropped.
        accumulate: batches to an optimizer step from each of these epochs on, the first of which is 0.
        max_epochs: limit of the run, or None.
        max_steps: limit in optimizer steps, or None.
        warmup_epochs: an int counts epochs, a float in (0, 1) is a share of the run.
        cooldown_epochs: likewise, at the end.
        min_selected: fewest samples of a batch (in ``prune`` of an epoch), a count or a share in (0, 1).
        own_mode: that the Trainer's own callback asks for, or None without one.
        own_rate: activation rate that the Trainer's own callbacks ask for, in (0, 1], or None without one.
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


@dataclass(frozen=True)
class LoadingFacts:
    """The training loader, iterated as fast as it goes.

    Attributes:
        seconds_per_batch: steady period from batch to batch, what was fetched ahead left out.
        start_seconds: from its start to the first batch, besides the period: workers that start, a shuffle.
        workers: processes that load; 0 loads in the training process.
        restarts: whether each epoch starts its workers anew.
        batches: that were read.
    """

    seconds_per_batch: float
    start_seconds: float = 0.0
    workers: int = 0
    restarts: bool = False
    batches: int = 1


@dataclass(frozen=True)
class StepAt:
    """Steps at one activation rate, median over the cycles.

    Attributes:
        rate: observed activation rate, in (0, 1].
        seconds: of a whole step on batches that are in memory, transfer included.
        peak_bytes: highest device memory that was allocated, or None where the device does not tell.
    """

    rate: float
    seconds: float
    peak_bytes: int | None = None


Curve = tuple[StepAt, ...]
"""Steps of one mode, by rising rate."""


@dataclass(frozen=True)
class Phases:
    """A dense step on batches in memory, cut up; medians, so that the parts need not add up to the step.

    Attributes:
        gap_seconds: from the end of a step to the start of the next: transfer, Lightning.
        forward_seconds: from there to the backward.
        backward_seconds: of the backward.
        rest_seconds: behind it: optimizer, logs.
    """

    gap_seconds: float
    forward_seconds: float
    backward_seconds: float
    rest_seconds: float


@dataclass(frozen=True)
class MemoryEstimate:
    """**Estimated**, where the device does not count its memory.

    Attributes:
        static_bytes: parameters, gradients and optimizer state.
        activation_bytes: distinct storages that autograd saves in a dense step, parameters left out.
    """

    static_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class StepFacts:
    """Training steps on batches in memory.

    Attributes:
        dense: plain steps, without any callback.
        curves: of the modes that were measured, ``partial`` and ``subset``.
        refused: modes that cannot run here, and why.
        phases: of the dense step; None where its backward was not seen.
        host_share: step on a few samples over dense step, in [0, 1]: what does not shrink with the samples. None where
            ``subset`` is refused.
        few_samples: how many these were.
        selection_seconds: what scoring and selecting add to a step that computes everything else too (``mask`` less
            the dense step), >= 0; None where ``mask`` is refused.
        cycles: over which the medians were taken.
        batchnorm_layers: BatchNorm layers that train.
        dense_ops: backward ops of ``partial`` that ran over all samples, and their calls in the probe.
        dense_ops_share: of the backward's FLOPs that ``partial`` spent on every sample, at the lowest rate measured,
            in [0, 1]; None where that is not counted.
        compiled: whether a part of the module is compiled.
        memory: an estimate where the device does not count.
    """

    dense: StepAt
    curves: dict[Mode, Curve] = field(default_factory=dict)
    refused: dict[Mode, str] = field(default_factory=dict)
    phases: Phases | None = None
    host_share: float | None = None
    few_samples: int | None = None
    selection_seconds: float | None = None
    cycles: int = 1
    batchnorm_layers: int = 0
    dense_ops: dict[str, int] = field(default_factory=dict)
    dense_ops_share: float | None = 0.0
    compiled: bool = False
    memory: MemoryEstimate | None = None


@dataclass(frozen=True)
class ValidationFacts:
    """What a validation takes, and when one is due. One of ``every_*`` says when; the others are None.

    Attributes:
        batches: of one validation.
        seconds_per_batch: loading included.
        every_epochs: epochs from one to the next; ``share`` then says how often within such an epoch.
        share: of an epoch's batches from one validation to the next, in (0, 1].
        every_batches_of_epoch: batches from one to the next, counted anew in each epoch; with ``every_epochs``.
        every_batches: batches from one to the next, counted over the run.
        every_seconds: seconds from one to the next.
        start_seconds: of each validation, besides its batches: workers that start.
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
        """Of one validation."""
        return self.start_seconds + self.batches * self.seconds_per_batch


@dataclass(frozen=True)
class Facts:
    """All that was measured.

    Attributes:
        device: in words.
        run: lengths.
        loading: of the training data.
        step: training steps.
        validation: None where the run has none, or where it could not be measured (a note says so).
        notes: what a reader must know of how this was measured, a sentence each.
        seconds: that the measurement took.
    """

    device: str
    run: RunFacts
    loading: LoadingFacts
    step: StepFacts
    validation: ValidationFacts | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
