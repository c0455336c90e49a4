"""What the recipes in ``examples/`` share, and a configuration imports by its class path."""

from lightning_ast.recipes.comparing import QUIET, Comparison, StopAfter, chance, counting, one_cycle, work_share
from lightning_ast.recipes.configured import configured, figures, without_selection
from lightning_ast.recipes.curriculum import diversity, easiest, entropy, hardest, margin
from lightning_ast.recipes.fine_tuned import FineTunedClassifier, with_new_head
from lightning_ast.recipes.image_folder import ImageFolderDataModule
from lightning_ast.recipes.original_rule import OriginalRule
from lightning_ast.recipes.scenes import CLOTHING_KINDS, Scene, make_scenes
from lightning_ast.recipes.text import load_text, text_windows
from lightning_ast.recipes.transformers import GPT, ViT

__all__ = [
    "CLOTHING_KINDS",
    "GPT",
    "QUIET",
    "Comparison",
    "FineTunedClassifier",
    "ImageFolderDataModule",
    "OriginalRule",
    "Scene",
    "StopAfter",
    "ViT",
    "chance",
    "configured",
    "counting",
    "diversity",
    "easiest",
    "entropy",
    "figures",
    "hardest",
    "load_text",
    "make_scenes",
    "margin",
    "one_cycle",
    "text_windows",
    "with_new_head",
    "without_selection",
    "work_share",
]
