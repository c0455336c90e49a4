"""Step 1 of a batch: its samples are found, counted, taken, looked at for NaN and replaced.

A batch enters at ``samples``. What nests in it is read by ``containers``, and graphs by ``graphs``.
``inputs`` looks at the numbers, and puts other samples in the place of lost ones.
"""

__all__: list[str] = []
