"""Parts that several recipes of ``examples/`` share; nothing of the package needs them."""

from lightning_ast.recipes.comparing import QUIET, chance, counting, one_cycle, work_share
from lightning_ast.recipes.scenes import CLOTHING_KINDS, Scene, make_scenes
from lightning_ast.recipes.text import load_text, text_windows
from lightning_ast.recipes.transformers import GPT, ViT

__all__ = [
    "CLOTHING_KINDS",
    "GPT",
    "QUIET",
    "Scene",
    "ViT",
    "chance",
    "counting",
    "load_text",
    "make_scenes",
    "one_cycle",
    "text_windows",
    "work_share",
]
