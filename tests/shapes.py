"""Limits jaxtyping's checks to functions and data classes whose annotations have shapes.

jaxtyping binds the arguments of every call and has them checked twice, so that a size `B` is the same in all of them;
that is half the time of a test that calls much. A function without such annotations is checked by beartype alone.
Nor is every copy of a function that is made within another one: writing its checks takes a millisecond each time.
"""

import collections
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

_everywhere = jaxtyping.jaxtyped
# Copies of a function within another one that are checked, of each place in the code.
_COPIES = 50
# Wrong types are the same error, a TypeError, wherever they are seen.
_check = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))
_made: collections.Counter[types.CodeType] = collections.Counter()


def only_where_there_are_some() -> None:
    """Applies to modules imported from now on: jaxtyping's import hook looks the decorator up by this attribute."""
    jaxtyping.jaxtyped = _decorator


def _decorator(*, typechecker: Callable) -> Callable:
    return functools.partial(_checked, typechecker=typechecker)


def _checked(subject: Any, *, typechecker: Callable) -> Any:
    if inspect.isclass(subject):
        start = vars(subject).get("__init__")
        if not dataclasses.is_dataclass(subject) or start is None:
            return subject
        if not speaks_of_shapes(start):
            subject.__init__ = _check(start)
            return subject
    elif inspect.isfunction(subject):
        if "<locals>" in subject.__qualname__:
            _made[subject.__code__] += 1
            if _made[subject.__code__] > _COPIES:
                return subject
        if not speaks_of_shapes(subject):
            return _check(subject)
    return _everywhere(subject, typechecker=typechecker)


def speaks_of_shapes(function: Callable) -> bool:
    """Returns whether an annotation is or contains one of jaxtyping's, or is a string that could be one."""
    return any(map(_has_shape, inspect.get_annotations(function).values()))


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, list | tuple):
        return any(map(_has_shape, hint))
    if isinstance(hint, str | typing.ForwardRef) or type(hint).__module__.startswith("jaxtyping"):
        return True
    return getattr(hint, "__module__", "").startswith("jaxtyping") or any(map(_has_shape, typing.get_args(hint)))
