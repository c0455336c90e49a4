"""Where the gradient of a loss enters the network: proved in the first forward, which is traced, and then followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.core.batch.containers import children_of
from lightning_ast.core.batch.graphs import Assignments, assignments_of
from lightning_ast.core.dependence.order import OrderedTrace
from lightning_ast.core.dependence.trace import SampleTrace, SeveralTrace
from lightning_ast.core.entries.finder import EntryFinder, Found, entry_error
from lightning_ast.core.entries.node_facts import runs_compiled
from lightning_ast.errors import EntryError
from lightning_ast.mixin import overrides
from lightning_ast.mode_facts import MODE_FACTS
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.other_dimension import DoubtfulTrace

__all__ = ["EntrySearch", "WarnOnce"]

_MOST = 8  # forwards that are traced for graphs of a new form, and for a first proof, at most


class WarnOnce:
    """Warns of each kind of problem once; the first words of a message tell its kind."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def __call__(self, message: str) -> None:
        """Warn, unless there was a warning of this kind before."""
        kind = message[:35]  # behind it a message may name sizes, which differ from batch to batch
        if kind not in self._kinds:
            self._kinds.add(kind)
            rank_zero_warn(message)


class EntrySearch:
    """Finds the entries of the losses of one kind of forward: of the training steps, or of the scoring passes."""

    def __init__(self, parts: FitParts, finder: EntryFinder, warn: WarnOnce) -> None:
        module: Any = parts.module
        self._finder = finder
        self._samples = parts.samples
        self._take = module.select_batch if overrides(module, "select_batch") else None
        self._module = module
        self._warn = warn
        self._wants_trace = (
            MODE_FACTS[parts.settings.mode].plans_epochs
            or parts.selector.selects
            or parts.target is not None
            or overrides(module, "sample_weights")
        )
        self._started = 0
        self._is_counted = False
        self._has_proved = False
        self._unclear: tuple[str, ...] = ()
        self.batch: Any = None
        self.sizes: tuple[int, ...] = ()  # of the batches of several loaders, which are one batch together
        self.attempts = 0
        self.is_hidden = False  # the last graph of a new form has no entry outside of a compiled function

    def wants_trace(self, batch_size: int) -> bool:
        """Tell whether the next forward is to be traced: the first one, and one behind each graph of a new form."""
        return self._wants_trace and batch_size > 1

    @property
    def is_exhausted(self) -> bool:
        """Tell whether no further forward will be traced."""
        return self._started >= _MOST

    @property
    def is_hopeless(self) -> bool:
        """Tell whether nothing was proved by any trace, and none will follow."""
        return not self._has_proved and not self._wants_trace and self.attempts > 0

    def start_trace(self, batch_size: int, *, take: Callable[[Any, Tensor], Any] | None = None) -> SampleTrace:
        """Make the trace of a forward; where a first one proved nothing, of another part of the batch."""
        self._started += 1
        self._is_counted = False  # a step that runs several backwards asks for several losses: one attempt
        if self.sizes:
            return SeveralTrace(children_of(self.batch) or (), self.sizes)
        # Where a change of the whole batch proved nothing, one of its tensors alone may: a shared one (anchors, a
        # vocabulary) has reached every row.
        only = None if self.attempts == 0 or self._has_proved else self.attempts - 1
        doubt = self._samples.doubt
        if doubt is not None and take is None and batch_size == doubt.counted:
            return DoubtfulTrace(self.batch, doubt, take=self._take, only=only)
        return OrderedTrace(self.batch, batch_size, take=take or self._take, only=only)

    def end_trace(self, trace: SampleTrace) -> None:
        """Release a trace; the next forward is traced too where nothing was proved but may be."""
        trace.release()
        self._wants_trace = not self._has_proved and not self.is_exhausted and trace.failure is None

    def _count(self, *, proved: bool) -> None:
        self.attempts += not self._is_counted
        self._is_counted = True
        self._has_proved = self._has_proved or proved

    @property
    def _assignments(self) -> Assignments:
        if not self.sizes:
            return assignments_of(self.batch)
        # A tensor has the rows of one loader's samples, or those of all of them, which sizes tell.
        every = torch.arange(sum(self.sizes), device=self._module.device)
        return tuple(every.split(self.sizes))  # type: ignore[no-untyped-call]

    def find(self, loss: Tensor, batch_size: int) -> Found:
        """Find the entries of a loss of a forward that was not traced."""
        # A graph of a new form (a term that begins late) is taken by its sizes where they allow one answer, and the
        # next forward is traced. Where they do not, the step is a dense one.
        found = self._finder.find(loss, batch_size, assignments=self._assignments)
        if found is not None:
            return found
        # This batch cannot be traced any more: its forward is over.
        self._wants_trace = not self.is_exhausted
        if self.sizes:  # a proof alone tells it of which loader's samples the rows are
            if self.is_exhausted:
                raise self._several_error("the graph of the loss has another form again and again")
            return Found(unclear=("the batches of several loaders",))
        found = self._finder.guess(loss, batch_size, assignments=self._assignments)
        self.is_hidden = not found.entries and runs_compiled(loss)
        return Found(unclear=found.unclear) if found.unclear else found

    def find_traced(self, loss: Tensor, batch_size: int, trace: SampleTrace) -> Found:
        """Find the entries of a loss of a traced forward, by what is known already where that is enough."""
        found = self._finder.find(loss, batch_size, assignments=self._assignments)
        if found is None:
            return self.prove(loss, batch_size, trace)
        self._count(proved=bool(found.entries))
        return found

    def prove(self, loss: Tensor, batch_size: int, trace: SampleTrace) -> Found:
        """Prove the entries of a loss of a traced forward; an error where no part of the batch shows them."""
        if trace.failure is not None and self.sizes:
            raise self._several_error(trace.failure)
        if trace.failure is not None:
            self._warn(
                f"lightning-ast: which rows belong to which sample is taken from the sizes of tensors: {trace.failure}."
            )
            return self._finder.guess(loss, batch_size, assignments=self._assignments)
        # A step that runs its own backwards may have a loss apart from the samples, such as that of a generator.
        apart = not self._module.automatic_optimization
        found = self._finder.prove(loss, batch_size, trace, may_be_apart=apart, assignments=self._assignments)
        if self.sizes and found.unclear:
            raise self._several_error(f"in {', '.join(found.unclear)} no dimension holds the samples of one or of all")
        if self.sizes and not all(entry.exact for entry in found.entries):
            raise self._several_error("rows follow other samples too")
        if isinstance(trace, DoubtfulTrace) and trace.is_confirmed(loss, found):
            raise EntryError(trace.doubt.message)
        self._count(proved=bool(found.entries))
        if not found.entries and not self._finder.proved:
            self._unclear = self._unclear or found.unclear
            # Every part of the batch is changed in a forward of its own, until one of them shows where the rows are
            parts = min(trace.parts, _MOST - 1) if trace.parts > 1 else 0
            if self.attempts > parts and (found.unclear or self._module.automatic_optimization):
                raise entry_error(self._unclear, batch_size)
        if found.entries and found.unclear:
            self._warn(
                f"lightning-ast: the gradient enters {', '.join(found.unclear)} by rows that are not one or several a "
                f"sample of the {batch_size}: there it stays that of all samples. What lies before it is trained on "
                "the selected ones."
            )
        if any(not entry.exact for entry in found.entries):
            self._warn(
                "lightning-ast: the network mixes the samples of a batch before its last layer, so the rows of a "
                "sample depend on the others too: the selection is of rows of the gradient."
            )
        return found

    def _several_error(self, problem: str) -> EntryError:
        return EntryError(
            f"the batch holds those of {len(self.sizes)} dataloaders ({', '.join(map(str, self.sizes))} samples), and "
            f"which rows belong to which of them cannot be told: {problem}. Let the network see each loader's batch by "
            "itself, or all of them one behind the other along the first dimension; or join the data sets (torch's "
            "StackDataset), so that what belongs together is one sample."
        )
