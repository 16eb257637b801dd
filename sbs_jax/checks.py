"""Check values that users write; errors name the value, what was expected, and the nearest right one.

Each check returns nothing and raises ValueError. `name` begins the message: "TrainConfig.keep_best".
"""

import operator
import re
import sys
from collections.abc import Collection, Iterable

# Flags and fields that may name a place on Cloud Storage.
ON_BUCKETS = (
    *("adapters", "assets", "augmentation", "base", "batch_folder", "checkpoint_path", "corpus"),
    *("initial_checkpoint_path", "input", "inputs_dir", "measured", "model_dir", "old_run_flags", "output"),
    *("output_dir", "page", "records_dir", "release", "run_dirs", "run_flag", "run_flags", "soft_targets"),
    *("gin_file", "source", "sweep_dir", "target", "tfds_data_dir", "vocabulary"),
)
_URL = re.compile(r"(gs|s3a?|hdfs|file|abfss?):/|[a-z][\w+.-]+://", re.ASCII | re.IGNORECASE)


def whole_number(name: str, value: object, *, least: int | None = None) -> None:
    """Requires an int, of at least `least` if given; bool is not one.

    >>> whole_number("keep_best", -1, least=0)
    Traceback (most recent call last):
    ValueError: keep_best is -1; expected a whole number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} is {value!r}; expected a whole number{bound}.")


def number(
    name: str,
    value: object,
    *,
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Requires a finite int or float within the bounds that are given; bool is not one.

    >>> number("fraction", 2, above=0, most=1)
    Traceback (most recent call last):
    ValueError: fraction is 2; expected a number above 0 and at most 1.
    """
    bounds = (
        ("of at least", least, operator.ge),
        ("above", above, operator.gt),
        ("at most", most, operator.le),
        ("below", below, operator.lt),
    )
    given = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
    in_bounds = (
        not isinstance(value, bool)
        and isinstance(value, int | float)
        and abs(value) <= sys.float_info.max  # false for NaN, infinities and ints that no float holds
        and all(holds(value, bound) for _, bound, holds in given)
    )
    if not in_bounds:
        expected = " and ".join(f"{words} {bound:g}" for words, bound, _ in given)
        raise ValueError(f"{name} is {value!r}; expected a number{f' {expected}' if expected else ''}.")


def choice(name: str, value: object, known: Collection[str]) -> None:
    """Requires one of the known words."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.{nearest(str(value), known)}")


def local_path(name: str, value: str, *, or_bucket: bool = False) -> None:
    """Refuses a text that begins as the address of a file elsewhere: "gs://..", "s3://..", "file://..".

    `Path` would take it for a folder below the current one. With `or_bucket`, "gs://.." is fine.

    >>> local_path("--store", "gs://bucket/store.sqlite")
    Traceback (most recent call last):
    ValueError: --store is 'gs://bucket/store.sqlite'; expected a local path. Copy what is there to a disk.
    """
    if _URL.match(value) and not (or_bucket and value.startswith("gs://")):
        expected = f"a local path{' or gs://' if or_bucket else ''}"
        raise ValueError(f"{name} is {value[:200]!r}; expected {expected}. Copy what is there to a disk.")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'a' or 'b'?" with the known names nearest to `name`, or "" where none is near."""
    import difflib  # late: most commands have no mistake to explain

    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
