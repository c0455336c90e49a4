"""Step 1 of a batch: its samples are found, counted, taken, looked at for NaN and replaced.

A batch enters at ``samples``. What lists its samples one by one is read by ``listing``, what nests by ``containers``,
graphs by ``graphs``, and a single tensor by ``rows``. ``replacement`` puts other samples in the place of lost ones.
"""

__all__: list[str] = []
