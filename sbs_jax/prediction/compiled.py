"""Cache of compiled programs on disk, so that a second start compiles nothing.

JAX writes its cache files in place, so a killed or concurrent process could leave or read half a program. Each process
therefore gives JAX a separate folder that links to the cached programs; new ones are moved into the cache when they
are complete. Each version of JAX and kind of processor has its own cache folder.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbs_jax import checks
from sbs_jax.storage import atomic, places

OFF = "off"
VARIABLE = "SBS_COMPILED"
_SUFFIX = "-cache"  # of JAX's cache files


def default() -> str:
    """Returns the default cache folder: SBS_COMPILED, else below the user's cache folder.

    "off" where the user has given JAX a cache of its own (JAX_COMPILATION_CACHE_DIR).
    """
    checks.local_path(VARIABLE, os.environ.get(VARIABLE, ""))
    if not os.environ.get(VARIABLE) and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return OFF
    return os.environ.get(VARIABLE) or str(places.user_cache() / "compiled")


@dataclasses.dataclass(frozen=True)
class Cache:
    """The folder that JAX uses in this process, and the cache that it belongs to; both None without a cache."""

    own: Path | None = None
    place: Path | None = None

    def keep(self) -> int:
        """Moves new programs into the cache, and returns their number. No program may be compiled meanwhile."""
        return 0 if self.own is None or self.place is None else add(self.own, self.place)

    def discard(self) -> None:
        """Removes the folder of a process that ends while a program is compiled."""
        if self.own is not None:
            shutil.rmtree(self.own, ignore_errors=True)


@contextlib.contextmanager
def kept(folder: str) -> Iterator[Cache]:
    """Reads programs from the folder inside the context, and adds new ones at its end; "off" disables both.

    It changes JAX's global settings, so compile in one thread only.
    """
    if folder == OFF:
        yield Cache()
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    place = Path(folder) / _kind()
    settings: dict[str, Any] = {
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        # XLA's own caches would put this process's folder into the cache key.
        "jax_persistent_cache_enable_xla_caches": "",
    }
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"sbs-jax-compiled-{os.getpid()}-") as own:
        settings["jax_compilation_cache_dir"] = own
        _take(place, Path(own))
        before = {name: getattr(jax.config, name) for name in settings}
        _set(settings)
        compilation_cache.reset_cache()
        try:
            yield Cache(Path(own), place)
        finally:
            _set(before)
            compilation_cache.reset_cache()
            add(Path(own), place)


def _set(settings: dict[str, Any]) -> None:
    import jax

    for name, value in settings.items():
        jax.config.update(name, value)


def _kind() -> str:
    """Names the cache folder by JAX versions, platform and processor features, which CPU programs depend on."""
    import jax

    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = (
        jax.__version__,
        importlib.metadata.version("jaxlib"),
        jax.default_backend(),
        platform.machine(),
        processor(),
        flags,
    )
    return f"jax-{jax.__version__}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def processor() -> str:
    """Returns the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _take(place: Path, own: Path) -> None:
    for entry in place.glob(f"*{_SUFFIX}"):
        (own / entry.name).symlink_to(entry.resolve())


def add(own: Path, place: Path) -> int:
    """Moves new programs from `own` to `place`, each complete before it gets its name; returns their number."""
    new = [entry for entry in own.glob(f"*{_SUFFIX}") if not (entry.is_symlink() or (place / entry.name).exists())]
    for entry in new:
        atomic.replace(place / entry.name, entry.read_bytes(), ours=False)
    return len(new)
