"""An extension of griffe that turns the docstrings of the package into Markdown for the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["Markdown", "to_markdown"]

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Turn a docstring's references into links, and its example into a section of code.

    Example:
        >>> to_markdown("See :meth:`state_dict`.")
        'See `state_dict`.'
    """
    return _EXAMPLE.sub("Examples:", _ROLE.sub(_link, text))


def _link(role: re.Match[str]) -> str:
    is_short, path = role.groups()
    shown = path.rsplit(".", 1)[-1] if is_short else path
    if not path.startswith("lightning_ast."):  # the API pages are linked by full names alone
        return f"`{shown}`"
    # an optional reference: a name without a place on the API pages is left as code
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


class Markdown(griffe.Extension):
    """Rewrites every docstring once it has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
