"""Tiny students of each family that rotates, with weights from numpy; an independent implementation of them."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from sbs_jax.student import decoder_only, families, t5gemma

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "emb_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 20,
    "num_layers": 3,
    "dropout_rate": 0.0,
    "eos_id": 1,
    "decoder_start": 3,
}
LLAMA: dict[str, Any] = {
    **SIZES,
    "mlp_activations": ("silu", "linear"),
    "logits_via_embedding": True,
    "rope_base": 100.0,
}
QWEN3: dict[str, Any] = {**LLAMA, "qk_norm": True, "logits_via_embedding": False, "rope_base": 1000.0}
# Every third layer is global; a window of three is shorter than the rows of the tests.
GEMMA3: dict[str, Any] = {
    **SIZES,
    "num_kv_heads": 1,
    "mlp_activations": ("gelu", "linear"),
    "logits_via_embedding": True,
    "rope_base": 1000.0,
    "local_rope_base": 100.0,
    "rope_factor": 2.0,
    "window": 3,
    "global_every": 3,
    "query_scale": 0.25,
    "qk_norm": True,
    "post_norms": True,
    "norm_plus_one": True,
    "scale_embeddings": True,
}
TYPES = {"llama": LLAMA, "qwen3": QWEN3, "gemma3": GEMMA3, "prefix-lm": {**GEMMA3, "source_attention": "bidirectional"}}


# Encoder-decoders: every second layer is global.
T5GEMMA2: dict[str, Any] = {
    **{name: value for name, value in GEMMA3.items() if name != "num_layers"},
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "global_every": 2,
    "merged_attention": True,
    "shared_table": True,
}
T5GEMMA: dict[str, Any] = {
    **{name: value for name, value in T5GEMMA2.items() if name not in ("local_rope_base", "rope_factor")},
    "num_kv_heads": 2,
    "qk_norm": False,
    "merged_attention": False,
    "shared_table": False,
    "encoder_window": "either_side",
    "window": 2,
    "attention_cap": 1.5,
    "logits_cap": 2.0,
}
ENCODER_DECODERS = {"t5gemma2": T5GEMMA2, "t5gemma": T5GEMMA}
ALL = {**TYPES, **ENCODER_DECODERS}


def config(kind: str, **changes: Any) -> Any:
    """Builds a configuration; with `layers`, stacks of so many."""
    if kind in TYPES:
        return decoder_only.DecoderConfig(**{**TYPES[kind], **changes})
    return t5gemma.T5GemmaConfig(**{**ENCODER_DECODERS[kind], **changes})


@functools.cache
def _drawn(config: families.ModelConfig, seed: int) -> tuple[families.Structure, families.Parameters]:
    random = np.random.default_rng(seed)
    structure, shapes, _ = families.abstract(config)
    values = {name: jnp.asarray(random.normal(size=shapes[name].shape) * 0.4, jnp.float32) for name in sorted(shapes)}
    return structure, values


def parameters(config: families.ModelConfig, *, seed: int = 0) -> families.Parameters:
    """Draws every parameter, norms too, large enough that all of them show in the logits."""
    return dict(_drawn(config, seed)[1])


def model(config: families.ModelConfig, *, seed: int = 0) -> Any:
    return families.join(*_drawn(config, seed))


class Reference:
    """The families written again: numpy, float64, one example without padding, loops where they are clearest."""

    def __init__(self, config: Any, parameters: Any) -> None:
        self.c = config
        self.p = {name: np.asarray(x).astype(np.float64) for name, x in parameters.items()}

    def norm(self, name, x):
        scale = self.p[f"{name}/scale"] + (1.0 if self.c.norm_plus_one else 0.0)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.layer_norm_epsilon) * scale

    def is_global(self, layer):
        return (layer + 1) % self.c.global_every == 0

    def turned(self, x, layer):
        """Rotates [L, heads, K] as complex numbers."""
        half = self.c.head_dim // 2
        base = self.c.rope_base if self.is_global(layer) else self.c.local_rope_base or self.c.rope_base
        angles = np.arange(len(x))[:, None] / base ** (np.arange(half) / half)
        if self.is_global(layer):
            angles = angles / self.c.rope_factor
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def near(self, query, key, layer):
        """True for a key within the window of a causal layer, behind its query."""
        return self.is_global(layer) or query - key < self.c.window

    def heads(self, name, kind, x):
        found = (x @ self.p[f"{name}/{kind}/kernel"]).reshape(len(x), -1, self.c.head_dim)
        return self.norm(f"{name}/{kind}_norm", found) if self.c.qk_norm and kind != "value" else found

    def attention(self, name, x, sees, *, layer=None, source=None):
        """Attends over the keys of `x`, rotated (unless layer is None: then over none of them), then of `source`."""
        c = self.c
        q = self.heads(name, "query", x)
        keys, values = [], []
        if layer is not None:
            q = self.turned(q, layer)
            keys.append(self.turned(self.heads(name, "key", x), layer))
            values.append(self.heads(name, "value", x))
        own = len(x) if keys else 0
        if source is not None:
            keys.append(self.heads(name, "key", source))
            values.append(self.heads(name, "value", source))
        k, v = np.concatenate(keys), np.concatenate(values)
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        out = np.zeros_like(q)
        for h in range(c.num_heads):
            g = h // (c.num_heads // c.num_kv_heads)
            for i in range(len(x)):
                seen = [j for j in range(len(k)) if j >= own or sees(i, j)]
                scores = scale * k[seen, g] @ q[i, h]
                if c.attention_cap is not None:
                    scores = c.attention_cap * np.tanh(scores / c.attention_cap)
                weights = np.exp(scores)
                out[i, h] = weights / weights.sum() @ v[seen, g]
        return out.reshape(len(x), -1) @ self.p[f"{name}/out/kernel"]

    def mlp(self, name, x):
        gate = x @ self.p[f"{name}/wi_0/kernel"]
        if self.c.mlp_activations[0] == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return gate * (x @ self.p[f"{name}/wi_1/kernel"]) @ self.p[f"{name}/wo/kernel"]

    def add(self, at, part, x, compute):
        """Adds a sub-layer's output to its input, with the norms around it."""
        y = compute(self.norm(f"{at}/pre_{part}_layer_norm", x))
        return x + (self.norm(f"{at}/post_{part}_layer_norm", y) if self.c.post_norms else y)

    def stack(self, side, x, sees, *, source=None):
        for layer in range(self.c.stack_layers[side]):
            x = self.layer(f"{side}/layers/{layer}", x, layer, functools.partial(sees, layer=layer), source)
        return self.norm(f"{side}/{side}_norm", x)

    def layer(self, at, x, layer, sees, source):
        merged = source is not None and self.c.merged_attention
        own = {"layer": layer, "source": source if merged else None}
        x = self.add(at, "self_attention", x, lambda y: self.attention(f"{at}/self_attention", y, sees, **own))
        if source is not None and not merged:
            cross = f"{at}/encoder_decoder_attention"
            x = self.add(at, "cross_attention", x, lambda y: self.attention(cross, y, None, source=source))
        return self.add(at, "mlp", x, lambda y: self.mlp(f"{at}/mlp", y))

    def embedded(self, table, tokens):
        return self.p[f"{table}/embedding"][list(tokens)] * (
            math.sqrt(self.c.emb_dim) if self.c.scale_embeddings else 1
        )

    def logits(self, source, target):
        inputs = [self.c.decoder_start, *target[:-1]]
        table = "token_embedder"
        if isinstance(self.c, t5gemma.T5GemmaConfig):

            def around(i, j, layer):
                w, behind = self.c.window, i - j
                limits = (w + 1, w + 1) if self.c.encoder_window == "either_side" else ((w + 1) // 2, w // 2 + 1)
                return self.is_global(layer) or -limits[1] < behind < limits[0]

            encoded = self.stack("encoder", self.embedded(table, source), around)
            table = table if self.c.shared_table else "target_embedder"

            def earlier(i, j, layer):
                return j <= i and self.near(i, j, layer)

            x = self.stack("decoder", self.embedded(table, inputs), earlier, source=encoded)
        else:
            length = len(source)

            def sees(i, j, layer):
                if self.c.source_attention == "bidirectional" and i < length and j < length:
                    return self.is_global(layer) or abs(i - j) < self.c.window
                return j <= i and self.near(i, j, layer)

            x = self.stack("decoder", self.embedded(table, [*source, *inputs]), sees)[length:]
        tied = self.c.logits_via_embedding
        found = x @ (self.p[f"{table}/embedding"].T if tied else self.p["logits_dense/kernel"])
        return found if self.c.logits_cap is None else self.c.logits_cap * np.tanh(found / self.c.logits_cap)
