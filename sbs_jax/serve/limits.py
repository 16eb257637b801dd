"""Limits on requests, with their defaults."""

import dataclasses

from sbs_jax import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds requests and connections. Times are in seconds.

    Attributes:
      max_batch: rows taken from the queue together; a row with choices counts as one for every 8 of them.
      max_wait: how long a first row waits for others while the model is idle.
      max_queue: waiting rows of all requests.
      max_inputs: rows of one request.
      max_choices: choices of one request, those of all its rows together.
      max_body_bytes: size of one request's body.
      max_connections: open connections.
      request_timeout: from the end of a request's body to its answer.
      read_timeout: for a request's headers, for its body, and for a client to read its answer.
      keep_alive: idle time of a connection, before a request or between two.
      stop_timeout: for requests in flight when the server stops.
    """

    max_batch: int = 128
    max_wait: float = 0.005
    max_queue: int = 1024
    max_inputs: int = 256
    max_choices: int = 4096
    max_body_bytes: int = 2**20
    max_connections: int = 1024
    request_timeout: float = 60.0
    read_timeout: float = 10.0
    keep_alive: float = 30.0
    stop_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int):
                checks.whole_number(field.name, value, least=1)
            elif field.name in ("request_timeout", "read_timeout"):
                checks.number(field.name, value, above=0)
            else:
                checks.number(field.name, value, least=0)
        if self.max_inputs > self.max_queue:
            raise ValueError(
                f"max_inputs is {self.max_inputs} and max_queue {self.max_queue}: a request of the most inputs would "
                "never find room. Raise max_queue or lower max_inputs."
            )
