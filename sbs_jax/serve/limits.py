"""Bounds on requests, with their defaults."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may take. Times are seconds.

    Attributes:
      max_batch: rows that are taken from the queue together at most.
      max_wait: how long a first row waits for others while the model is idle.
      max_queue: rows that may wait, of all requests.
      max_inputs: rows of one request.
      max_body_bytes: bytes of one request's body.
      max_connections: connections open at a time.
      request_timeout: from the end of a request's body to its answer.
      read_timeout: for a request's headers; for its body; for a client to take its answer.
      keep_alive: how long a connection may be idle between two requests.
      stop_timeout: for what is in flight when the server is told to end.
    """

    max_batch: int = 128
    max_wait: float = 0.005
    max_queue: int = 1024
    max_inputs: int = 256
    max_body_bytes: int = 2**20
    max_connections: int = 1024
    request_timeout: float = 60.0
    read_timeout: float = 10.0
    keep_alive: float = 30.0
    stop_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int) and value < 1:
                raise ValueError(f"{field.name} is {value}; expected at least 1.")
            if isinstance(field.default, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} is {value:g}; expected seconds, 0 or more.")
        for name in ("request_timeout", "read_timeout"):
            if not getattr(self, name):
                raise ValueError(f"{name} is 0; expected seconds above 0.")
        if self.max_inputs > self.max_queue:
            raise ValueError(
                f"max_inputs is {self.max_inputs} and max_queue {self.max_queue}: a request of the most inputs would "
                "never find room. Raise max_queue or lower max_inputs."
            )
