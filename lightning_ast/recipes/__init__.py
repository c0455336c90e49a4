"""What several recipes share and a configuration imports by its class path: data, modules and the like."""

from lightning_ast.recipes.fine_tuned import FineTunedClassifier, with_new_head
from lightning_ast.recipes.image_folder import ImageFolderDataModule

__all__ = ["FineTunedClassifier", "ImageFolderDataModule", "with_new_head"]
