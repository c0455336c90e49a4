"""The original's package beside ours: `adaptive-sparse-training` from PyPI, run as it is.

It has a training loop of its own. Nothing is set but the target: its optimizer is Adam with a constant learning rate,
its threshold starts at 3.0, its gradients are clipped at 1.0. It runs the forward twice and the whole backward.
Source: Idiakhoa (2025), pypi.org/project/adaptive-sparse-training 1.0.1.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from regime_data import RegimeData
from regime_run import Run
from regime_trace import Stopwatch
from torch import Tensor, nn

__all__ = ["fit_original"]


class _Loader:
    """A loader of augmented batches without indices, as a user of the package would have it."""

    def __init__(self, data: RegimeData, *, train: bool) -> None:
        self._data = data
        self._train = train
        self._loader = data.train_dataloader() if train else data.val_dataloader()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, *_ in self._loader:
            yield self._data.pixels(images, augment=self._train), labels


def fit_original(run: Run, net: nn.Module, data: RegimeData, watch: Stopwatch) -> dict[str, Any]:
    """Train with the package's own trainer.

    Args:
        run: The run; its option ``rate`` is the target.
        net: The network.
        data: The data of the run.
        watch: The watch that measures training without validation.

    Returns:
        The history of the package's trainer: accuracy and savings in percent, activation rates.

    Raises:
        RuntimeError: The package is not installed.
    """
    try:
        from adaptive_sparse_training import AdaptiveSparseTrainer, ASTConfig
    except ImportError as error:
        raise RuntimeError(
            "expected the original's package: pip install --no-deps --target FOLDER adaptive-sparse-training (it needs "
            "tqdm), and put FOLDER on PYTHONPATH."
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ASTConfig(
        target_activation_rate=float(run.option("rate", 0.4)), device=device, use_amp=torch.cuda.is_available()
    )
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = AdaptiveSparseTrainer(net, _Loader(data, train=True), _Loader(data, train=False), config)
    evaluate = trainer.evaluate

    def unmeasured() -> float:
        watch.stop()
        accuracy: float = evaluate()
        watch.start()
        return accuracy

    trainer.evaluate = unmeasured
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        watch.start()
        trainer.train(epochs=run.epochs)
        watch.stop()
    history: dict[str, Any] = trainer.history
    return history
