"""Real images, two small networks and the comparison that ``lightning-ast demo`` runs."""

from lightning_ast.demo.data import ImageData
from lightning_ast.demo.models import ImageClassifier, ResNet9, SimpleCNN
from lightning_ast.errors import DataNotFoundError

__all__ = ["DataNotFoundError", "ImageClassifier", "ImageData", "ResNet9", "SimpleCNN"]
