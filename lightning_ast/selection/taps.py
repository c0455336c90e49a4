"""Where the last layers of a network hand their outputs to the loss: found once, then read without a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import Entry
from lightning_ast.core.entries.layout import Layout
from lightning_ast.core.entries.node_views import TracedView
from lightning_ast.core.gradient_gate import norms_at
from lightning_ast.core.partial.rows import UnequalPlace

__all__ = ["Taps"]

_STEPS = 6  # reshapes and casts between the last layer and the output of its module, at most


class Taps:
    """The outputs of modules through which the whole gradient of a loss enters the network."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._outputs: list[tuple[nn.Module, int, Tensor]] = []
        self._taps: dict[tuple[nn.Module, int], Layout] = {}
        self._calls: Counter[nn.Module] = Counter()
        self._cuts: list[tuple[GradientEdge, tuple[int, ...], Layout]] = []

    @property
    def ready(self) -> bool:
        """Tell whether every entry of the loss was found to be an output of a module."""
        return bool(self._taps)

    def finding(self) -> AbstractContextManager[None]:
        """Collect the outputs of all modules of a forward with its graph."""
        self._calls.clear()

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                self._outputs.append((module, self._calls[module], output))
            self._calls[module] += 1

        # The module itself is left out: its forward is the whole step where a step calls `self(x)`.
        return _hooked(set(self._module.modules()) - {self._module}, note)

    def settle(self, entries: list[Entry], batch_size: int, trace: SampleTrace) -> None:
        """Find the outputs that the entries are, with the layout of the samples in each; none where one is missing."""
        taps: dict[tuple[nn.Module, int], Layout] = {}
        view = TracedView(batch_size, trace)
        for entry in entries:
            tap = next((tap for tap in self._outputs if _is_output_of(tap[2].grad_fn, entry)), None)
            layout = None
            if tap is not None and tap[2].grad_fn is not None and not isinstance(entry.place, UnequalPlace):
                layout = view.layout(tap[2].grad_fn, tap[2].output_nr)
            if tap is None or layout is None:  # part of the gradient would be missing: every score needs the graph
                taps.clear()
                break
            taps[tap[0], tap[1]] = layout
        self._taps = taps
        self._outputs.clear()

    def reading(self) -> AbstractContextManager[None]:
        """Run a forward whose graph begins at the outputs; no parameter may require a gradient meanwhile."""
        self._calls.clear()
        self._cuts.clear()

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            layout = self._taps.get((module, self._calls[module]))
            self._calls[module] += 1
            if layout is None or not isinstance(output, Tensor):
                return None
            start = output.detach().requires_grad_().clone()  # no leaf: it may be changed in place behind its module
            self._cuts.append((get_gradient_edge(start), tuple(start.shape), layout))
            return start

        return _hooked({module for module, _ in self._taps}, cut)

    def norms(self, loss: Tensor, batch_size: int) -> Tensor | None:
        """Take the norms ``(B,)`` of the samples' rows at the outputs read, times B; None where others were."""
        if loss.grad_fn is None or len(self._cuts) != len(self._taps):
            return None
        found = (layout.place(shape, batch_size) for _, shape, layout in self._cuts)
        places = [place for place in found if place is not None]
        if len(places) < len(self._cuts):
            return None
        norms = norms_at(loss, [edge for edge, _, _ in self._cuts], places, weight=batch_size)
        self._cuts.clear()
        return norms


@contextmanager
def _hooked(modules: set[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(hook))
        yield


def _is_output_of(node: Node | None, entry: Entry) -> bool:
    """Tell whether an output is an entry, but for reshapes and casts."""
    for _ in range(_STEPS):
        if node is None:
            return False
        if node is entry.node:
            return entry.output_nr == 0
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) != 1:
            return False
        node = children[0]
    return False
