"""Small parts that the recipes in ``examples/`` share: each shows how little one needs."""

from lightning_ast.recipes.comparing import QUIET, chance, counting, one_cycle, work_share
from lightning_ast.recipes.curriculum import at_random, diversity, easiest, entropy, hardest, margin
from lightning_ast.recipes.scenes import CLOTHING_KINDS, Scene, make_scenes
from lightning_ast.recipes.text import load_text, text_windows
from lightning_ast.recipes.transformers import GPT, ViT

__all__ = [
    "CLOTHING_KINDS",
    "GPT",
    "QUIET",
    "Scene",
    "ViT",
    "at_random",
    "chance",
    "counting",
    "diversity",
    "easiest",
    "entropy",
    "hardest",
    "load_text",
    "make_scenes",
    "margin",
    "one_cycle",
    "text_windows",
    "work_share",
]
