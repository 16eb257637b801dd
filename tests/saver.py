"""A process that saves checkpoints until it is killed, once for each line of its input; and what it saves."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from sbs_jax.checkpoints import Checkpoints, Retention

NEWEST_TWO = Retention(newest=2, best=0, period=None)
_ADAM = optax.adam(1e-3)


def arrays(step: int, *, rows: int = 64) -> dict[str, Any]:
    """Parameters over all devices, and an optimiser's state, that no other step has."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = np.random.default_rng(step).standard_normal((rows, 32), np.float32)
    parameters = {
        "encoder/w": jax.make_array_from_callback(values.shape, split, values.__getitem__),
        "scale": jax.make_array_from_callback((8,), whole, np.full((8,), step, np.float32).__getitem__),
    }
    optimizer = jax.jit(_ADAM.init)(parameters)
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


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    for _ in sys.stdin:
        if os.fork() == 0:  # before JAX starts threads
            _save(Path(sys.argv[1]))
        os.wait()
