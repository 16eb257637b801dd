"""States that tests save, and processes that save them.

saver.py RUN                     until it is killed, once for each line of its input
saver.py RUN COORDINATOR INDEX   one of two, on a disk that gets full; ends with the steps that it sees
"""

import logging
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from sbs_jax import hosts
from sbs_jax.run import checkpoints
from sbs_jax.run.checkpoints import Checkpoints, Retention

NEWEST_TWO = Retention(newest=2, best=0, period=None)
_ADAM = optax.adam(1e-3)


def arrays(step: int, *, rows: int = 64) -> dict[str, Any]:
    """Makes parameters over all devices and an optimizer state, different for every step."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = np.random.default_rng(step).standard_normal((rows, 32), np.float32)
    parameters = {
        "encoder/w": jax.make_array_from_callback(values.shape, split, values.__getitem__),
        "scale": jax.make_array_from_callback((8,), whole, np.full((8,), step, np.float32).__getitem__),
    }
    placed = jax.tree.map(lambda x: split if x.ndim == 2 else whole, jax.eval_shape(_ADAM.init, parameters))
    optimizer = jax.jit(_ADAM.init, out_shardings=placed)(parameters)
    return {"parameters": parameters, "optimizer": optimizer, "metadata": {"step": step, "lines": 3 * step}}


def like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_restores(saver: Checkpoints, step: int) -> None:
    want = arrays(step)
    got = saver.restore(step, parameters=like(want["parameters"]), optimizer=like(want["optimizer"]))
    assert (got.step, got.metadata) == (step, want["metadata"])
    for restored, tree in ((got.parameters, want["parameters"]), (got.optimizer, want["optimizer"])):
        assert jax.tree.structure(restored) == jax.tree.structure(tree)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
            assert x.sharding == y.sharding
            for mine, theirs in zip(x.addressable_shards, y.addressable_shards, strict=True):
                np.testing.assert_array_equal(mine.data, theirs.data)


def _save(path: Path) -> None:
    with Checkpoints(path, retention=NEWEST_TWO, scores={}) as saver:
        start = saver.newest_good() or 0
        if start:
            assert_restores(saver, start)
        saver.save(start + 1, **arrays(start + 1))
        saver.wait()
        print(os.getpid(), flush=True)
        for step in range(start + 2, 100_000):
            saver.save(step, **arrays(step))
            time.sleep(0.01)


def fill(disk: Path, *, leaving: int) -> Path:
    """Fills a disk up to so many free bytes."""
    path = disk / "somebody else's"
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leaving)
    return path


def _fails(saver: Checkpoints, step: int) -> None:
    saver.save(step, **arrays(step))
    saver.wait()
    assert checkpoints.steps(saver.directory.parent) == [1]
    try:
        saver.finish(step, **arrays(step), patience=0.0)
    except OSError as error:
        print(f"step {step}: {error}", file=sys.stderr)
    else:
        raise AssertionError(f"step {step} was written")


def _save_together(path: Path) -> None:
    needed = sum(x.nbytes for name in ("parameters", "optimizer") for x in jax.tree.leaves(arrays(0)[name]))
    with Checkpoints(path, retention=NEWEST_TWO, scores={}) as saver:
        assert saver.newest_good() is None
        saver.save(1, **arrays(1))
        saver.wait()
        assert_restores(saver, 1)
        for step, leaving in ((2, needed // 2), (3, needed + 8192)):  # full before, and while it is written
            hosts.from_first(lambda leaving=leaving: str(fill(path.parent, leaving=leaving)))
            _fails(saver, step)
        hosts.from_first((path.parent / "somebody else's").unlink)
        # Process 1 alone may write no more than a few bytes.
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not hosts.is_first():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        _fails(saver, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        saver.save(5, **arrays(5))
        saver.save(6, **arrays(6))
        saver.wait()
        assert_restores(saver, 6)
        hosts.barrier()  # both have read it
        hosts.from_first(lambda: os.truncate(saver.directory / "6" / "optimizer" / "_METADATA", 7))
        assert saver.newest_good() == 5
        assert_restores(saver, 5)
    print(checkpoints.steps(path), flush=True)
    hosts.leave()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    if len(sys.argv) == 2:
        for _ in sys.stdin:
            if os.fork() == 0:  # before JAX starts threads
                _save(Path(sys.argv[1]))
            os.wait()
    else:
        logging.basicConfig(level=logging.WARNING)
        place = hosts.Place(coordinator=sys.argv[2], count=2, index=int(sys.argv[3]))
        hosts.join(place, timeout=60.0, detected=False)
        _save_together(Path(sys.argv[1]))
