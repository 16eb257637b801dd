"""Distilling Step-by-Step for JAX: small students that learn from a large model's rationales.

`distill`, `Student` and its `Settings` are the Python interface (api.py), imported when used; `sbs` is the command.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbs_jax.api import Settings as Settings
    from sbs_jax.api import Student as Student
    from sbs_jax.api import distill as distill

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("Settings", "Student", "distill"):
        raise AttributeError(f"sbs_jax has no {name!r}; it has distill, Student and Settings, and modules to import.")
    importlib.import_module("sbs_jax.cli.main").import_tensorflow()
    return getattr(importlib.import_module("sbs_jax.api"), name)
