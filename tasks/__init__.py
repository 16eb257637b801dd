"""Datasets, one module each. Importing this package registers them.

To add a dataset, write a module that defines `DATASET`, a `sbs_jax.data.dataset.Dataset`; nothing else changes. A
dataset kept elsewhere registers itself with `sbs_jax.data.catalogue.add`.
"""

import importlib
import pkgutil

from sbs_jax.data import catalogue

for _module in pkgutil.iter_modules(__path__):
    _dataset = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "DATASET", None)
    if _dataset is not None:
        catalogue.add(_dataset)
