"""Compilation of a configuration's steps for absent TPUs, and the compiler's figures.

`serve` runs in a separate process, because a compiler may abort or hang (compiler.py).
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax

from sbs_jax import chips
from sbs_jax.plan import hlo
from sbs_jax.student import partitioning
from sbs_jax.training import evaluate
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import Trainer, prepare

TRAIN, EVALUATION, GENERATION = "train", "evaluation", "generation"
STEPS = (TRAIN, EVALUATION, GENERATION)
# libtpu reports needed and available memory in two forms.
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
_UNIT = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REMATERIALIZED = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A machine, a mesh, and a division of the global batch."""

    topology: str
    slices: int
    mesh: dict[str, int]  # axes of partitioning.Layout; one may be -1
    batch_size: int
    micro_batches: int
    steps: tuple[str, ...]

    def applied(self, config: TrainConfig) -> TrainConfig:
        """Returns the configuration with this mesh and batch. ValueError if they do not fit it."""
        layout = partitioning.Layout(**self.mesh, rules=config.layout.rules)
        return dataclasses.replace(config, layout=layout, batch_size=self.batch_size, micro_batches=self.micro_batches)


def measure(config: TrainConfig, candidate: Candidate) -> dict[str, Any]:
    """Compiles each step and returns the compiler's figures; `refused` holds the reason if it cannot be compiled.

    {"mesh": {"fsdp": 8, ..}, "steps": {"train": {"fits": True, "memory": {..}, "cycles": ..}, ..}}.
    """
    topology = chips.topology(candidate.topology, slices=candidate.slices)
    try:
        config = candidate.applied(config)
        devices = topology.describe()
        trainer = prepare(config, devices=devices)
    except ValueError as error:
        return {"refused": str(error), "steps": {}}
    lowerings = _lowerings(config, trainer)
    return {
        "devices": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "checkpoint_bytes": _bytes((trainer.saved.parameters, trainer.saved.optimizer)),
        "mesh": trainer.partitioner.sizes,
        "steps": {name: _compiled(lowerings[name], trainer, topology, step=name) for name in candidate.steps},
    }


def _lowerings(config: TrainConfig, trainer: Trainer) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """Returns functions that lower each step as training and `sbs predict` run it."""

    def generation(length: int) -> Callable[[], jax.stages.Lowered]:
        generator = evaluate.Generator(
            trainer.structure,
            eos_id=config.model.eos_id,
            partitioner=trainer.partitioner,
            batch_size=config.eval_batch_size,
            length=length,
        )
        source_length = config.task_feature_lengths["inputs"]
        return lambda: generator.lower({**trainer.saved.frozen, **trainer.saved.parameters}, inputs=source_length)

    step: Any = trainer.step  # jitted, so it has `lower`
    return {
        TRAIN: lambda: step.lower(trainer.abstract, trainer.batch),
        EVALUATION: generation(config.max_decode_length),
        GENERATION: generation(config.task_feature_lengths["targets"]),
    }


def _compiled(
    lowering: Callable[[], jax.stages.Lowered], trainer: Trainer, topology: chips.Topology, *, step: str
) -> dict[str, Any]:
    """Compiles one step: memory, cycles, collectives and compile seconds."""
    start = time.monotonic()
    held = {"parameters": _bytes_per_device((trainer.abstract.parameters, trainer.abstract.frozen))}
    if step != GENERATION and trainer.abstract.teacher:  # like the optimizer state
        held["teacher"] = _bytes_per_device(trainer.abstract.teacher)
    if step == TRAIN:
        held["batch"] = _bytes_per_device(trainer.batch)
    if step != GENERATION:  # evaluation runs during training, with the optimizer state in memory
        held["optimizer"] = _bytes_per_device(trainer.abstract.optimizer)
    with captured_stderr() as captured:
        try:
            compiled = lowering().compile()
        except jax.errors.JaxRuntimeError as error:
            return {"compile_seconds": time.monotonic() - start} | _refusal(str(error), held=held)
        except NotImplementedError as error:
            return {"fits": None, "refused": f"cannot be compiled: {error}"}
    seconds = time.monotonic() - start
    sizes: Any = compiled.memory_analysis()
    memory = held | {
        "temporaries": sizes.temp_size_in_bytes,
        "outputs": max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
        "program": sizes.generated_code_size_in_bytes,
    }
    beside = held["optimizer"] + held.get("teacher", 0) if step == EVALUATION else 0
    arguments = sizes.argument_size_in_bytes + beside
    total = arguments + memory["temporaries"] + memory["outputs"] + memory["program"]
    available = topology.chip.available_gib * chips.GIB
    known = {"fits": total <= available, "needs": total, "available": available, "compile_seconds": seconds}
    known["memory"] = memory | {"arguments": arguments}
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:  # libtpu is newer than JAX, which does not know all its operations
        reason = str(error).partition("\n")[0]
        return known | {"refused": f"compiled, but JAX {jax.__version__} cannot read its cycles: {reason}"}
    program = hlo.read(text, slices=topology.slices)
    # A loop of unknown length is counted once. In a generation that is one token.
    unknown = max((loop for loop in program.loops if loop.trips is None), key=lambda loop: loop.cycles, default=None)
    body = None if step == TRAIN or unknown is None else unknown.body
    once = {"cycles": program.cycles} | _communication(program, topology.chip)
    token = None
    if body is not None and unknown is not None:
        token = {"cycles": unknown.cycles} | _communication(program, topology.chip, loop=body)
    return {
        **known,
        **once,
        "token": token,  # the part of `cycles` and seconds that is one trip of the decoding loop
        "loops_counted_once": sum(loop.trips is None and loop.body != body for loop in program.loops),
        "without_estimate": dict(program.without_estimate),
        "collectives": program.by_kind(),
        "rematerializations": captured[0].count(REMATERIALIZED),
    }


def _communication(program: hlo.Program, chip: chips.Chip, *, loop: str | None = None) -> dict[str, float]:
    """Bounds one device's communication seconds (of one loop) from below: bytes over all its links at full speed."""
    seconds = {True: 0.0, False: 0.0}
    for one in program.collectives:
        if loop is None or one.loop == loop:
            rate = chip.network if one.across_slices else chip.links
            seconds[one.overlapped] += one.count * one.moved / (rate / chip.devices)
    return {"communication_seconds": seconds[True] + seconds[False], "exposed_seconds": seconds[False]}


def _bytes(tree: Any) -> int:
    """Counts the bytes of a tree of shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes_per_device(tree: Any) -> int:
    """Counts the bytes that one device holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _refusal(message: str, *, held: dict[str, int]) -> dict[str, Any]:
    """Parses a refusal of the compiler: needed and available bytes if memory is the cause, else its text."""
    for pattern in _TOO_LARGE:
        if match := pattern.search(message):
            needs, available = (float(match[i]) * _UNIT[match[i + 1]] for i in (1, 3))
            return {"fits": False, "needs": needs, "available": available, "memory": held}
    return {"fits": False if "RESOURCE_EXHAUSTED" in message else None, "refused": message.partition("\n")[0]}


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Captures the process's standard error, C++ included; the list holds the text afterwards."""
    captured: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield captured
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            captured.append(file.read().decode("utf-8", "replace"))


def serve(config: TrainConfig, *, requests: TextIO, answers: TextIO) -> None:
    """Answers each line of JSON (a `Candidate`) with one line of JSON (`measure`) until the input ends."""
    for line in requests:
        fields = json.loads(line)
        candidate = Candidate(**fields | {"steps": tuple(fields["steps"])})
        answers.write(json.dumps(measure(config, candidate)) + "\n")
        answers.flush()
