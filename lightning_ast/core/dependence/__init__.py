"""Step 2 of a batch: which rows of which tensors depend on which sample, seen by changing one sample.

In the order of a forward: ``trace`` asks ``perturbed`` for the batch with one sample changed, and gives it to
``shadows`` as second values beside the real ones. Each operation of the forward then comes to ``shadow_run``, which
runs it again on the shadows as ``shadow_ops`` allows. ``records`` keeps the results by the autograd node that made
them, and compares a result with its shadow once it is asked for. ``order`` follows a second sample, to see whether the
step keeps the order of its batch.
"""

__all__: list[str] = []
