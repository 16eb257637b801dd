"""Cards at the top of a page: a few questions, each with a rationale and answers."""

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

_LONGEST = 420  # characters of a text on a card

CARDS = 3


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of `who`; its verdict is "right", "wrong", "unusable" or "unjudged"."""

    who: str
    text: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """A question. `label` is the expected answer, if it is known; `about` names the dataset, if there are several."""

    question: str
    rationale: str | None
    answers: tuple[Answer, ...]
    label: str | None
    about: str = ""


def brief(text: str) -> str:
    """Shortens a text that is too long for a card."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} …"


def rank(row_id: str) -> int:
    """Hashes an id: the rows with the lowest ranks are an even sample of all, whatever their order."""
    return int.from_bytes(hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def by_rank(ids: Iterable[str], count: int) -> list[str]:
    """Returns this many ids with the lowest ranks."""
    return heapq.nsmallest(count, ids, key=rank)
