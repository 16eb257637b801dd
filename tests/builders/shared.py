"""What tests of several pytest workers read, made once for all of them."""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest


def folder_of(name: str, make: Callable[[Path], object], factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of this name, which tests must not change; the first worker that asks fills it by `make`."""
    place = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    with (place / f"{name}.made").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the others wait for it
        file.seek(0)
        if not (made := file.read()):
            made = tempfile.mkdtemp(prefix=f"{name}-", dir=place)
            make(Path(made))
            file.write(made)
    return Path(made)
