"""What several recipes share and a configuration imports by its class path: data, modules and the like."""

from lightning_ast.recipes.comparing import QUIET, chance, counting, one_cycle, work_share
from lightning_ast.recipes.configured import configured, figures, without_selection
from lightning_ast.recipes.fine_tuned import FineTunedClassifier, with_new_head
from lightning_ast.recipes.image_folder import ImageFolderDataModule
from lightning_ast.recipes.original_rule import OriginalRule

__all__ = [
    "QUIET",
    "FineTunedClassifier",
    "ImageFolderDataModule",
    "OriginalRule",
    "chance",
    "configured",
    "counting",
    "figures",
    "one_cycle",
    "with_new_head",
    "without_selection",
    "work_share",
]
