"""Step 3 of a batch: where the gradient of a loss enters the network, and which of its rows belong to which sample.

``finder`` walks the loss's graph from the loss towards the parameters. At each node it asks ``node_views`` whether to
stop there, by a trace or by sizes; these read ``node_facts`` from the graph itself, and find the rows by ``layout``.
"""

__all__: list[str] = []
