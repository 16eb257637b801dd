"""Values against the types that parameters declare; a type that is not understood accepts every value."""

import collections.abc
import contextlib
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

ANYTHING: Any = object()  # in place of a value that is not known yet
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text in quotes", type(None): "None"}
_SEQUENCES = (collections.abc.Sequence, list, tuple)
_MAPPINGS = (collections.abc.Mapping, dict)
_LITERALS = (*_WORDS, complex, bytes, list, tuple, dict, set)


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the declared types of a function's parameters, or of a class's constructor, as far as they are readable.

    A parameter whose default is None may be None, whatever it declares.
    """
    try:
        signature = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built-in functions have none
        return {}
    found = {name: each.annotation for name, each in signature.items()}
    with contextlib.suppress(Exception):  # annotations of other packages may name anything
        found |= typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    return {
        name: typing.Optional[found[name]] if each.default is None else found[name]  # noqa: UP045  (texts too)
        for name, each in signature.items()
        if each.annotation is not each.empty
    }


def expected(value: Any, declared: Any) -> str | None:
    """Describes the declared type if the value is certainly of another, else returns None.

    >>> expected("1000", int), expected(1, float), expected((1, "a"), tuple[int, ...])
    ('a whole number', None, 'a list of whole numbers')
    """
    kinds = _members(declared)
    if any(_holds(value, kind) for kind in kinds):
        return None
    shown = [kind for kind in kinds if float not in kinds or kind not in (int, bool)]
    return " or ".join(dict.fromkeys(filter(None, map(_described, shown)))) or "another type"


def _members(declared: Any) -> list[Any]:
    """Lists the members of a union, nested ones too."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(declared) for member in _members(part)]
    return [declared]


def _fits(value: Any, declared: Any) -> bool:
    return expected(value, declared) is None


def _holds(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if value is ANYTHING:
        return True
    if kind in _WORDS:
        return type(value) in ((int, float) if kind is float else (kind,))
    if origin is Literal:
        return value in inner
    if kind in _SEQUENCES or origin in _SEQUENCES:
        item = inner[0] if inner else Any
        return isinstance(value, list | tuple) and all(_fits(each, item) for each in value)
    if kind in _MAPPINGS or origin in _MAPPINGS:
        name, item = inner or (Any, Any)
        return isinstance(value, dict) and all(_fits(k, name) and _fits(each, item) for k, each in value.items())
    if dataclasses.is_dataclass(kind) and callable(value):
        return False
    if kind is Any or type(value) not in _LITERALS:
        return True
    if isinstance(kind, type):
        with contextlib.suppress(TypeError):  # a protocol that cannot be checked
            return isinstance(value, kind)
    return origin is not collections.abc.Callable


def _described(kind: Any) -> str | None:
    """Describes a type in a message; None for classes of other packages."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if kind in _SEQUENCES or origin in _SEQUENCES:
        items = _items(inner[0]) if inner else "values"
        return f"a list of {items}"
    if kind in _MAPPINGS or origin in _MAPPINGS:
        return f"names with {_items(inner[1]) if inner else 'values'}, such as {{'name': ..}}"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return f"a reference to a {kind.__name__}, @..()"
    return "a reference, @.." if origin is collections.abc.Callable else None


def _items(declared: Any) -> str:
    """Describes several values of a type: "whole numbers"."""
    words = {int: "whole numbers", float: "numbers", str: "texts in quotes"}
    return " or ".join(dict.fromkeys(words.get(kind, "values") for kind in _members(declared)))
