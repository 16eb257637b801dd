"""The student against an independent implementation, and by its invariants."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sbs_jax.student import families, layers, stacks, t5, t5_layers

V1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True}
V1_1 = {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}
VERSIONS = pytest.mark.parametrize("version", [V1_0, V1_1], ids=["v1.0", "v1.1"])


def config_of(version, **changes):
    shape = {"vocab_size": 40, "emb_dim": 24, "num_heads": 3, "head_dim": 4, "mlp_dim": 20}
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0}
    return t5.T5Config(**{**shape, **layers, **version, **changes})


def student(config, seed=0) -> tuple[Any, dict[str, np.ndarray]]:
    """Makes a model with weights from numpy, and returns both."""
    structure, shapes, _ = families.abstract(config)
    random = np.random.default_rng(seed)
    parameters = {name: random.normal(size=shapes[name].shape).astype(np.float32) * 0.3 for name in sorted(shapes)}
    return families.join(structure, {name: jnp.asarray(x) for name, x in parameters.items()}), parameters


def tokens(*shape, seed=0, vocabulary=40):
    return jnp.asarray(np.random.default_rng(seed).integers(2, vocabulary, size=shape), jnp.int32)


@nnx.jit
def forward(model, source, target, **kwargs):
    return model(source, target, **kwargs)


@nnx.jit
def encode(model, source, segments):
    return model.encode(source, segment_ids=segments)


class Reference:
    """T5 written again: numpy, float64, one example at a time, loops where they are clearest."""

    def __init__(self, config, parameters):
        self.c, self.p = config, {name: x.astype(np.float64) for name, x in parameters.items()}

    def norm(self, name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.p[f"{name}/scale"]

    def bias(self, stack, queries, keys, bidirectional):
        out = np.zeros((self.c.num_heads, queries, keys))
        for q, k in itertools.product(range(queries), range(keys)):
            out[:, q, k] = self.p[f"{stack}/relpos_bias/rel_embedding"][:, bucket(k - q, bidirectional)]
        return out

    def attention(self, name, x, memory, bias):
        heads = [
            m.reshape(len(m), self.c.num_heads, self.c.head_dim)
            for m in (
                x @ self.p[f"{name}/query/kernel"],
                memory @ self.p[f"{name}/key/kernel"],
                memory @ self.p[f"{name}/value/kernel"],
            )
        ]
        out = np.zeros((len(x), self.c.num_heads, self.c.head_dim))
        for h in range(self.c.num_heads):
            q, k, v = (m[:, h] for m in heads)
            weights = np.exp(q @ k.T + bias[h])
            out[:, h] = weights / weights.sum(-1, keepdims=True) @ v
        return out.reshape(len(x), -1) @ self.p[f"{name}/out/kernel"]

    def mlp(self, name, x):
        if len(self.c.mlp_activations) == 1:
            return np.maximum(x @ self.p[f"{name}/wi/kernel"], 0) @ self.p[f"{name}/wo/kernel"]
        gate = x @ self.p[f"{name}/wi_0/kernel"]
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return gate * (x @ self.p[f"{name}/wi_1/kernel"]) @ self.p[f"{name}/wo/kernel"]

    def logits(self, source, target):
        table = self.p["token_embedder/embedding"]
        x, bias = table[source], self.bias("encoder", len(source), len(source), True)
        for i in range(self.c.num_encoder_layers):
            at = f"encoder/layers/{i}"
            y = self.norm(f"{at}/pre_attention_layer_norm", x)
            x = x + self.attention(f"{at}/attention", y, y, bias)
            x = x + self.mlp(f"{at}/mlp", self.norm(f"{at}/pre_mlp_layer_norm", x))
        memory = self.norm("encoder/encoder_norm", x)
        x = table[target]
        bias = self.bias("decoder", len(target), len(target), False)
        bias = bias + np.where(np.tri(len(target)) > 0, 0, -np.inf)
        none = np.zeros((self.c.num_heads, 1, 1))
        for i in range(self.c.num_decoder_layers):
            at = f"decoder/layers/{i}"
            y = self.norm(f"{at}/pre_self_attention_layer_norm", x)
            x = x + self.attention(f"{at}/self_attention", y, y, bias)
            y = self.norm(f"{at}/pre_cross_attention_layer_norm", x)
            x = x + self.attention(f"{at}/encoder_decoder_attention", y, memory, none)
            x = x + self.mlp(f"{at}/mlp", self.norm(f"{at}/pre_mlp_layer_norm", x))
        x = self.norm("decoder/decoder_norm", x)
        if self.c.logits_via_embedding:
            return x / math.sqrt(self.c.emb_dim) @ table.T
        return x @ self.p["logits_dense/kernel"]


def bucket(relative, bidirectional, buckets=32, farthest=128):
    """The bucket of one relative position, by its definition: log-spaced from `exact` to `farthest`."""
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    share = math.log(distance / exact) / math.log(farthest / exact)
    return start + min(exact + int(share * (buckets - exact)), buckets - 1)


@VERSIONS
def test_logits_equal_an_independent_implementation(version):
    config = config_of(version)
    model, parameters = student(config)
    source, target = tokens(3, 37), tokens(3, 21, seed=1)
    got = forward(model, source, target)
    want = np.stack(
        [
            Reference(config, parameters).logits(s, t)
            for s, t in zip(np.asarray(source), np.asarray(target), strict=True)
        ]
    )
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_their_definition(bidirectional):
    relative = np.arange(-300, 301)
    got = t5_layers.relative_position_bucket(
        jnp.asarray(relative), bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    want = [bucket(int(r), bidirectional) for r in relative]
    # Where a distance is a border between two buckets, float32 decides (as in the published models).
    different = [int(r) for r, g, w in zip(relative, np.asarray(got), want, strict=True) if g != w]
    assert {abs(r) for r in different} <= {16, 32, 64, 128}
    assert len(set(np.asarray(got).tolist())) == 32 - bidirectional


# Counts: Mesh TensorFlow's published models, with their 32,128-row table.
SIZES = {
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_xl": 2_851_598_336,
    "t5_1_0_xxl": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "t5_1_0_tiny": 4_769_536,
    "t5_1_1_tiny": 9_012_992,
}


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_its_published_number_of_parameters(name):
    import gin

    gin.clear_config()
    gin.parse_config(f"include 'gin_configs/models/{name}.gin'\nDROPOUT_RATE = 0.1\n")
    config = gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()
    layers = config.num_encoder_layers
    assert config.num_decoder_layers == layers

    def count(layers):
        cut = dataclasses.replace(config, num_encoder_layers=layers, num_decoder_layers=layers)
        shapes = jax.eval_shape(lambda: families.init(cut, seed=0)[1])
        assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype("float32")}
        return sum(math.prod(leaf.shape) for leaf in shapes.values())

    # Layers after the first are alike, which the smaller sizes show; to lay out 24 and 24 takes seconds.
    found = count(layers) if layers <= 8 else count(1) + (layers - 1) * (count(2) - count(1))
    assert found == SIZES[name]


def test_causality_no_gradient_flows_from_later_positions():
    model, _ = student(config_of(V1_1))
    source, target = tokens(1, 7), tokens(1, 6, seed=1)
    segments = stacks.source_segments(source)
    encoded = encode(model, source, segments)

    def states(x):
        return model.decoder(
            x,
            encoded,
            segment_ids_BT=jnp.ones_like(target),
            encoder_segment_ids_BS=segments,
            dropout_key=None,
        )

    # [1, T, D] by [1, T, D]: how each state depends on each position of the input.
    jacobian = jax.jit(jax.jacobian(states))(model.token_embedder(target))[0, :, :, 0]
    size = np.abs(np.asarray(jacobian)).sum(axis=(1, 3))
    assert (size[np.triu_indices(6, k=1)] == 0.0).all()
    assert (size[np.tril_indices(6)] > 0.0).all()


def test_more_padding_changes_nothing():
    model, _ = student(config_of(V1_1))
    source, target = tokens(2, 9), tokens(2, 8, seed=1)
    longer_source = jnp.pad(source, ((0, 0), (0, 11)))
    longer_target = jnp.pad(target, ((0, 0), (0, 5)))
    np.testing.assert_allclose(
        forward(model, longer_source, longer_target)[:, :8], forward(model, source, target), rtol=1e-5, atol=1e-5
    )


def test_a_packed_neighbour_changes_nothing():
    model, _ = student(config_of(V1_1))
    lengths = ((5, 4), (7, 3), (3, 6))
    alone = [(tokens(1, s, seed=i), tokens(1, t, seed=i + 9)) for i, (s, t) in enumerate(lengths)]
    packed = forward(
        model,
        jnp.concatenate([s for s, _ in alone] + [jnp.zeros((1, 2), jnp.int32)], axis=1),
        jnp.concatenate([t for _, t in alone] + [jnp.zeros((1, 3), jnp.int32)], axis=1),
        encoder_segment_ids=jnp.asarray(np.repeat([1, 2, 3, 0], [5, 7, 3, 2])[None]),
        decoder_segment_ids=jnp.asarray(np.repeat([1, 2, 3, 0], [4, 3, 6, 3])[None]),
    )
    start = 0
    for source, target in alone:
        end = start + target.shape[1]
        np.testing.assert_allclose(packed[:, start:end], forward(model, source, target), rtol=1e-5, atol=1e-5)
        start = end
    assert np.isfinite(packed).all()


def test_no_gradient_flows_between_packed_neighbours():
    model, _ = student(config_of(V1_1))
    segments, target_segments = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[1, 1, 2, 2, 2, 0]])
    target = tokens(1, 6)

    def logits_of_first(x):
        encoded = model.encoder(x, segments, dropout_key=None)
        return model.decode(encoded, target, encoder_segment_ids=segments, decoder_segment_ids=target_segments)[
            0, :2
        ].sum()

    gradient = jax.jit(jax.grad(logits_of_first))(model.token_embedder(tokens(1, 6, seed=1)))
    size = np.abs(np.asarray(gradient)[0]).sum(-1)
    assert (size[:3] > 0).all()
    assert (size[3:] == 0).all()


def test_dropout_needs_a_key_keeps_the_mean_and_repeats_with_the_key():
    config = config_of(V1_1, dropout_rate=0.5)
    model, _ = student(config)
    source, target = tokens(2, 9), tokens(2, 8, seed=1)
    still = forward(model, source, target)
    np.testing.assert_array_equal(still, forward(student(config_of(V1_1))[0], source, target))
    noisy = [forward(model, source, target, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2])
    x = jnp.ones((64, 1, 512))
    kept = layers.Dropout(0.25, jax.random.key(0))(x)
    assert abs(float(kept.mean()) - 1.0) < 0.02
    assert np.unique(np.asarray(kept)).tolist() == pytest.approx([0.0, 4 / 3])


def test_bfloat16_computes_near_float32_from_float32_parameters():
    model, parameters = student(config_of(V1_1))
    half = families.join(families.abstract(config_of(V1_1, dtype="bfloat16"))[0], families.split(model)[1])
    source, target = tokens(2, 9), tokens(2, 8, seed=1)
    exact, rounded = forward(model, source, target), forward(half, source, target)
    assert rounded.dtype == jnp.float32
    assert np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()
    assert not np.array_equal(rounded, exact)
    assert set(parameters) == set(families.split(half)[1])


def test_split_and_join_are_inverse_and_names_are_t5x_s():
    model, parameters = student(config_of(V1_1))
    structure, flat = families.split(model)
    again = families.split(families.join(structure, flat))
    assert again[0] == structure
    for name, x in parameters.items():
        np.testing.assert_array_equal(again[1][name], x)
    for name, shape in {
        "token_embedder/embedding": (40, 24),
        "encoder/relpos_bias/rel_embedding": (3, 32),
        "encoder/layers/0/pre_attention_layer_norm/scale": (24,),
        "encoder/layers/1/attention/query/kernel": (24, 12),
        "encoder/layers/1/mlp/wi_0/kernel": (24, 20),
        "decoder/layers/0/self_attention/out/kernel": (12, 24),
        "decoder/layers/0/encoder_decoder_attention/value/kernel": (24, 12),
        "decoder/layers/1/mlp/wo/kernel": (20, 24),
        "decoder/decoder_norm/scale": (24,),
        "logits_dense/kernel": (24, 40),
    }.items():
        assert flat[name].shape == shape


def test_initial_scales_are_t5x_s():
    config = config_of(V1_1, emb_dim=256, head_dim=32, num_heads=8, mlp_dim=512, vocab_size=500)
    _, flat = families.init(config, seed=0)
    for name, std in {
        "token_embedder/embedding": 1.0,
        "encoder/layers/0/attention/query/kernel": (256 * 32) ** -0.5,
        "encoder/layers/0/attention/key/kernel": 256**-0.5,
        "decoder/layers/0/self_attention/out/kernel": 256**-0.5,
        "decoder/layers/0/mlp/wo/kernel": 512**-0.5,
        "logits_dense/kernel": 256**-0.5,
    }.items():
        assert float(flat[name].std()) == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": 0}, "emb_dim is 0"),
        ({"num_heads": -2}, "num_heads is -2"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
        ({"dtype": "float16"}, "float16"),
        ({"mlp_activations": ("geluu", "linear")}, "Did you mean 'gelu'"),
        ({"mlp_activations": ()}, "empty"),
    ],
)
def test_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(V1_1, **changes)
