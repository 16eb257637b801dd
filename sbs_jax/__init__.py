"""Distilling Step-by-Step for JAX: small students that learn from a large model's rationales.

`distill` and `Student` (api.py) are the Python interface, imported when they are used; `sbs` is the command line.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbs_jax.api import Student as Student
    from sbs_jax.api import distill as distill

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("Student", "distill"):
        raise AttributeError(f"sbs_jax has no {name!r}; it has distill and Student, and modules to import by name.")
    importlib.import_module("sbs_jax.cli.main").import_tensorflow()
    return getattr(importlib.import_module("sbs_jax.api"), name)
