"""Step 3 of a batch: where the gradient of a loss enters the network, and which of its rows belong to which sample.

``finder`` walks the loss's graph from the loss towards the parameters. At each node it asks ``node_views`` whether to
stop there, by a trace or by sizes; these read ``node_facts`` from the graph itself, and find the rows by ``layout``.
"""

from lightning_ast.core.entries.finder import Entry, EntryFinder, Found
from lightning_ast.errors import EntryError

__all__ = ["Entry", "EntryError", "EntryFinder", "Found"]
