"""A Griffe extension that renders `>>>` paragraphs of docstrings as code instead of nested quotations."""

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Fences every paragraph that begins with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Fences the doctests of one module, class or function."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            parts = obj.docstring.value.split("\n\n")
            fenced = [f"```pycon\n{part}\n```" if part.startswith(">>> ") else part for part in parts]
            obj.docstring.value = "\n\n".join(fenced)
