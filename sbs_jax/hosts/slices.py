"""The slices that the environment claims, in MEGASCALE_* variables: JAX counts processes and libtpu connects by them.

A host that replaces a preempted one can carry the variables of slices that are gone (ray#62893). JAX and libtpu then
wait for those slices without an end or a message.
"""

import os
from collections.abc import Mapping

_NUMBER, _INDEX, _ADDRESS = "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"
_REMEDY = "Unset the MEGASCALE_* variables if an earlier slice left them."


def claimed() -> dict[str, str]:
    """Returns the variables that all processes of one run must share."""
    return {name: os.environ[name] for name in (_NUMBER, _ADDRESS) if os.environ.get(name)}


def check(processes: int | None = None) -> None:
    """Raises ValueError for variables that contradict one another or the number of processes, if that is known."""
    given = {name: os.environ[name] for name in (_NUMBER, _INDEX, _ADDRESS) if os.environ.get(name)}
    if not given:
        return
    number = given.get(_NUMBER, "")
    if not number:
        raise ValueError(f"{' and '.join(given)} came without {_NUMBER}; expected all three or none. {_REMEDY}")
    if not (number.isascii() and number.isdigit() and int(number)):
        raise ValueError(f"{_NUMBER} is {number!r}; expected a whole number of at least 1. {_REMEDY}")
    if number == "1":
        return
    index = given.get(_INDEX, "")
    if _ADDRESS not in given or not (index.isascii() and index.isdigit() and int(index) < int(number)):
        raise ValueError(
            f"{_NUMBER} is {number}, with {_INDEX} {index!r} and {_ADDRESS} {given.get(_ADDRESS, '')!r}; expected an "
            f"index below {number} and an address. {_REMEDY}"
        )
    if processes is not None and processes % int(number):
        raise ValueError(
            f"{_NUMBER} is {number}, but the run has {processes} process{'' if processes == 1 else 'es'}; expected a "
            f"multiple of {number}. Start one on every host of all slices (--multihost). {_REMEDY}"
        )


def hint(claims: Mapping[str, str]) -> str:
    """Returns a sentence for errors about missing processes; "" for a single slice."""
    number = claims.get(_NUMBER, "1")
    return "" if number == "1" else f" {_NUMBER} asks for {number} slices. {_REMEDY}"
