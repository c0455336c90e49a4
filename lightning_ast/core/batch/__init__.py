"""Step 1 of a batch: its samples are found, counted, taken, looked at for NaN and replaced.

A batch enters at ``samples``. What lists its samples one by one is read by ``listing``, what nests by ``containers``,
graphs by ``graphs``, and a single tensor by ``rows``. ``replacement`` puts other samples in the place of lost ones.
"""

from lightning_ast.core.batch.samples import batch_size_of, first_input, select_batch
from lightning_ast.errors import BatchError, EmptyBatchError

__all__ = ["BatchError", "EmptyBatchError", "batch_size_of", "first_input", "select_batch"]
