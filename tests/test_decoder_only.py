"""Decoder-only students against an independent implementation, and by their invariants."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from builders import decoders
from builders.exported import converted
from flax import nnx

from sbs_jax.data import tokens as data_tokens
from sbs_jax.prediction import engine
from sbs_jax.run import checkpoints
from sbs_jax.student import adapters, decoder_only, decoding, families, stacking, stacks
from sbs_jax.training import evaluate, gin_files, loop, students

TYPES = pytest.mark.parametrize("kind", list(decoders.TYPES))


@nnx.jit
def forward(model, source, target, **options):
    return model(source, target, **options)


class Reference:
    """The decoder written again: numpy, float64, one example without padding, loops where they are clearest."""

    def __init__(self, config, parameters):
        self.c = config
        self.p = {name: np.asarray(x).astype(np.float64) for name, x in parameters.items()}

    def norm(self, name, x):
        scale = self.p[f"{name}/scale"] + (1.0 if self.c.norm_plus_one else 0.0)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.layer_norm_epsilon) * scale

    def turned(self, x, layer):
        """Rotates [L, heads, K] as complex numbers."""
        is_global = (layer + 1) % self.c.global_every == 0
        half = self.c.head_dim // 2
        base = self.c.rope_base if is_global else self.c.local_rope_base
        angles = np.arange(len(x))[:, None] / base ** (np.arange(half) / half)
        if is_global:
            angles = angles / self.c.rope_factor
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def sees(self, query, key, layer, source):
        both_in_source = self.c.source_attention == "bidirectional" and query < source and key < source
        if key > query and not both_in_source:
            return False
        return (layer + 1) % self.c.global_every == 0 or abs(query - key) < self.c.window

    def attention(self, name, x, layer, source):
        c, length = self.c, len(x)
        q, k, v = (
            (x @ self.p[f"{name}/{each}/kernel"]).reshape(length, -1, c.head_dim) for each in ("query", "key", "value")
        )
        if c.qk_norm:
            q, k = self.norm(f"{name}/query_norm", q), self.norm(f"{name}/key_norm", k)
        q, k = self.turned(q, layer), self.turned(k, layer)
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        out = np.zeros_like(q)
        for h in range(c.num_heads):
            g = h // (c.num_heads // c.num_kv_heads)
            for i in range(length):
                seen = [j for j in range(length) if self.sees(i, j, layer, source)]
                weights = np.exp(scale * k[seen, g] @ q[i, h])
                out[i, h] = weights / weights.sum() @ v[seen, g]
        return out.reshape(length, -1) @ self.p[f"{name}/out/kernel"]

    def mlp(self, name, x):
        gate = x @ self.p[f"{name}/wi_0/kernel"]
        if self.c.mlp_activations[0] == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return gate * (x @ self.p[f"{name}/wi_1/kernel"]) @ self.p[f"{name}/wo/kernel"]

    def logits(self, source, target):
        table = self.p["token_embedder/embedding"]
        x = table[[*source, self.c.decoder_start, *target[:-1]]]
        x = x * math.sqrt(self.c.emb_dim) if self.c.scale_embeddings else x
        for layer in range(self.c.num_layers):
            at = f"decoder/layers/{layer}"
            y = self.norm(f"{at}/pre_self_attention_layer_norm", x)
            y = self.attention(f"{at}/self_attention", y, layer, len(source))
            x = x + (self.norm(f"{at}/post_self_attention_layer_norm", y) if self.c.post_norms else y)
            y = self.mlp(f"{at}/mlp", self.norm(f"{at}/pre_mlp_layer_norm", x))
            x = x + (self.norm(f"{at}/post_mlp_layer_norm", y) if self.c.post_norms else y)
        x = self.norm("decoder/decoder_norm", x)[len(source) :]
        return x @ (table.T if self.c.logits_via_embedding else self.p["logits_dense/kernel"])


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(2, 40, size=shape).astype(np.int32)


def shifted(target):
    return np.pad(target, ((0, 0), (1, 0)))[:, :-1]


@TYPES
def test_logits_equal_an_independent_implementation(kind):
    config = decoders.config(kind)
    source, target = tokens(2, 9), tokens(2, 6, seed=1)
    got = forward(decoders.model(config), source, shifted(target))
    reference = Reference(config, decoders.parameters(config))
    want = np.stack([reference.logits(s, t) for s, t in zip(source, target, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@TYPES
def test_packing_and_padding_change_nothing(kind):
    """Two examples of other lengths: alone, padded, and in one row, where windows and positions count their own."""
    model = decoders.model(decoders.config(kind))
    sources, targets = [tokens(7), tokens(5, seed=1)], [tokens(4, seed=2), tokens(6, seed=3)]
    alone = [forward(model, s[None], shifted(t[None]))[0] for s, t in zip(sources, targets, strict=True)]
    for s, t, want in zip(sources, targets, alone, strict=True):
        padded = forward(model, np.pad(s, (0, 4))[None], np.pad(shifted(t[None])[0], (0, 3))[None])
        np.testing.assert_allclose(padded[0, : len(t)], want, rtol=1e-5, atol=1e-5)
    row = {
        "encoder_segment_ids": np.repeat([1, 2, 0], [7, 5, 2])[None],
        "decoder_segment_ids": np.repeat([1, 2, 0], [4, 6, 3])[None],
    }
    source = np.pad(np.concatenate(sources), (0, 2))[None]
    target = np.pad(np.concatenate([shifted(t[None])[0] for t in targets]), (0, 3))[None]
    packed = forward(model, source, target, **row)[0]
    np.testing.assert_allclose(packed[:4], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed[4:10], alone[1], rtol=1e-5, atol=1e-5)


def test_a_token_of_id_0_within_a_source_is_read():
    """Qwen3's id 0 is an exclamation mark; only the zeros after a row's last token are padding."""
    model = decoders.model(decoders.config("qwen3"))
    source, target = tokens(1, 6), tokens(1, 3, seed=1)
    source[0, 2] = 0
    want = Reference(model.config, decoders.parameters(model.config)).logits(source[0], target[0])
    got = forward(model, np.pad(source, ((0, 0), (0, 3))), shifted(target))[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_layers_give_the_same_gradients(remat):
    """Scanning takes layers of both kinds, whose windows and rotations differ, through one program."""
    config = dataclasses.replace(decoders.config("gemma3"), num_layers=6)
    source, target = jnp.asarray(tokens(2, 9)), jnp.asarray(tokens(2, 6, seed=1))
    parameters = decoders.parameters(config)

    def gradients(execution, parameters):
        structure = families.abstract(config, execution=execution)[0]

        @jax.jit
        @jax.grad
        def of(parameters):
            logits = families.join(structure, parameters)(source, jnp.asarray(shifted(target)))
            return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1))

        return of(parameters)

    want = gradients(stacks.UNROLLED, parameters)
    found = gradients(stacks.Execution(layers="scanned", remat=remat), stacking.stack(parameters))
    for name, values in stacking.unstack(found).items():
        np.testing.assert_allclose(values, want[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert np.abs(want[name]).max() > 0, name


def test_a_prompt_stands_before_the_source():
    """Adapters that begin as words: a prompt of the words 5 and 6 is a source that begins with them."""
    config = decoders.config("gemma3", num_layers=3)
    tuning = adapters.Tuning(prompt=adapters.Prompt(length=2))
    base = decoders.parameters(config)
    prompt = {"prompt/embedding": math.sqrt(config.emb_dim) * base["token_embedder/embedding"][jnp.array([5, 6])]}
    model = families.join(adapters.abstract(config, tuning).structure, {**base, **prompt})
    source, target = tokens(2, 7), tokens(2, 4, seed=1)
    with_words = np.concatenate([np.tile([5, 6], (2, 1)), source], axis=1).astype(np.int32)
    plain = decoders.model(config)
    np.testing.assert_allclose(
        forward(model, source, shifted(target)), forward(plain, with_words, shifted(target)), rtol=1e-5, atol=1e-5
    )
    want = decoding.greedy(plain, jnp.asarray(with_words), length=5)
    np.testing.assert_array_equal(decoding.greedy(model, jnp.asarray(source), length=5)[0], want[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps on packed rows, with scanned layers and logits in chunks: its configuration and result."""
    folder = tmp_path_factory.mktemp("decoder")
    sizes = {"vocab_size": 384, "emb_dim": 32, "head_dim": 16, "mlp_dim": 64, "decoder_start": 13}
    config = toy.config(
        folder / "run",
        toy.write_records(folder / "records"),
        model=decoders.config("prefix-lm", **sizes, dropout_rate=0.1),
        pack=True,
        vocabulary_chunks=4,
        execution=stacks.Execution(layers="scanned", remat="attended"),
    )
    return config, loop.train(config, config_text="")


def test_a_run_is_evaluated_and_predicts_as_it_was_graded(trained, tmp_path):
    config, result = trained
    assert result["train"]["loss"] < math.log(384)
    evaluation = evaluate.EvaluateConfig(
        checkpoint_path=config.model_dir, layout=config.layout, batch_size=8, output_dir=str(tmp_path)
    )
    assert evaluate.evaluate(evaluation)["accuracy"] == result["test"]["accuracy"]
    best = checkpoints.best_step(config.model_dir)
    graded = [json.loads(line) for line in (tmp_path / f"toy_label-test-{best}.jsonl").read_text().splitlines()]
    asked = [engine.Question(id=row["id"], input=row["input"].removeprefix("predict: ")) for row in graded]
    greedy = engine.Predictor.load(config.model_dir, settings=engine.Settings(batch_size=8))
    for row, answer in zip(graded, greedy.answer(asked), strict=True):
        assert (answer.id, answer.prediction) == (row["id"], row["prediction"])
        assert answer.score == pytest.approx(row["score"], rel=1e-4)


def test_labels_are_scored_as_by_the_whole_model(trained):
    """Closed-set answers come from steps that share the source's keys; `score` reads each label after the source."""
    config, _ = trained
    predictor = engine.Predictor.load(config.model_dir, settings=engine.Settings(batch_size=8, decoding="choices"))
    (answer,) = predictor.answer([engine.Question(id="1", input="a b c")])
    student = students.load_student(config.model_dir, layout=config.layout)
    source, *labels = tokens_of(["predict: a b c", *toy.LETTERS])
    target = np.zeros((len(labels), max(map(len, labels))), np.int32)
    for row, label in zip(target, labels, strict=True):
        row[: len(label)] = label
    model = families.join(student.structure, student.parameters)
    scores = decoding.score(model, jnp.tile(jnp.asarray([source]), (len(labels), 1)), jnp.asarray(target))
    assert answer.prediction == toy.LETTERS[int(np.argmax(scores))]
    assert answer.score == pytest.approx(float(np.max(scores)), rel=1e-4)


def tokens_of(texts):
    return data_tokens.encode(texts, data_tokens.vocabulary("byte"))


def test_a_run_is_exported_as_a_program_and_not_in_t5_s_forms(trained, tmp_path):
    run = Path(trained[0].model_dir)
    summary = converted(run, tmp_path / "program", platforms=("cpu",), check=4)
    assert summary["check"] == {"samples": 4, "same_answers": 4, "percent": 100.0}
    with pytest.raises(ValueError, match="T5X's form is written for T5 only"):
        converted(run, tmp_path / "t5x", "t5x")


def test_a_vocabulary_with_another_end_is_refused(trained, tmp_path):
    config, _ = trained
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, eos_id=2), model_dir=str(tmp_path / "run")
    )
    with pytest.raises(ValueError, match="ends texts with id 1, and the model with id 2"):
        loop.train(other, config_text="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "divisor of num_heads, such as 2"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"eos_id": 40}, "eos_id is 40"),
        ({"eos_id": 0}, "eos_id"),
        ({"window": 4}, "window 4 and global_every 1"),
        ({"source_attention": "both"}, "source_attention"),
        ({"mlp_activations": ("silo", "linear")}, "silu"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decoders.config("llama", **changes)


@pytest.mark.parametrize(
    ("file", "parameters"), [("smollm2_135m", 134_515_008), ("qwen3_0_6b", 596_049_920), ("gemma3_270m", 268_098_176)]
)
def test_published_sizes(file, parameters, tmp_path):
    config = configured(file, tmp_path)
    shapes = families.abstract(config, execution=stacks.Execution(layers="scanned", remat="none"))[1]
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == parameters
    assert families.config_of(dataclasses.asdict(config)) == config


def configured(file, folder):
    """Reads the model of an experiment."""
    (folder / "x.gin").write_text(
        'include "gin_configs/runs/train.gin"\n'
        f'include "gin_configs/models/{file}.gin"\n'
        'include "gin_configs/methods/step_by_step.gin"\n'
        'DATASET = "svamp"\nTASK_FEATURE_LENGTHS = {"inputs": 88, "targets": 112}\n'
        'EXAMPLES = 8\nTRAIN_STEPS = 1\nLEARNING_RATE = 1e-4\nRECORDS_DIR = "r"\nMODEL_DIR = "m"\nVOCABULARY = "v"\n'
    )
    config, _ = gin_files.configure("train.TrainConfig", gin_files=[str(folder / "x.gin")], bindings=[])
    assert isinstance(config.model, decoder_only.DecoderConfig)
    return config.model
