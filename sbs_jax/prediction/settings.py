"""Options of decoding, and the answer that they give."""

import dataclasses
from collections.abc import Mapping

from sbs_jax import checks
from sbs_jax.data import selection
from sbs_jax.prediction import precision

GREEDY, BEAM, SAMPLE, CHOICES = DECODINGS = ("greedy", "beam", "sample", "choices")
OBJECTIVES = (selection.LABEL, selection.RATIONALE)
TOO_LONG = ("error", "cut")
# Choices per question; the limit bounds the cost of one row.
MOST_CHOICES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of decoding and batching.

    Attributes:
      decoding: "greedy", "beam", "sample", or "choices" (the most likely of a closed set of labels).
      beams, length_penalty: beam search scores a sequence by log probability / tokens ** length_penalty.
      temperature, top_k (0: all tokens), top_p, seed: options of sampling (`decoding.sample`).
      rationale: also return the rationale, generated with the same decoding (greedy if that is "choices"). A cascade's
        student always writes one, and its label's `score` is that of the label after it.
      batch_size: rows at a time.
      smaller: further batch sizes to compile, for batches that are not full.
      weights: precision of the matrices (precision.py).
      objective: "label", or "rationale" to answer with only the rationale.
      too_long: for an input longer than the training length: "error", or "cut" to truncate it. Inputs of a second step,
        which hold a rationale, are always truncated.
    """

    decoding: str = GREEDY
    beams: int = 4
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    rationale: bool = False
    batch_size: int = 32
    smaller: tuple[int, ...] = ()
    weights: str = precision.FLOAT32
    objective: str = selection.LABEL
    too_long: str = "error"

    def __post_init__(self) -> None:
        for name, known in (
            ("decoding", DECODINGS),
            ("weights", precision.WEIGHTS),
            ("objective", OBJECTIVES),
            ("too_long", TOO_LONG),
        ):
            checks.choice(f"Settings.{name}", getattr(self, name), known)
        for name, least in (("beams", 1), ("batch_size", 1), ("top_k", 0), ("seed", 0)):
            checks.whole_number(f"Settings.{name}", getattr(self, name), least=least)
        checks.number("Settings.temperature", self.temperature, above=0)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"Settings.top_p is {self.top_p!r}; expected a number above 0 and at most 1.")
        checks.number("Settings.length_penalty", self.length_penalty)
        if self.objective == selection.RATIONALE and (self.rationale or self.decoding == CHOICES):
            raise ValueError(
                "Settings.objective is 'rationale', which allows neither `rationale` nor decoding 'choices'. Set "
                "objective 'label', with `rationale` to have both."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A prediction with its natural log probability, or an `error`.

    `scores` holds the probability of each choice among these choices; they sum to 1. The `score` of a choice is its log
    probability among all texts.
    """

    id: str
    prediction: str | None
    score: float | None
    rationale: str | None = None
    scores: Mapping[str, float] | None = None
    error: str | None = None
