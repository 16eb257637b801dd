"""Small file systems, for tests of disks that get full or read-only."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def mount(*arguments: object) -> None:
    """Runs `mount`; skips the test if this user may not."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")


@contextlib.contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    """Mounts a tmpfs with options such as "size=4m,nr_inodes=20"."""
    path.mkdir()
    mount("-t", "tmpfs", "-o", options, "tmpfs", path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)
