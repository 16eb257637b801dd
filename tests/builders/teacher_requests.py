"""A request to a teacher, of any form and with any parameters; a row that the sampler asks about."""

import dataclasses

from sbs_jax.teacher.clients import Parameters, Request
from sbs_jax.teacher.prompts import Message, Prompt


def request(text: str = "Will it float?", *, form: str = "chat", sample: int = 0, **parameters: object) -> Request:
    messages = (Message("system", "Answer."), Message("user", "A?"), Message("assistant", "B."), Message("user", text))
    return Request(
        prompt=Prompt(messages=messages, text=f"Answer.\n\nA? B.\n\n{text}", stops=("\nQ:",), template="0" * 12),
        model="some-model",
        parameters=Parameters(**{"temperature": 0.0, "max_tokens": 100, **parameters}),
        form=form,
        sample=sample,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A row whose reply is read as "rationale:label"."""

    id: str
    label: str | None = "yes"

    def prompt(self, *, hint: str | None) -> Prompt:
        text = f"{self.id}?" if hint is None else f"{self.id}? It is {hint}."
        return Prompt(messages=(Message("user", text),), text=text, stops=(), template="t")

    def read(self, text: str) -> tuple[str | None, str | None]:
        rationale, _, label = text.partition(":")
        return rationale, label or None

    def agrees(self, label: str) -> bool:
        return label == self.label
