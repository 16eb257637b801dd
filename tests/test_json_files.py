"""JSON as typed values, and atomic writes."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from sbs_jax.storage import atomic
from sbs_jax.storage.json_files import typed


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    kind: Literal["a", "b"] = "a"


class Drawing(TypedDict):
    points: tuple[Point, ...]
    names: dict[str, str | None]
    size: tuple[int, int]
    best: Point | None
    more: NotRequired[list[Any]]


DRAWING = {"points": [{"x": 1}, {"x": 2.5, "kind": "b"}], "names": {"n": None}, "size": [3, 4], "best": {"x": 0}}


def test_json_becomes_the_types_that_are_declared() -> None:
    assert typed({**DRAWING, "more": [1, "x"]}, Drawing) == {
        "points": (Point(1), Point(2.5, "b")),
        "names": {"n": None},
        "size": (3, 4),
        "best": Point(0),
        "more": [1, "x"],
    }
    assert typed(["a"], list[str]) == ["a"]
    assert typed({"x": 1, "new": 2}, Point, extra=True) == Point(1)
    assert typed({**DRAWING, "new": 2}, Drawing, extra=True)["new"] == 2  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": {}}, r"the field 'points' is \{\}; expected a list of objects\."),
        ({"points": [{"x": True}]}, r"the field 'points\[0\]\.x' is true; expected a number\."),
        ({"points": [{"x": 1, "kind": "c"}]}, r"'points\[0\]\.kind' is \"c\"; expected \"a\" or \"b\"\."),
        ({"points": [{}]}, r"the field 'points\[0\]\.x' is missing; got the fields \[\]\."),
        ({"points": [{"x": 1, "kin": "b"}]}, r"unknown field 'points\[0\]\.kin'; known are .* Did you mean 'kind'"),
        ({"names": {"n": 1}}, "the field 'names.n' is 1; expected text or null"),
        ({"size": [1, 2, 3]}, "expected 2 whole numbers"),
        ({"size": [1, 2.0]}, r"'size\[1\]' is 2\.0; expected a whole number"),
        ({"best": 1}, r"'best' is 1; expected an object with the fields \['x', 'kind'\] or null"),
        ({"most": []}, "unknown field 'most'.* Did you mean 'more'"),
    ],
)
def test_other_json_is_refused_by_file_and_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^a.json:3: .*{message}"):
        typed({**DRAWING, **change}, Drawing, where="a.json:3")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.replace(path, b"old")

    def broken_off() -> Iterator[bytes]:
        yield b"half"
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic.replacing(path) as file:
        file.writelines(broken_off())
    assert path.read_bytes() == b"old"
    atomic.replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
