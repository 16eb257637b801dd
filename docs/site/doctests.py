"""A Griffe extension: `>>>` paragraphs of a docstring are code, not quotations of quotations in Markdown."""

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts a fence around every paragraph that begins with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Called for each module, class and function."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            parts = obj.docstring.value.split("\n\n")
            fenced = [f"```pycon\n{part}\n```" if part.startswith(">>> ") else part for part in parts]
            obj.docstring.value = "\n\n".join(fenced)
