"""A partitioned training step compiled for TPU: no large array on every device, no needless transfers.

Compiled for eight absent chips; the text of the compiled step and the compiler's warnings are read.
"""

import collections
import dataclasses
import math
from pathlib import Path

import jax
import pytest
import toy
from jax.sharding import NamedSharding, PartitionSpec

from sbs_jax import chips
from sbs_jax.data import registry
from sbs_jax.plan import hlo, worker
from sbs_jax.student import partitioning, stacks
from sbs_jax.training.step import Trainer, TrainState, prepare

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed: pip install libtpu")
# Where another worker has stored the same step, JAX cannot load it for absent chips, and compiles it again.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning")

LARGE = 2**20  # bytes: an array of this size must not lie on every device
MATRIX = 2**16  # bytes: what is smaller than the smallest matrix is no matter here
LAYERS = 2
MODEL = dataclasses.replace(
    toy.MODEL,
    vocab_size=1024,
    emb_dim=512,
    num_heads=4,
    head_dim=64,
    mlp_dim=512,
    num_encoder_layers=LAYERS,
    num_decoder_layers=LAYERS,
    dtype="bfloat16",
    dropout_rate=0.0,
)
MESHES = {
    "data": partitioning.Layout(slice=1, data=-1, fsdp=1, tensor=1),
    "fsdp": partitioning.Layout(slice=1, data=1, fsdp=-1, tensor=1),
    "fsdp_tensor": partitioning.Layout(slice=1, data=1, fsdp=-1, tensor=2),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    mesh: str
    trainer: Trainer
    shardings: TrainState  # as compiled
    warnings: str
    program: hlo.Program

    def gathers(self) -> list[hlo.Collective]:
        """All-gathers of the size of a matrix or more."""
        return [one for one in self.program.collectives if one.kind == "all-gather" and one.bytes >= MATRIX]

    def describe(self, found: list[hlo.Collective]) -> str:
        lines = collections.Counter(
            f"{one.count} x {' '.join(one.arrays)} in {one.loop}: {one.op_name}" for one in found
        )
        return f"{self.mesh}: {len(found)} all-gathers\n" + "\n".join(
            f"{n} of {line}" for line, n in lines.most_common()
        )


# A compilation takes 16 s; "fsdp" is cut in one way less than "fsdp_tensor".
@pytest.fixture(
    scope="module", params=[*(pytest.param(mesh, marks=pytest.mark.faults) for mesh in ("data", "fsdp")), "fsdp_tensor"]
)
def compiled(request):
    """The step of a small student, 16 rows, AdamW."""
    registry.add(toy.DATASET)
    changes = {"model": MODEL, "layout": MESHES[request.param], "batch_size": 16}
    changes["execution"] = stacks.Execution(layers="scanned", remat="attended")
    config = toy.config(Path("none"), Path("none"), task_feature_lengths={"inputs": 64, "targets": 32}, **changes)
    trainer = prepare(config, devices=chips.topology("v5e:2x4").describe())
    step = getattr(trainer.step, "lower")  # noqa: B009  (jitted)
    with worker.captured_stderr() as said:
        executable = step(trainer.abstract, trainer.batch).compile()
    state, _ = executable.output_shardings
    return Compiled(request.param, trainer, state, said[0], hlo.read(executable.as_text()))


def test_the_compiler_warns_of_a_sharding_that_it_cannot_keep_to():
    """Checks that the warning expected by the next test can be captured."""
    mesh = jax.make_mesh(
        (2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2, devices=chips.topology("v5e:2x4").describe()
    )
    one, other = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in [(None, ("a", "b")), ("b", None, "a")])

    def turn(x):
        return jax.lax.with_sharding_constraint(2 * jax.numpy.sin(x), other)

    with worker.captured_stderr() as said:
        jax.jit(turn, in_shardings=one).lower(jax.ShapeDtypeStruct((64, 128, 256), "float32")).compile()
    assert worker.REMATERIALIZED in said[0]


@pytest.mark.slow
def test_no_array_is_copied_to_every_device_on_the_way(compiled):
    assert worker.REMATERIALIZED not in compiled.warnings, compiled.warnings


@pytest.mark.slow
def test_no_large_parameter_or_optimiser_array_lies_on_every_device(compiled):
    if compiled.mesh == "data":
        return  # every device has all parameters; their optimizer state: see the next test
    replicated = {
        jax.tree_util.keystr(path): leaf.shape
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(compiled.trainer.abstract),
            jax.tree.leaves(compiled.shardings),
            strict=True,
        )
        if math.prod(leaf.shape) * leaf.dtype.itemsize >= LARGE and sharding.is_fully_replicated
    }
    assert not replicated


@pytest.mark.slow
def test_parameters_are_gathered_as_bfloat16(compiled):
    found = [one for one in compiled.gathers() if any(array.startswith("f32") for array in one.arrays)]
    assert not found, compiled.describe(found)


@pytest.mark.slow
def test_all_gathers_move_each_parameter_twice_at_most(compiled):
    """Weights are gathered once forward and once backward, in two bytes a number; tensor parallelism adds some."""
    tensor = compiled.trainer.partitioner.sizes["tensor"]
    numbers = sum(math.prod(leaf.shape) for leaf in compiled.trainer.abstract.parameters.values())
    allowed = 0.0 if compiled.mesh == "data" else 2 * 2 * numbers / tensor
    moved = sum(one.count * one.bytes for one in compiled.gathers())
    assert moved <= 1.1 * allowed, compiled.describe(compiled.gathers())


@pytest.mark.slow
def test_layers_are_gathered_one_at_a_time(compiled):
    """Outside the loops over layers, only the token and logits tables are gathered."""
    parameters = compiled.trainer.abstract.parameters
    elsewhere = [math.prod(leaf.shape) for name, leaf in parameters.items() if "/layers/" not in name]
    allowed = 0.0 if compiled.mesh == "data" else 2 * 2 * sum(elsewhere)
    found = [one for one in compiled.gathers() if one.loop is None]
    moved = sum(one.count * one.bytes for one in found)
    assert moved <= 1.1 * allowed, compiled.describe(found)
