"""What a token costs in generation on a TPU that is not there, by its compiler's own count, against stock T5X.

    python scripts/bench_tpu_decode.py

T5 1.1 base in bfloat16 on v5e:2x4, batch 256, inputs of 128 tokens, up to 64 tokens, greedy and with 4 beams; a copy
of the weights on every chip, the rows over all chips. libtpu compiles for the absent chips on any Linux machine. Cycles
per token are those of one trip of the decode loop: the compiler's `estimated_cycles`, those above 2^60 (its "unknown")
ignored. What the compiler fetches ahead of use, weights above all, carries no count, in T5X's figure as in ours: so
each row also says how much one trip has to read from HBM.

T5X's figures are stock T5X's at commit cc342d4 on jax 0.10.2, the same model, mesh and work, read in the same way.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Without chips JAX itself runs on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from sbs_jax import decoding, evaluate, partitioning, t5
from sbs_jax.plan import chips, hlo

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


@dataclasses.dataclass(frozen=True)
class Goal:
    """Of stock T5X: cycles per token, temporaries in GiB per chip; and the ratio to reach."""

    cycles: float
    temporaries: float
    ratio: float


GOALS = {
    "tpu_decode_greedy_cycles_vs_t5x": Goal(4.12e6, 0.53, 0.4),
    f"tpu_decode_beam{BEAMS}_cycles_vs_t5x": Goal(23.8e6, 1.51, 0.3),
}
T5X_WEIGHTS = 0.92


def lowered(
    beams: int,
    *,
    config: t5.T5Config = BASE,
    topology: str = TOPOLOGY,
    layout: partitioning.Layout = partitioning.DATA_PARALLEL,
    batch: int = BATCH,
    inputs: int = INPUTS,
    length: int = LENGTH,
) -> jax.stages.Lowered:
    """Generation of one batch: for one beam, the very one that `sbs evaluate` and `sbs predict` run."""
    devices = chips.topology(topology).describe()
    partitioner = layout.partitioner(devices)
    structure, shapes, axes = t5.abstract(config)
    parameters = partitioner.placed(shapes, parameters=shapes, axes=axes)
    if beams == 1:
        generator = evaluate.Generator(structure, partitioner=partitioner, batch_size=batch, length=length)
        return generator.lower(parameters, inputs=inputs)

    def search(parameters: t5.Parameters, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        with partitioner.constraining():
            return decoding.beam_search(t5.join(structure, parameters), tokens, length=length, beams=beams)

    tokens = jax.ShapeDtypeStruct((batch, inputs), jnp.int32, sharding=partitioner.batch)
    return jax.jit(search, out_shardings=partitioner.replicated).lower(parameters, tokens)


def cycles_per_token(text: str) -> int:
    """Cycles of one trip of the decode loop: the costliest loop without a known trip count."""
    loops = [loop.cycles for loop in hlo.read(text).loops if loop.trips is None]
    if not loops:
        raise ValueError("The compiled program has no loop of an unknown number of trips, so nothing decodes in it.")
    return max(loops)


def row(name: str, beams: int) -> dict[str, Any]:
    """One row for `bench.json`, and what else the compiler says."""
    goal = GOALS[name]
    start = time.perf_counter()
    compiled = lowered(beams).compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise ValueError("This libtpu does not report the compiled program and its memory; 0.0.51 does.")
    per_token = cycles_per_token(text)
    ratio = per_token / goal.cycles
    return {
        "name": name,
        "unit": "cycles per token",
        "ours": per_token,
        "peer": goal.cycles,
        "ratio": round(ratio, 3),
        "goal": f"<= {goal.ratio}",
        "holds": ratio <= goal.ratio,
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "peer_temporaries_gib": goal.temporaries,
        "peer_arguments_gib": T5X_WEIGHTS,
        "hbm_gib_per_token": round(read_per_token(beams) / 2**30, 3),
        "compile_s": round(seconds, 1),
        "work": f"T5 1.1 base, bfloat16, {TOPOLOGY}, batch {BATCH}, inputs {INPUTS}, {LENGTH} tokens, {beams} beam(s)",
        "versions": {
            "python": platform.python_version(),
            **{each: metadata.version(each) for each in ("jax", "jaxlib", "libtpu", "flax")},
        },
    }


def read_per_token(beams: int, *, chips: int = 8) -> int:
    """Bytes of weights and caches that one trip of the loop has to read, per chip."""
    c = BASE
    joined = c.num_heads * c.head_dim
    per_layer = 6 * c.emb_dim * joined + 3 * c.emb_dim * c.mlp_dim
    weights = c.num_decoder_layers * per_layer + c.emb_dim * c.vocab_size
    keys = BATCH // chips * (INPUTS + beams * LENGTH)
    return 2 * (weights + c.num_decoder_layers * 2 * keys * joined)


def rows() -> list[dict[str, Any]]:
    """The rows of both searches."""
    return [row(name, beams) for name, beams in zip(GOALS, (1, BEAMS), strict=True)]


def main() -> None:
    """Prints the rows as JSON lines."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    for each in rows():
        print(json.dumps(each))


if __name__ == "__main__":
    main()
