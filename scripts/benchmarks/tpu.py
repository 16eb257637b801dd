"""Measures training and generation on absent TPUs by their compiler's estimates, against stock T5X.

    make bench-tpu                                          # the usual ones
    python scripts/bench.py tpu --only base large           # some of them
    python scripts/bench.py tpu --only base-lora-v5e:2x4    # others: all sizes and tunings of docs/speed.md

libtpu compiles for absent chips on any Linux machine. Cycles are the sum of the compiler's `estimated_cycles` over the
optimized program, loops times their trips, without operations that have no estimate, such as exchanges between chips
(in T5X's figures too). T5X's figures are of stock T5X at commit cc342d4 on jax 0.10.2, read in the same way.

- base, large, xl, ..: T5 1.1 with Adafactor, dropout 0.1, bfloat16 activations, packed rows of 512 + 128 tokens; the
  step that `sbs train` compiles (`WORK`; T5X with `unsafe_rbg`). Model FLOP utilization is the model's operations
  (student/flops.py) over the most the chips could do in those cycles. What was tried: docs/performance.md.
- t5gemma2_270m_whole, t5gemma2_270m_chunked, t5gemma2_1b: the same for T5Gemma 2, without dropout. "whole" and 1b
  compute all 262,144 logits of a token at once, "chunked" in 8 parts (`VOCABULARY_CHUNKS`); also the memory per chip.
- decode: T5 1.1 base in bfloat16 on v5e:2x4, batch 256, inputs of 128 tokens, up to 64 tokens, greedy and with 4 beams.
  Cycles per token are those of one trip of the decode loop. Prefetches (mostly of weights) have no estimate, so each
  row also gives the bytes that one trip reads from HBM.
- SIZE-TUNING-TOPOLOGY: AdamW, bfloat16, scanned layers, `REMAT = "full"`, rows of 512 + 64 tokens that are not packed,
  fsdp over all chips: 64 rows an update, on one chip 8 in 2 micro-batches. Tunings as in gin_configs/adapters/. Prints
  the memory per chip, and seconds: the compiler's cycles and exposed exchanges. All of them take an hour on 2 cores.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import harness
from sbs_jax import chips
from sbs_jax.cli import main
from sbs_jax.plan import hlo, worker
from sbs_jax.student import decoding, families, flops, partitioning, t5
from sbs_jax.training import evaluate, gin_files
from sbs_jax.training.config import TrainConfig

ONE = "xxl-qlora-v5e:1x1"
T5GEMMA2 = ("t5gemma2_270m_whole", "t5gemma2_270m_chunked", "t5gemma2_1b")
USUAL = ("base", "large", "xl", "xxl", *T5GEMMA2, "decode", ONE)


def add_options(parser: argparse.ArgumentParser) -> None:
    names = (*WORK, "decode")
    parser.add_argument("--only", nargs="+", choices=names, default=USUAL, metavar="NAME", help=", ".join(names))
    parser.add_argument("--steps", nargs="+", choices=worker.STEPS, default=[worker.TRAIN], help="of a run")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    main.import_tensorflow()
    import tasks  # noqa: F401  (registers the datasets)

    chips.check_compiler()
    os.environ.update(chips.ENVIRONMENT)
    versions = harness.versions("jax", "jaxlib", "libtpu", "flax", "optax")
    for name in arguments.only:
        if name == "decode":
            for goal, beams in zip(GOALS, (1, BEAMS), strict=True):
                yield generation(goal, beams, versions)
        else:
            yield from training(name, tuple(arguments.steps), versions)


# ----------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Work:
    """A training run to compile: a model on a machine, how it is computed, and stock T5X's figures for it."""

    model: str  # a file of gin_configs/models
    topology: str
    rows: int  # per update, over all chips
    layers: str
    remat: str
    t5x: tuple[float, float, float] | None = None  # cycles, GiB per chip (arguments, temporaries), seconds to compile
    tuning: str | None = None  # with AdamW and rows that are not packed; None: Adafactor and packed rows
    chunks: int = 1  # of the vocabulary
    memory_row: str | None = None  # name of the row of a chip's memory; None: no such row

    def config(self) -> TrainConfig:
        """Returns the training run of this work."""
        targets, micro_batches = (64 if self.tuning else 128), (2 if self.topology == "v5e:1x1" else 1)
        files = ["runs/train", f"models/{self.model}", "methods/step_by_step", "meshes/fsdp"]
        bindings = [
            *("DATASET='svamp'", "DTYPE='bfloat16'", "EXAMPLES=1", "MODEL_DIR=none", "RECORDS_DIR=none"),
            *("VOCABULARY='byte'", f"VOCABULARY_CHUNKS={self.chunks}"),
            f"TASK_FEATURE_LENGTHS={ {'inputs': 512, 'targets': targets} }",
            *(f"BATCH_SIZE={self.rows}", f"MICRO_BATCHES={micro_batches}"),
            *(f"LAYERS={self.layers}", f"REMAT={self.remat}"),
        ]
        if self.tuning is None:
            files.append("optimizers/adafactor")
            bindings += ["PACK=True", "TRAIN_STEPS=1"]
        else:
            files += [] if self.tuning == "full" else [f"adapters/{self.tuning}"]
            bindings += ["TRAIN_STEPS=1000", "LEARNING_RATE=1e-4"]
        names = [f"gin_configs/{file}.gin" for file in files]
        return gin_files.configure("train.TrainConfig", gin_files=names, bindings=bindings)[0]


T5X_BASE, T5X_LARGE = (91.9e6, 2.60 + 0.92, 116), (289.3e6, 6.43 + 2.92, 161)
WORK = {
    "base": Work("t5_1_1_base", "v5e:2x4", 64, "scanned", "attended", T5X_BASE),
    "large": Work("t5_1_1_large", "v5e:4x4", 128, "scanned", "attended", T5X_LARGE),
    "base_unrolled": Work("t5_1_1_base", "v5e:2x4", 64, "unrolled", "minimal", T5X_BASE),
    "large_unrolled": Work("t5_1_1_large", "v5e:4x4", 128, "unrolled", "minimal", T5X_LARGE),
    "xl": Work("t5_1_1_xl", "v5e:8x8", 1024, "scanned", "attended"),
    "xxl": Work("t5_1_1_xxl", "v5e:16x16", 2048, "scanned", "minimal"),
    ONE: Work("t5_1_1_xxl", "v5e:1x1", 8, "scanned", "full", tuning="qlora", memory_row="qlora_xxl_one_v5e_chip_gib"),
}
WORK |= {
    name: Work(model, topology, 64, "scanned", "attended", chunks=chunks, memory_row=row)
    for name, model, topology, chunks, row in (
        ("t5gemma2_270m_whole", "t5gemma2_270m", "v5e:2x4", 1, "t5gemma2_270m_step_gib_whole"),
        ("t5gemma2_270m_chunked", "t5gemma2_270m", "v5e:2x4", 8, "t5gemma2_270m_step_gib_chunked"),
        ("t5gemma2_1b", "t5gemma2_1b", "v6e:2x4", 1, "t5gemma2_1b_step_gib"),
    )
}
WORK |= {
    f"{model}-{tuning}-{topology}": Work(f"t5_1_1_{model}", topology, 64, "scanned", "full", tuning=tuning)
    for topology in ("v5e:2x4", "v5e:4x4")
    for tuning in ("full", "lora", "qlora")
    for model in ("base", "large", "xl", "xxl")
}


def training(name: str, steps: tuple[str, ...], versions: dict[str, str]) -> Iterator[harness.Row]:
    """Compiles steps of a run and prints all counts of each; yields the rows of its training step."""
    work, config, topology = WORK[name], WORK[name].config(), chips.topology(WORK[name].topology)
    candidate = worker.Candidate(
        topology=work.topology,
        slices=1,
        mesh=config.layout.shape,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        steps=steps,
    )
    outcome = worker.measure(config, candidate)
    for step, counts in outcome["steps"].items():
        found = {"name": name, **dataclasses.asdict(work), "step": step, **counts}
        if "needs" in counts:
            found |= {"gib": counts["needs"] / harness.GIB, "available_gib": counts["available"] / harness.GIB}
        if "cycles" in counts:
            computing = counts["cycles"] / topology.chip.clock
            exchanging = counts["communication_seconds"]
            found |= {
                "memory_gib": {part: size / harness.GIB for part, size in counts["memory"].items()},
                "computing_s": computing,
                "seconds": max(computing + counts["exposed_seconds"], exchanging),
                "rows_per_second_and_host": work.rows / computing * min(1.0, 8 / topology.chips),  # 8 chips to a host
            }
            if work.tuning is None:
                operations = flops.training_flops(config.model, rows=work.rows, inputs=512, targets=128)
                found["mfu"] = operations / (computing * topology.chip.peak_flops * topology.chips)
        print(json.dumps(found), flush=True)
        if step == worker.TRAIN:
            yield from rows(name, found, versions)
    if not outcome["steps"]:
        raise ValueError(f"{name} was not compiled: {outcome['refused']}")


def rows(name: str, found: dict[str, Any], versions: dict[str, str]) -> Iterator[harness.Row]:
    work = WORK[name]
    if work.memory_row and "gib" in found:
        yield harness.Row(work.memory_row, "GiB", found["gib"], found["available_gib"], "<= 1", versions)
    elif (work.memory_row or work.tuning is None) and "cycles" not in found:
        raise ValueError(f"{name} was not compiled: {found}")
    if work.t5x:
        cycles, gib, seconds = work.t5x
        memory = found["memory_gib"]["temporaries"] + found["memory_gib"]["arguments"]
        compiling = found["compile_seconds"]
        yield harness.Row(f"tpu_cycles_{name}_vs_t5x", "cycles", found["cycles"], cycles, "<= 0.55", versions)
        yield harness.Row(f"tpu_memory_{name}_vs_t5x", "GiB per chip", memory, gib, "<= 0.5", versions)
        yield harness.Row(f"tpu_compile_{name}_vs_t5x", "s", compiling, seconds, "<= 0.25", versions)
    elif "mfu" in found:
        yield harness.Row(f"tpu_mfu_{name}", "of peak", found["mfu"], 1.0, ">= 0.5", versions)


# --------------------------------------------------------------------------------------------- generation

TOPOLOGY, BATCH, INPUTS, LENGTH, BEAMS = "v5e:2x4", 256, 128, 64, 4
BASE = t5.T5Config(
    vocab_size=32128,
    emb_dim=768,
    num_heads=12,
    head_dim=64,
    mlp_dim=2048,
    num_encoder_layers=12,
    num_decoder_layers=12,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
    dropout_rate=0.1,
    dtype="bfloat16",
)


# Stock T5X's cycles per token and temporaries in GiB per chip; and the ratio to reach.
GOALS = {
    "tpu_decode_greedy_cycles_vs_t5x": (4.12e6, 0.53, 0.4),
    f"tpu_decode_beam{BEAMS}_cycles_vs_t5x": (23.8e6, 1.51, 0.3),
}
T5X_WEIGHTS = 0.92


def lowered(beams: int, *, config: t5.T5Config = BASE) -> jax.stages.Lowered:
    """Lowers generation of one batch: for one beam, the program that `sbs evaluate` and `sbs predict` run.

    Every chip has a copy of the weights; the rows are divided over all chips.
    """
    partitioner = partitioning.DATA_PARALLEL.partitioner(chips.topology(TOPOLOGY).describe())
    structure, shapes, axes = families.abstract(config)
    parameters = partitioner.with_shardings(shapes, parameters=shapes, axes=axes)
    if beams == 1:
        generator = evaluate.Generator(
            structure, eos_id=config.eos_id, partitioner=partitioner, batch_size=BATCH, length=LENGTH
        )
        return generator.lower(parameters, inputs=INPUTS)

    def search(parameters: families.Parameters, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        with partitioner.active():
            return decoding.beam_search(families.join(structure, parameters), tokens, length=LENGTH, beams=beams)

    tokens = jax.ShapeDtypeStruct((BATCH, INPUTS), jnp.int32, sharding=partitioner.batch)
    return jax.jit(search, out_shardings=partitioner.replicated).lower(parameters, tokens)


def cycles_per_token(text: str) -> int:
    """Returns the cycles of one trip of the decode loop: the costliest loop without a known trip count."""
    loops = [loop.cycles for loop in hlo.read(text).loops if loop.trips is None]
    if not loops:
        raise ValueError("The compiled program has no loop of an unknown number of trips, so nothing decodes in it.")
    return max(loops)


def read_per_token(beams: int, *, chips: int = 8) -> int:
    """Returns the bytes of weights and caches that one trip of the loop has to read, per chip."""
    c = BASE
    joined = c.num_heads * c.head_dim
    per_layer = 6 * c.emb_dim * joined + 3 * c.emb_dim * c.mlp_dim
    weights = c.num_decoder_layers * per_layer + c.emb_dim * c.vocab_size
    keys = BATCH // chips * (INPUTS + beams * LENGTH)
    return 2 * (weights + c.num_decoder_layers * 2 * keys * joined)


def generation(name: str, beams: int, versions: dict[str, str]) -> harness.Row:
    """Prints all counts of generation; returns its row."""
    t5x_cycles, t5x_temporaries, goal = GOALS[name]
    start = time.perf_counter()
    program = lowered(beams).compile()
    seconds = time.perf_counter() - start
    text, memory = program.as_text(), program.memory_analysis()
    if text is None or memory is None:
        raise ValueError("This libtpu does not report the compiled program and its memory; 0.0.51 does.")
    cycles = cycles_per_token(text)
    found = {
        "name": name,
        "cycles_per_token": cycles,
        "temporaries_gib": round(memory.temp_size_in_bytes / harness.GIB, 3),
        "arguments_gib": round(memory.argument_size_in_bytes / harness.GIB, 3),
        "peer_temporaries_gib": t5x_temporaries,
        "peer_arguments_gib": T5X_WEIGHTS,
        "hbm_gib_per_token": round(read_per_token(beams) / harness.GIB, 3),
        "compile_s": round(seconds, 1),
        "work": f"T5 1.1 base, bfloat16, {TOPOLOGY}, batch {BATCH}, inputs {INPUTS}, {LENGTH} tokens, {beams} beam(s)",
    }
    print(json.dumps(found), flush=True)
    return harness.Row(name, "cycles per token", cycles, t5x_cycles, f"<= {goal}", versions)
