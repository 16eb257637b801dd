"""Description of a run's whole configuration as JSON, including defaults that no config file mentions.

Resuming compares it (manifest.py), so a changed default of a library or of this code is noticed.
"""

import dataclasses
import functools
import hashlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_LISTED = 64  # values of an array to list; larger arrays are hashed


def describe(config: Any) -> dict[str, Any]:
    """Describes a `train.TrainConfig` as JSON values: nested dataclasses, and callables by name with their defaults.

    `optax.adamw`, bare or wrapped by gin, is {"callable": "optax.adamw", "defaults": {"b1": 0.9, ..}}; arguments bound
    by gin are in the configuration's text. A schedule is described by its values at some steps: {"0": 0.001, "60": ..}.
    Two lambdas of one module look the same.
    """
    last = config.train_steps - 1
    steps = sorted({step for step in (0, 1, config.train_steps // 10, config.train_steps // 2) if step < last} | {last})
    found = {field.name: _json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    for name in ("learning_rate", "alpha"):
        if callable(schedule := getattr(config, name)):
            found[name] = {str(step): _json(float(np.asarray(schedule(step)))) for step in steps}
    return found


def _json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _json(part) for name, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_json(part) for part in value), key=repr)
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        return _array(np.asarray(value))
    if callable(value):
        return _callable(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # addresses differ in every process


def _array(array: np.ndarray) -> Any:
    if array.ndim == 0:
        return _json(array.item())
    if array.size <= _LISTED:
        return _json(array.tolist())
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }


def _callable(function: Callable[..., Any]) -> dict[str, Any]:
    """Describes a callable: name, arguments of a partial, wrappers other than gin's, defaults of the rest."""
    described: dict[str, Any] = {"callable": _name(function)}
    inner: Any = function
    wrappers = []
    while True:
        if isinstance(inner, functools.partial):
            described.setdefault("arguments", []).extend(_json(inner.args))
            inner = inner.func
        elif hasattr(inner, "__wrapped__"):
            module = getattr(inner, "__globals__", {}).get("__name__", "")
            if module.partition(".")[0] != "gin":
                wrappers.append(module)
            inner = inner.__wrapped__
        elif isinstance(inner, type) and _name(inner) == _name(inner.__base__):
            inner = inner.__base__  # gin configures a class by a subclass of the same name
        else:
            break
    if wrappers:
        described["wrapped_by"] = wrappers
    described["callable"] = _name(inner)
    try:
        # For a class, the signature of the original: gin's wrapper takes anything.
        signature = inspect.signature(inner if isinstance(inner, type) else function)
    except (ValueError, TypeError):  # built-in functions have none
        return described
    defaults = {
        name: _default(parameter.default)
        for name, parameter in signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return described | {"defaults": defaults}


def _default(value: Any) -> Any:
    """Describes a default; a callable only by its name, because its own defaults could nest endlessly."""
    return _name(value) if callable(value) and not hasattr(value, "__array__") else _json(value)


def _name(function: Any) -> str:
    """Returns the shortest importable name, "optax.adamw": "optax._src.alias.adamw" may change with a version."""
    module = getattr(function, "__module__", None) or "builtins"
    name = getattr(function, "__qualname__", None)
    if name is None:  # an object that can be called
        module, name = type(function).__module__, type(function).__qualname__
    parts = module.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        held = getattr(sys.modules.get(package), name, None)
        if held is not None and inspect.unwrap(held) is inspect.unwrap(function):
            return f"{package}.{name}"
    return f"{module}.{name}"
