"""Small parts that the recipes in ``examples/`` share: each shows how little one needs."""

from lightning_ast.recipes.curriculum import at_random, diversity, easiest, entropy, hardest, margin

__all__ = ["at_random", "diversity", "easiest", "entropy", "hardest", "margin"]
