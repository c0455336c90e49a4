"""Step 6 in mode ``partial``: one forward over the batch, a backward that computes over the selected rows only.

In the order of a backward: ``rows`` knows the selected samples and gathers their rows of a gradient. ``gradient`` wraps
these in a tensor of full shape, which autograd hands from formula to formula. Each op of a formula is looked up in the
``registry``, which ``rules`` fill, and run on the rows alone; ``memory`` is what formulas write into. ``flops`` counts
what was run. ``selection`` begins such a backward from per-sample losses, without a gate.
"""

from lightning_ast.core.partial import rules

__all__ = ["rules"]
