"""Prices per model, the cost of tokens, and a rough count of tokens.

`prices.json` dates its prices. They change: check them, and override them with "IN,OUT" in USD per million tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path

from sbs_jax.storage.json_files import read_json, typed

PRICES = Path(__file__).with_name("prices.json")
BATCH = 0.5  # price factor of batch mode, the same at every provider here
_MILLION = 1_000_000
_BYTES_PER_TOKEN = 4

# Prefix of a full model name, as Google's own clients write it.
_FULL_NAME = re.compile(r"^(?:projects/[^/]+/locations/[^/]+/)?(?:publishers/google/)?models/")
# Suffix of a model's version: a date, a Gemini version, "latest". Other suffixes ("-audio-preview", "-image", "-mini")
# name other models at other prices.
_VERSION = re.compile(r"-(?:\d{4}-\d\d-\d\d|\d{3}|latest)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """USD per million tokens, sent and received. `batch` is the price factor of batch mode.

    `as_of` is the day of the price; None for a price from the user.
    """

    input: float
    output: float
    batch: float
    as_of: str | None = None


def price(model: str, *, override: str | None) -> Price | None:
    """Returns the price of a model, or the user's own ("IN,OUT" or "IN,OUT,BATCH"); None if it is unknown.

    A version has the price of its model, unless it has its own entry. Raises ValueError for a malformed override.

    >>> price("gpt-4o-mini-2024-07-18", override=None).input
    0.15
    >>> price("a-model-of-mine", override="0.2,0.8").output
    0.8
    """
    if override is not None:
        return _given(override)
    models = _read(PRICES)
    name = _FULL_NAME.sub("", model)
    if name in models:
        return models[name]
    for known, listed in models.items():
        if name.startswith(known) and _VERSION.fullmatch(name[len(known) :]):
            return listed
    return None


def cost(price: Price, *, input_tokens: int, output_tokens: int, batch: bool) -> float:
    """Computes the cost of tokens in USD.

    >>> cost(Price(input=2.5, output=10.0, batch=0.5), input_tokens=1_000_000, output_tokens=100_000, batch=True)
    1.75
    """
    full = (input_tokens * price.input + output_tokens * price.output) / _MILLION
    return full * price.batch if batch else full


def check_limit(max_cost: float | int | None, price: Price | None, *, model: str) -> None:
    """Raises ValueError for a cost limit if the price is unknown."""
    if max_cost is not None and price is None:
        raise ValueError(
            f"The price of {model!r} is unknown, so max_cost cannot be enforced. Give it in USD per million tokens, "
            "--price IN,OUT, or set --max_requests instead."
        )


def estimate_tokens(text: str) -> int:
    """Estimates the tokens of a text: a quarter of its bytes in UTF-8, rounded up.

    Tokenizers differ, and those of hosted models are not public. Compared with T5's tokenizer on prompts, inputs and
    replies of e-SNLI, ANLI, CQA and SVAMP, totals are 86 to 106 %, and nine of ten single texts 74 to 123 %. The cost
    of a reply is counted from the provider's own numbers.
    """
    return math.ceil(len(text.encode(errors="replace")) / _BYTES_PER_TOKEN)


def _given(text: str) -> Price:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    right = len(numbers) in (2, 3) and all(math.isfinite(number) and number >= 0 for number in numbers)
    if not right or (len(numbers) == 3 and numbers[2] > 1):
        raise ValueError(
            f"The price is {text!r}; expected IN,OUT in USD per million tokens, such as 2.5,10. A third number, at "
            "most 1, replaces 0.5 as the factor of batch mode."
        )
    return Price(input=numbers[0], output=numbers[1], batch=numbers[2] if len(numbers) == 3 else BATCH)


@functools.cache
def _read(path: Path) -> dict[str, Price]:
    return typed(read_json(path)["models"], dict[str, Price], where=str(path))
