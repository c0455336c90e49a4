"""A pretrained network of torchvision with a new last layer, and the module that fine-tunes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ast.demo import ImageClassifier
from lightning_ast.errors import WeightsNotFoundError
from lightning_ast.extras import needs

with needs("vision", "torchvision"):
    from torchvision.models import get_model, get_model_weights

__all__ = ["FineTunedClassifier", "with_new_head"]

_IMAGENET_CLASSES = 1000
_LISTED_CLASSES = 100
"""The most classes whose accuracies are logged one by one; of more, the worst and the best are told."""


class FineTunedClassifier(ImageClassifier):
    """Trains all parameters of a pretrained network, with a new last layer, by SGD with momentum.

    The learning rate is ``lr`` in the first stage and ``second_lr`` from epoch ``second_stage`` on. Without
    ``second_lr`` it is one cycle over the whole run, which ends at zero.

    It logs ``train_loss``, ``val_loss``, ``val_acc``, ``val_top5``, ``val_acc_worst_class`` and, of up to 100 classes,
    ``val_acc_of/<class>``; in a test the same with ``test_``. At the end it prints the accuracy of each class.

    Args:
        network: The name of one of torchvision's classification models, or a network of your own with 1,000 classes.
        weights: ``"DEFAULT"`` or the name of weights that torchvision offers for the network, which are downloaded
            once; or the path of a ``.pth`` file with the network's state dict. None trains from scratch, and is what a
            network of your own needs.
        num_classes: The number of classes; for 1,000 a network of torchvision keeps its last layer.
        fresh_head: Whether the last layer is a new one for 1,000 classes, too.
        lr: The learning rate of the first stage, or the highest one of the cycle.
        second_lr: The learning rate of the second stage; None makes one cycle.
        second_stage: The epoch that begins the second stage, counted from 0; it is that of the warmup's end.
        weight_decay: The L2 penalty.

    Raises:
        WeightsNotFoundError: The weights cannot be downloaded, or the file is missing or not of this network.
        ValueError: The data module has another number of classes (before the first batch).

    Example:
        >>> module = FineTunedClassifier("resnet18", weights=None, num_classes=10)
        >>> module(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: str | nn.Module = "resnet50",
        weights: str | None = "DEFAULT",
        num_classes: int = 100,
        fresh_head: bool = False,
        lr: float = 0.01,
        second_lr: float | None = None,
        second_stage: int = 10,
        weight_decay: float = 1e-4,
    ) -> None:
        net = _pretrained(network, weights) if isinstance(network, str) else network
        if fresh_head or num_classes != _IMAGENET_CLASSES or not isinstance(network, str):
            net = with_new_head(net, num_classes)
        super().__init__(net, num_classes, lr=lr, weight_decay=weight_decay)
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else [])
        self.num_classes = num_classes
        self.second_lr = second_lr
        self.second_stage = second_stage
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        self.by_class = MulticlassAccuracy(num_classes, average=None)
        self.class_accuracies: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(B, num_classes)``; networks with auxiliary heads give them beside others."""
        outputs: Any = self.net(x)
        scores: Tensor = getattr(outputs, "logits", outputs)
        return scores

    def setup(self, stage: str) -> None:
        """Compare the number of classes with that of the data module, where it names its classes."""
        names = self._class_names()
        if names is not None and len(names) != self.num_classes:
            raise ValueError(
                f"expected num_classes to be the number of classes of the data, {len(names)}, got {self.num_classes}: "
                f"pass --model.init_args.num_classes {len(names)}."
            )

    def _class_names(self) -> list[str] | None:
        data: Any = getattr(self.trainer, "datamodule", None)
        return getattr(data, "classes", None) or None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log accuracies and loss."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log accuracies and loss."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], part: str) -> None:
        images, labels = batch
        scores = self(images)
        self.val_acc(scores, labels)
        self.top5(scores, labels)
        self.by_class.update(scores, labels)
        self.log(f"{part}_loss", nn.functional.cross_entropy(scores, labels), sync_dist=True)
        self.log(f"{part}_acc", self.val_acc, prog_bar=True)
        self.log(f"{part}_top5", self.top5)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy of each class; a class without images counts as 0, as torchmetrics has it."""
        self._log_classes("val")

    def on_test_epoch_end(self) -> None:
        """Log and print the accuracy of each class."""
        self._log_classes("test")
        self.on_train_end()

    def _log_classes(self, part: str) -> None:
        accuracies = self.by_class.compute().tolist()
        self.by_class.reset()
        names = self._class_names() or [str(label) for label in range(len(accuracies))]
        self.class_accuracies = dict(zip(names, accuracies, strict=True))
        self.log(f"{part}_acc_worst_class", min(accuracies))
        if len(names) <= _LISTED_CLASSES:
            self.log_dict({f"{part}_acc_of/{name}": value for name, value in self.class_accuracies.items()})

    def on_train_end(self) -> None:
        """Print the accuracy of each class, the worst first."""
        ordered = sorted(self.class_accuracies.items(), key=lambda each: each[1])
        shown = ordered if len(ordered) <= _LISTED_CLASSES else [*ordered[:10], *ordered[-10:]]
        if shown:
            self.print("accuracy by class: " + " | ".join(f"{name} {value:.1%}" for name, value in shown))

    def configure_optimizers(self) -> Any:
        """Make an optimizer, and one cycle or two stages."""
        if self.second_lr is None:
            return super().configure_optimizers()
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        factor = self.second_lr / self.lr
        stages = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[self.second_stage], gamma=factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": stages, "interval": "epoch"}}


def with_new_head(net: nn.Module, num_classes: int, *, old_classes: int = _IMAGENET_CLASSES) -> nn.Module:
    """Put a fresh layer in the place of each that gives the scores of the old classes, auxiliary heads included.

    Args:
        net: The network; it is changed.
        num_classes: The number of the new classes.
        old_classes: The number of the old classes, by which the layers are found.

    Returns:
        The same network.

    Raises:
        ValueError: There is no linear layer or 1 x 1 convolution with that many outputs.

    Example:
        >>> with_new_head(nn.Sequential(nn.Linear(8, 1000)), 3)
        Sequential(
          (0): Linear(in_features=8, out_features=3, bias=True)
        )
    """
    found = False
    for owner in list(net.modules()):
        for name, layer in list(owner.named_children()):
            fresh: nn.Module | None = None
            if isinstance(layer, nn.Linear) and layer.out_features == old_classes:
                fresh = nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
            elif isinstance(layer, nn.Conv2d) and layer.out_channels == old_classes and layer.kernel_size == (1, 1):
                fresh = nn.Conv2d(layer.in_channels, num_classes, 1)
            if fresh is not None:
                setattr(owner, name, fresh)
                found = True
    if not found:
        raise ValueError(f"expected a layer with {old_classes} outputs to replace, found none in {type(net).__name__}.")
    return net


def _pretrained(network: str, weights: str | None) -> nn.Module:
    """Make a network of torchvision with its weights, which are downloaded, or read from a file."""
    is_file = weights is not None and (Path(weights).suffix in (".pth", ".pt") or Path(weights).exists())
    if weights is None or is_file:
        net: nn.Module = get_model(network, weights=None)
        return net if weights is None else _with_file(net, network, Path(weights).expanduser())
    offered = get_model_weights(network)
    if weights not in offered.__members__:
        known = ", ".join(offered.__members__)
        raise WeightsNotFoundError(f"weights: expected one of {known}, or a .pth file, got {weights!r} for {network}.")
    chosen = offered[weights]
    try:
        return get_model(network, weights=chosen)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:  # no network, no right to write, a file that was cut off
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsNotFoundError(
            f"the weights of {network} could not be downloaded ({type(error).__name__}: {error}). Do one of these:\n"
            f"  - fetch {chosen.url} on another machine, and put the file into {folder}\n"
            "  - pass the path of such a file: --model.init_args.weights FILE.pth\n"
            "  - train from scratch: --model.init_args.weights null"
        ) from error


def _with_file(net: nn.Module, network: str, path: Path) -> nn.Module:
    if not path.is_file():
        raise WeightsNotFoundError(f"expected the weights of {network} in a file, and there is no {path}.")
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch and pickle raise many kinds
        told = str(error).splitlines()
        raise WeightsNotFoundError(
            f"{path} does not hold the weights of torchvision's {network} with {_IMAGENET_CLASSES} classes: "
            f"{' '.join(line.strip() for line in told[:2])}"
        ) from error
    return net
