"""Measures a training step of SmolLM2 135M and T5Gemma 2 270M against transformers' models of the same sizes.

    make bench-families
    python scripts/bench.py families --layers 2 --binding VOCAB_SIZE=512 --rounds 1 --steps 1   # a trial of seconds

The two sides and the batches of the suite train, in float32 with random weights and without dropout, as both families
were pre-trained; a row is examples per second. transformers' side has scaled dot-product attention. Its decoder-only
model reads an example as one row, with labels on the target alone. Results: docs/speed.md.
"""

import argparse
from collections.abc import Iterator

from benchmarks import harness, train

# A file of gin_configs/models by the name of its row, and the settings that count layers.
MODELS = {
    "smollm2": ("smollm2_135m", ["decoder_only.DecoderConfig.num_layers"]),
    "t5gemma2_270m": (
        "t5gemma2_270m",
        ["t5gemma.T5GemmaConfig.num_encoder_layers", "t5gemma.T5GemmaConfig.num_decoder_layers"],
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    harness.add_turns(parser, rounds=5, steps=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--layers", type=int, help="of each stack, instead of all")
    parser.add_argument("--binding", action="append", default=[], help="gin binding for both sides; repeat")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    versions = harness.versions("jax", "flax", "optax", *train.PEER_NEEDS)
    for name in arguments.models:
        file, counts = MODELS[name]
        layers = [] if arguments.layers is None else [f"{count}={arguments.layers}" for count in counts]
        results = train.compared(arguments, model=file, extra=[*layers, *arguments.binding])
        ours, peer = (None if found is None else 2 * train.EXAMPLES / found.step_seconds for found in results)
        assert ours is not None
        yield harness.Row(f"{name}_train_vs_transformers", "examples/s", ours, peer, ">= 1.5", versions)
