"""What a teacher costs: prices per model, the cost of tokens, and a rough count of tokens.

The prices are in `prices.json`, with the dates they are from: they change, so check them, and override them with
"IN,OUT" in USD per million tokens. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

from sbs_jax.storage.json_files import read_json

PRICES = Path(__file__).with_name("prices.json")
BATCH = 0.5  # the factor of batch mode at every provider here
_MILLION = 1_000_000
_BYTES_PER_TOKEN = 4

# How Google's own clients write a model's name in full.
_FULL_NAME = re.compile(r"^(?:projects/[^/]+/locations/[^/]+/)?(?:publishers/google/)?models/")
# What a provider adds to a model's name for one version of it: a day, a Gemini version, "latest". Other endings
# ("-audio-preview", "-image", "-mini") are other models at other prices.
_VERSION = re.compile(r"-(?:\d{4}-\d\d-\d\d|\d{3}|latest)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """USD per million tokens, sent and received; `batch` is the factor of batch mode.

    `as_of` is the day on which the price was right; None for a price that the user gave.
    """

    input: float
    output: float
    batch: float
    as_of: str | None = None


def price(model: str, *, override: str | None) -> Price | None:
    """The price of a model, or the user's own, "IN,OUT" or "IN,OUT,BATCH"; None where it is not known.

    A dated name has the price of the model it is a version of, unless it is listed itself. ValueError for an override
    that is no price.

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
    """USD for so many tokens sent and received.

    >>> cost(Price(input=2.5, output=10.0, batch=0.5), input_tokens=1_000_000, output_tokens=100_000, batch=True)
    1.75
    """
    full = (input_tokens * price.input + output_tokens * price.output) / _MILLION
    return full * price.batch if batch else full


def check_limit(max_cost: float | int | None, price: Price | None, *, model: str) -> None:
    """Raises ValueError for a limit of cost without a price to count by."""
    if max_cost is not None and price is None:
        raise ValueError(
            f"The price of {model!r} is unknown, so max_cost cannot be kept. Give it in USD per million tokens, "
            "--price IN,OUT, or set --max_requests instead."
        )


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is: a quarter of its bytes in UTF-8, rounded up.

    Rough: tokenizers differ, and those of hosted models are not at hand. Of the T5 tokenizer's counts of the prompts,
    inputs and replies of e-SNLI, ANLI, CQA and SVAMP it gives 86 to 106 % in total, and 74 to 123 % for nine of ten
    single texts. What a reply has cost is counted from the provider's own numbers.
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
            f"The price is {text!r}; expected IN,OUT in USD per million tokens, such as 2.5,10, with the factor of "
            "batch mode, at most 1, as a third number where it is not 0.5."
        )
    return Price(input=numbers[0], output=numbers[1], batch=numbers[2] if len(numbers) == 3 else BATCH)


@functools.cache
def _read(path: Path) -> dict[str, Price]:
    """The prices of a file, by model. ValueError names the file and the model."""
    value: dict[str, Any] = read_json(path)
    models = {}
    for name, fields in value["models"].items():
        try:
            models[name] = Price(**fields)
        except TypeError as error:
            raise ValueError(
                f"{path}: {name!r} is {fields!r}; expected input, output, batch and as_of ({error})."
            ) from None
    return models
