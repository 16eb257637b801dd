"""A request to a teacher, of any form and with any parameters."""

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
