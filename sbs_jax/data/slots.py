"""Number slots: the numbers of a row become `<extra_id_k>` in its texts, and come back in the answer.

A number in pieces is hard for a small student to copy; as a slot it is one token, and rows that differ only in their
numbers become one. `Numbers.of(input)` lists a row's numbers; `hide` replaces them in any text of the row, and `fill`
puts them back:

    numbers = Numbers.of("Ann has 3 pens and buys 84.")
    numbers.hide("(84 + 3)")                                "( <extra_id_50> + <extra_id_1>)"
    numbers.hide("( 84.0 + 3.0 )")                          "( <extra_id_0>.0 + <extra_id_1>.0 )"
    numbers.fill("( <extra_id_0>.0 + <extra_id_1>.0 )")     "( 84.0 + 3.0 )"

Slot 0 is the largest number, slot 1 the next. So a student that sees no values still knows which is larger, and whether
to subtract one from the other (docs/experiments.md).

A vocabulary's sentinel includes the space before it, so slot k + 50 is number k without one: `fill(hide(text)) == text`
for every text without sentinels of its own. Standard library only (exports contain a copy).
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

# Digits with a decimal point or with commas between thousands: 84, 0.5, 1,200.
NUMBER = re.compile(r"(?<![0-9.])[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?![0-9])", re.ASCII)
SLOT = re.compile(r"( ?)<extra_id_([0-9]{1,2})>", re.ASCII)
MOST = 50  # numbers of a row, two sentinels each of the 100 of a T5 vocabulary; further numbers stay as they are


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The distinct numbers of a row's input as they are written there, largest first: slot k stands for `texts[k]`."""

    texts: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Numbers:
        """Lists the numbers of an input. ValueError if it has a slot already, which could not be told apart."""
        sentinel = SLOT.search(text)
        if sentinel is not None:
            raise ValueError(
                f"the input has {sentinel[0].strip()!r}, which stands for a number if NUMBER_SLOTS is True; remove it."
            )
        found = list(dict.fromkeys(NUMBER.findall(text)))[:MOST]
        return cls(tuple(sorted(found, key=lambda number: -Fraction(number.replace(",", "")))))

    def hide(self, text: str) -> str:
        """Replaces each number of the row by its slot; "84.0" for the row's "84" becomes the slot and ".0"."""
        positions = {number: k for k, number in enumerate(self.texts)}

        def slot(match: re.Match[str]) -> str:
            number = match[0] if match[0] in positions else match[0].removesuffix(".0")
            if number not in positions:
                return match[0]
            k, start = positions[number], match.start()
            spaced = start == 0 or text[start - 1] == " "
            return (f"<extra_id_{k}>" if spaced else f" <extra_id_{k + MOST}>") + match[0][len(number) :]

        return NUMBER.sub(slot, text)

    def fill(self, text: str) -> str:
        """Replaces each slot by its number; a slot without one stays, so that the answer is wrong and seen to be."""

        def number(match: re.Match[str]) -> str:
            k = int(match[2])
            if k % MOST >= len(self.texts):
                return match[0]
            return ("" if k >= MOST else match[1]) + self.texts[k % MOST]

        return SLOT.sub(number, text)


NO_NUMBERS = Numbers(())
