"""Real images, two small networks and the comparison that ``lightning-ast demo`` runs."""

from lightning_ast.demo.data import DataNotFoundError, ImageData
from lightning_ast.demo.models import ImageClassifier, ResNet9, SimpleCNN

__all__ = ["DataNotFoundError", "ImageClassifier", "ImageData", "ResNet9", "SimpleCNN"]
