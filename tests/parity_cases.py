"""Cases of the parity tests, shared by both sides: tiny students with weights from numpy, and their inputs.

Used by the tests against PyTorch (test_parity.py), those against its recorded answers (test_goldens.py), and the script
that records them (scripts/make_goldens.py).
"""

import dataclasses
import zlib
from pathlib import Path

import jax
import numpy as np

from sbs_jax.student import families, t5
from sbs_jax.weights import names
from sbs_jax.weights.arrays import LazyArray, Opened

VOCABULARY = 44
SHAPE = {
    "vocab_size": VOCABULARY,
    "emb_dim": 24,
    "num_heads": 3,
    "head_dim": 6,  # 3 * 6 is not 24: the heads' joint width differs from the model's
    "mlp_dim": 40,
    "num_encoder_layers": 3,  # the other way around, transformers 5 cannot generate: its cache is too short
    "num_decoder_layers": 2,
    "dropout_rate": 0.0,
}
RELU, GATED = ("relu",), ("gelu", "linear")
CASES = {
    "v1_0": {"mlp_activations": RELU, "logits_via_embedding": True},
    "v1_1": {"mlp_activations": GATED, "logits_via_embedding": False},
    "relu_untied": {"mlp_activations": RELU, "logits_via_embedding": False},
    "gated_tied": {"mlp_activations": GATED, "logits_via_embedding": True},
    "umt5": {"mlp_activations": GATED, "logits_via_embedding": False, "relative_attention_bias": "per_layer"},
}
# Cases with recorded updates.
TRAINED = ("v1_0", "v1_1")
GOLDENS = Path(__file__).parent / "goldens"
# Most tokens to generate; some rows end earlier, some do not.
LENGTH = 20
BEAMS = 4
STEPS = 10
ALPHA = 0.5
# 20 times METHOD's 5e-5, so that ten steps move the weights visibly; betas, epsilon, decay and clipping are the
# official code's.
PEAK_RATE = 1e-3


def config(case: str) -> t5.T5Config:
    return t5.T5Config(**SHAPE, **CASES[case])


def parameters(config: families.ModelConfig) -> dict[str, np.ndarray]:
    """Makes float32 weights from numpy alone, one stream per name."""
    return {name: _weights(name, leaf.shape) for name, leaf in names.parameters(config).items()}


def _weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("scale"):
        return (1 + 0.2 * normal).astype(np.float32)
    # Gains by trial: generation neither repeats one token (a model of only small changes does) nor never ends.
    if name == "token_embedder/embedding":
        table = 0.4 * normal
        table[1] *= 3.5
        return table.astype(np.float32)
    if name.endswith("rel_embedding"):
        return normal.astype(np.float32)
    sharp = "query" in name or "key" in name
    gain = 0.6 if sharp else 1.6 if name.startswith("decoder") else 1.0
    kernel = gain * normal * shape[0] ** -0.5
    if name == "logits_dense/kernel":
        kernel[:, 1] *= 2.2
    return kernel.astype(np.float32)


def opened(config: families.ModelConfig) -> Opened:
    """Returns the same weights as an opened checkpoint."""
    arrays = {
        name: LazyArray(values.shape, values.dtype, values.__getitem__) for name, values in parameters(config).items()
    }
    return Opened(config, arrays)


def source() -> np.ndarray:
    """Makes `[8, 15]` token ids, padded with 0."""
    random = np.random.default_rng(1)
    rows = random.integers(2, VOCABULARY, size=(8, 15))
    for row, size in enumerate((15, 14, 11, 9, 7, 5, 3, 2)):
        rows[row, size:] = 0
        rows[row, size - 1] = 1
    return rows.astype(np.int32)


def more_sources() -> np.ndarray:
    """Makes `[96, 9]` token ids: enough rows that every rule of beam search decides some."""
    random = np.random.default_rng(3)
    rows = random.integers(2, VOCABULARY, size=(96, 9))
    for row, size in enumerate(random.integers(2, 10, size=96)):
        rows[row, size:] = 0
        rows[row, size - 1] = 1
    return rows.astype(np.int32)


def target(size: int = 12) -> np.ndarray:
    """Makes `[8, size]` token ids without padding."""
    return np.random.default_rng(2).integers(2, VOCABULARY, size=(8, size)).astype(np.int32)


def training_rows() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Makes (source, target) of each task, padded with 0 to the task's longest row."""
    label, rationale = target(4), target(11)
    for row, size in enumerate((4, 3, 2, 2, 3, 4, 2, 3)):
        label[row, size:] = 0
        label[row, size - 1] = 1
    for row, size in enumerate((11, 10, 7, 5, 9, 11, 4, 8)):
        rationale[row, size:] = 0
        rationale[row, size - 1] = 1
    return {"label": (source(), label), "rationale": (np.roll(source(), 3, axis=0), rationale)}


def shifted(tokens: np.ndarray) -> np.ndarray:
    """Shifts tokens right by one, from 0: decoder inputs."""
    return np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]


def fitted(tokens: np.ndarray, length: int = LENGTH) -> np.ndarray:
    """Pads with 0 to a common length."""
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


def model(config: families.ModelConfig) -> tuple[families.Structure, families.Parameters]:
    structure, _, _ = families.abstract(config)
    return structure, {name: jax.numpy.asarray(values) for name, values in parameters(config).items()}


def t5x_default(config: t5.T5Config) -> t5.T5Config:
    """Returns what a T5X checkpoint keeps of a configuration: its shapes, and T5X's dropout rate."""
    return dataclasses.replace(config, dropout_rate=0.1)
