"""Adapters on a student: every kind, in every way the student is computed, and the parameters that are trained."""

import dataclasses
import functools
import json
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from builders import decoders
from conftest import REPOSITORY
from etils import epath

from sbs_jax import hosts
from sbs_jax.data import registry
from sbs_jax.hosts import preemption
from sbs_jax.run import checkpoints, saving
from sbs_jax.student import adapters, decoding, families, partitioning, quantized, stacks
from sbs_jax.student.adapters import IA3, Biases, Bottleneck, LoRA, Prefix, Prompt, Tuning
from sbs_jax.training import feed, loop, students
from sbs_jax.training.state import initial_state
from sbs_jax.training.step import prepare
from sbs_jax.weights import identity, npz

MODEL = dataclasses.replace(toy.MODEL, emb_dim=64, num_heads=4, mlp_dim=128, dropout_rate=0.0)
DEEP = dataclasses.replace(MODEL, num_encoder_layers=2, num_decoder_layers=2)
STACKED = dataclasses.replace(DEEP, num_decoder_layers=1)  # what is scanned is more than one layer, sooner compiled
TIED = dataclasses.replace(MODEL, mlp_activations=("relu",), logits_via_embedding=True)
DECODER = decoders.config(
    "gemma3", vocab_size=MODEL.vocab_size, emb_dim=64, head_dim=16, mlp_dim=128, num_layers=2, global_every=2
)
EOS = MODEL.eos_id
EVERY_LORA = LoRA(rank=4, alpha=8.0, modules=adapters.ALL)
SOME_LORA = dataclasses.replace(EVERY_LORA, modules=("query", "value", "wo"))  # a third of them, sooner compiled
# Tunings that leave a student unchanged until it is trained.
SILENT = {
    "lora": Tuning(lora=EVERY_LORA),
    "bottleneck": Tuning(bottleneck=Bottleneck(width=8)),
    "prefix of length 0": Tuning(prefix=Prefix(length=0), lora=EVERY_LORA),
    "prompt of length 0": Tuning(prompt=Prompt(length=0), lora=EVERY_LORA),
    "ia3": Tuning(ia3=IA3()),
    "biases": Tuning(biases=Biases(), trained=("rel_embedding",)),
    "layer norm": Tuning(trained=(".*norm/scale",)),
    "last layers": Tuning(last_layers=1),
}
SPOKEN = {
    "prompt": Tuning(prompt=Prompt(length=3)),
    "prefix": Tuning(prefix=Prefix(length=3)),
    "decoder prefix": Tuning(prefix=Prefix(length=2, attentions=("encoder_decoder_attention",))),
    "bfloat16": Tuning(base="bfloat16", lora=EVERY_LORA),
    "int8": Tuning(base="int8", lora=EVERY_LORA, ia3=IA3()),
    "nf4": Tuning(base="nf4", lora=SOME_LORA, bottleneck=Bottleneck(width=8)),
    "everything": Tuning(
        base="nf4",
        trained=(".*norm/scale",),
        lora=EVERY_LORA,
        bottleneck=Bottleneck(width=8),
        prompt=Prompt(length=2),
        prefix=Prefix(length=2),
        ia3=IA3(),
        biases=Biases(),
    ),
}


@functools.cache
def base_of(config: families.ModelConfig):
    return jax.jit(lambda: families.init(config, seed=0)[1])()


@functools.cache
def begun(config: families.ModelConfig, tuning: Tuning):
    """Makes a student with a tuning, untrained: structure and parameters."""
    of = adapters.abstract(config, tuning)

    def initial(base):
        found = {}
        for name, value in base.items():
            found |= adapters.freeze(name, value, shapes=of.shapes, form=tuning.base)
        return found | adapters.init(config, tuning, found, structure=of.structure, seed=0)

    parameters = jax.jit(initial)(base_of(dataclasses.replace(config, dropout_rate=0.0)))
    assert {name: (x.shape, x.dtype) for name, x in parameters.items()} == {
        name: (x.shape, x.dtype) for name, x in of.shapes.items()
    }
    return of, parameters


def adapted(config: families.ModelConfig, tuning: Tuning, *, changed: float = 0.0):
    """Makes `begun` and adds random values to the trained parameters."""
    of, parameters = begun(config, tuning)
    parameters = dict(parameters)
    rng = np.random.default_rng(1)
    for name in sorted(of.trained) if changed else ():
        value = np.asarray(parameters[name])
        noise = rng.normal(size=value.shape) * changed
        parameters[name] = jnp.asarray((value + noise.astype(np.float32)).astype(value.dtype))
    return of, parameters


SOURCE = np.random.default_rng(0).integers(3, 380, (4, 10)).astype(np.int32)
SOURCE[1, 6:] = 0
TARGET = np.random.default_rng(1).integers(3, 380, (4, 7)).astype(np.int32)


def logits_of(structure: families.Structure):
    return jax.jit(lambda p: families.join(structure, p)(jnp.asarray(SOURCE), jnp.asarray(TARGET)))


@functools.cache
def plain_logits(config: families.ModelConfig) -> np.ndarray:
    return np.asarray(logits_of(families.abstract(config)[0])(base_of(config)))


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, MODEL) for name in SILENT), ("lora", TIED), ("last layers", DECODER)],
    ids=lambda value: str(value)[:20],
)
def test_at_first_a_student_answers_as_without_it(name, config):
    of, parameters = adapted(config, SILENT[name])
    np.testing.assert_array_equal(logits_of(of.structure)(parameters), plain_logits(config))


def forced(model: families.Model, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores generated rows in one teacher-forced call: the best tokens, and the log probability up to EOS."""
    shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    source = jnp.tile(jnp.asarray(SOURCE), (len(tokens) // len(SOURCE), 1))
    log_p = jax.nn.log_softmax(model(source, shifted), axis=-1)
    chosen = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    ended = jnp.cumsum(tokens == EOS, axis=1) - (tokens == EOS)
    return jnp.argmax(log_p, axis=-1), jnp.sum(jnp.where(ended == 0, chosen, 0.0), axis=1)


@pytest.mark.parametrize(
    ("name", "whole", "config"),
    [
        ("everything", True, MODEL),
        ("everything", False, MODEL),
        pytest.param("lora", False, MODEL, marks=pytest.mark.faults),  # part of "everything"
        ("decoder prefix", True, MODEL),
        ("int8", True, MODEL),
        ("everything", True, DECODER),
    ],
)
def test_generation_is_that_of_the_teacher_forced_student(name, whole, config, monkeypatch):
    """Greedy and beam search use the stepping decoder; their scores must equal those of the whole model."""
    if not whole:  # too large to be merged and unpacked before the loop: that is done at every position
        monkeypatch.setattr("sbs_jax.student.stepping.MAX_GATHERED_BYTES", 0)
    tuning = (SILENT | SPOKEN)[name]
    of, parameters = adapted(config, tuning, changed=0.02)

    @jax.jit
    def run(parameters):
        model = families.join(of.structure, parameters)
        tokens, scores = decoding.greedy(model, jnp.asarray(SOURCE), length=7)
        beams, beam_scores = decoding.beam_search(model, jnp.asarray(SOURCE), length=7, beams=3)
        return tokens, jnp.concatenate([scores, beam_scores]), forced(model, jnp.concatenate([tokens, beams]))

    tokens, scores, (best, wanted) = jax.device_get(run(parameters))
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-4)
    before_end = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) == 0
    np.testing.assert_array_equal(tokens[before_end], best[: len(tokens)][before_end])


@pytest.mark.parametrize("name", ["lora", "int8", "nf4"])
def test_a_merged_kernel_is_what_a_layer_computes(name):
    of, parameters = adapted(MODEL, (SILENT | SPOKEN)[name], changed=0.05)
    model: Any = families.join(of.structure, parameters)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 128)).astype(np.float32))
    for dense in (model.decoder.layers[0].mlp.wo, model.stacks["encoder"].layers[0].attention.value):
        mine = x[..., : dense.matrix().shape[0]]
        np.testing.assert_allclose(dense(mine), mine @ dense.merged(), rtol=1e-4, atol=1e-4)


def test_packed_rows_with_a_prefix_are_rows_of_their_own():
    of, parameters = adapted(MODEL, SPOKEN["prefix"], changed=0.05)

    @jax.jit
    def model(source, target, **segments):
        return families.join(of.structure, parameters)(source, target, **segments)

    alone = [model(jnp.asarray(SOURCE[i : i + 1, :5]), jnp.asarray(TARGET[i : i + 1, :4])) for i in (0, 2)]
    segments = [jnp.asarray([[1] * n + [2] * n + [0]]) for n in (5, 4)]

    def packed(rows, length):
        return jnp.asarray(np.concatenate([rows[0, :length], rows[2, :length], [0]])[None])

    together = model(
        packed(SOURCE, 5), packed(TARGET, 4), encoder_segment_ids=segments[0], decoder_segment_ids=segments[1]
    )
    # Positions of the second example begin anew only for a bias that is relative, which T5's is.
    np.testing.assert_allclose(together[:, :4], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[:, 4:8], alone[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_what_stands_before_a_row_is_seen_from_every_place_of_it(name):
    logits = []
    for changed in (0.0, 0.5):
        of, parameters = adapted(MODEL, SPOKEN[name], changed=changed)
        logits.append(np.asarray(logits_of(of.structure)(parameters)))
    assert np.all(np.abs(logits[1] - logits[0]).max(axis=-1) > 1e-3)


# ------------------------------------------------------------------------------------ NEFTune


def test_neftune_s_noise_is_uniform_within_its_bound_and_not_on_padding():
    """Packs examples of 300, 100 and 50 tokens; the noise of each has the bound of its own length."""
    segments = np.zeros((2, 300), np.int32)
    segments[0], segments[1, :100], segments[1, 100:150] = 1, 1, 2
    x = jnp.zeros((2, 300, 64))
    noise = np.asarray(stacks.add_noise(x, jnp.asarray(segments), alpha=5.0, key=jax.random.key(0)))
    assert np.all(noise[1, 150:] == 0)
    for part, length in ((noise[0], 300), (noise[1, :100], 100), (noise[1, 100:150], 50)):
        bound = 5.0 / np.sqrt(length * 64)
        assert 0.99 * bound < np.abs(part).max() <= bound
        assert np.var(part) == pytest.approx(bound**2 / 3, rel=0.05)
        assert abs(np.mean(part)) < 0.05 * bound


def test_neftune_is_for_training_alone_and_off_by_default():
    noisy = dataclasses.replace(MODEL, neftune_alpha=5.0)
    decoder = dataclasses.replace(MODEL, neftune_decoder_alpha=5.0)

    def logits(config, key=None):
        @jax.jit
        def run(parameters):
            model = families.join(families.abstract(config)[0], parameters)
            return model(jnp.asarray(SOURCE), jnp.asarray(TARGET), dropout_key=key)

        return np.asarray(run(base_of(MODEL)))

    key = jax.random.key(3)
    plain = logits(MODEL, key)
    np.testing.assert_array_equal(plain, logits(MODEL))  # no dropout here: the key alone changes nothing
    np.testing.assert_array_equal(logits(noisy), plain)
    for config in (noisy, decoder):
        assert np.abs(logits(config, key) - plain).max() > 1e-3
    with pytest.raises(ValueError, match="neftune_alpha is -1"):
        dataclasses.replace(MODEL, neftune_alpha=-1.0)


def test_dropout_draws_the_same_masks_with_and_without_lora():
    """LoRA's dropout has its own keys, so runs with and without it can be compared."""
    config = dataclasses.replace(MODEL, dropout_rate=0.1)
    of, parameters = adapted(config, Tuning(lora=LoRA(rank=2, alpha=2.0, dropout=0.5, modules=adapters.ALL)))
    key = jax.random.key(1)
    with_lora, without = (
        jax.jit(lambda p, s=s: families.join(s, p)(jnp.asarray(SOURCE), jnp.asarray(TARGET), dropout_key=key))(p)
        for s, p in ((of.structure, parameters), (families.abstract(config)[0], base_of(MODEL)))
    )
    np.testing.assert_array_equal(with_lora, without)


# ------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory):
    registry.add(toy.DATASET)
    return toy.write_records(tmp_path_factory.mktemp("records"))


def config_of(folder, records_dir, tuning, **changes):
    return toy.config(folder, records_dir, tuning=tuning, **{"model": MODEL, **changes})


def updates(config, *, count=3, devices=None):
    """Makes some updates: the state before and after, and the losses."""
    registry.configure(config.data)
    trainer = prepare(config, devices=devices)
    state = initial_state(config, trainer)
    before = jax.device_get(trainer.parameters(state))
    losses = []
    for _, batch in zip(range(count), feed.train_batches(config, trainer, skip=0), strict=False):
        state, metrics = trainer.step(state, trainer.partitioner.put_batch(batch))
        losses.append(float(metrics["loss"]))
    return trainer, before, state, losses


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param("nf4", MODEL, id="nf4"),
        pytest.param("last layers", DEEP, id="last layers", marks=pytest.mark.faults),
    ],
)
def test_what_is_trained_has_gradients_and_state_and_the_rest_stays(tmp_path, records_dir, name, model):
    tuning = (SILENT | SPOKEN)[name]
    trainer, before, state, losses = updates(
        config_of(tmp_path, records_dir, tuning, model=model, learning_rate=optax.constant_schedule(1e-2))
    )
    trained = adapters.abstract(model, tuning).trained
    assert set(state.parameters) == trained
    assert set(state.frozen) == set(before) - trained
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in state.parameters.values())
    after = jax.device_get(trainer.parameters(state))
    for name in before:
        changed = not np.array_equal(before[name], after[name])
        assert changed == (name in trained), name
    assert losses[-1] < losses[0]


QLORA_AND_PREFIX = Tuning(base="nf4", lora=SOME_LORA, prefix=Prefix(length=3))
LAYOUTS = {
    "fsdp x tp": partitioning.Layout(slice=1, data=1, fsdp=4, tensor=2),
    "dp": partitioning.DATA_PARALLEL,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuning", "mesh", "layers"),
    [
        pytest.param(QLORA_AND_PREFIX, "fsdp x tp", "scanned", id="qlora and prefix"),
        pytest.param(SPOKEN["nf4"], "fsdp x tp", "scanned", id="nf4", marks=pytest.mark.faults),  # bottlenecks too
        pytest.param(SPOKEN["prefix"], "dp", "scanned", id="prefix", marks=pytest.mark.faults),
        pytest.param(SILENT["last layers"], "fsdp x tp", "unrolled", id="last layers", marks=pytest.mark.faults),
    ],
)
def test_sharded_and_scanned_training_is_that_of_one_device(tmp_path, records_dir, tuning, mesh, layers):
    alone = partitioning.Layout(slice=1, data=1, fsdp=1, tensor=1)
    one = config_of(tmp_path, records_dir, tuning, model=STACKED, layout=alone, optimizer=optax.sgd)
    execution = stacks.Execution(layers=layers, remat="full" if layers == "scanned" else "none")
    many = dataclasses.replace(one, layout=LAYOUTS[mesh], execution=execution)
    trainer, _, state, losses = updates(one, count=2, devices=jax.devices()[:1])
    sharded_trainer, _, sharded, losses_too = updates(many, count=2)
    np.testing.assert_allclose(losses_too, losses, rtol=2e-4)
    wanted, found = (jax.device_get(t.parameters(s)) for t, s in ((trainer, state), (sharded_trainer, sharded)))
    for name, want in wanted.items():
        scale = 0.0 if want.dtype in (np.uint8, np.int8) else np.abs(want.astype(np.float32)).max()
        got, want = (x.astype(np.float32) for x in (found[name], want))
        np.testing.assert_allclose(got, want, rtol=2e-3 * bool(scale), atol=2e-3 * scale, err_msg=name)


def test_the_optimiser_s_state_may_live_in_host_memory(tmp_path, records_dir):
    config = config_of(tmp_path, records_dir, Tuning(lora=SOME_LORA))
    _, _, state, losses = updates(config)
    _, _, hosted, losses_too = updates(dataclasses.replace(config, optimizer_memory="pinned_host"))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(hosted.optimizer) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert losses_too == losses
    for want, got in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(hosted.optimizer), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_run_keeps_its_adapters_alone_and_goes_on_where_it_was(tmp_path, records_dir, caplog, monkeypatch):
    tuning = SPOKEN["nf4"]
    base = tmp_path / "base.npz"
    npz.save_npz(base, families.init(MODEL, seed=7)[1], dtype="float32")
    whole = config_of(tmp_path / "whole", records_dir, tuning, initial_checkpoint_path=str(base))
    programs = loop.Programs.of(whole)
    with caplog.at_level(logging.INFO, "sbs_jax"):
        loop.train(whole, config_text="", programs=programs)
    said = next(message for message in caplog.messages if message.startswith("Trained: "))
    share = sum(x.size for n, x in adapters.abstract(MODEL, tuning).shapes.items() if "lora" in n or "adapter" in n)
    assert said.startswith(f"Trained: {share:,} parameters")
    assert f"frozen: {sum(math.prod(x.shape) for x in families.abstract(MODEL)[1].values()):,}, " in said
    resumed = dataclasses.replace(whole, model_dir=str(tmp_path / "resumed"))
    steps = iter(range(1, 7))
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "preemption_requested", lambda: next(steps) == 3)
        with pytest.raises(preemption.PreemptedError):
            loop.train(resumed, config_text="", programs=programs)
    assert checkpoints.steps(resumed.model_dir) == [3]
    loop.train(resumed, config_text="", programs=programs)
    ones, others = (students.load_student(c.model_dir, layout=partitioning.DATA_PARALLEL) for c in (whole, resumed))
    assert set(ones.parameters) == set(adapters.abstract(MODEL, tuning).shapes)
    for name, want in ones.parameters.items():
        np.testing.assert_array_equal(others.parameters[name], want, err_msg=name)
    place = tmp_path / "whole" / "checkpoints" / "6"
    metadata = checkpoints.read_metadata(tmp_path / "whole", 6)
    assert Tuning.of(json.loads(json.dumps(metadata["tuning"]))) == tuning
    assert metadata["base"]["path"] == str(base)
    stored = saving.array_handler().metadata(epath.Path(place / "parameters")).tree
    assert set(stored) == adapters.abstract(MODEL, tuning).trained

    npz.save_npz(base, families.init(MODEL, seed=8)[1], dtype="float32")
    with pytest.raises(ValueError, match=r"adapters of another base.*Give the base they were trained on"):
        students.load_student(tmp_path / "whole", layout=partitioning.DATA_PARALLEL)
    with pytest.raises(ValueError, match="adapters of another base"):
        loop.train(dataclasses.replace(whole, train_steps=9), config_text="", accept_changes=True)


def test_fingerprints_tell_values_and_places_apart_and_do_not_depend_on_the_mesh():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    first = np.asarray(identity.fingerprint(jnp.asarray(x)))
    moved, changed = x.copy(), x.copy()
    moved[[3, 9]] = moved[[9, 3]]
    changed[5, 5] = np.nextafter(changed[5, 5], np.float32(9))
    for other in (moved, changed, x[:, ::-1].copy(), x.reshape(32, 64)[:, ::-1].copy()):
        assert np.all(np.asarray(identity.fingerprint(jnp.asarray(other))) != first)
    partitioner = LAYOUTS["fsdp x tp"].partitioner()
    cut = jax.device_put(x, partitioner.sharding(("embed", "mlp")))
    np.testing.assert_array_equal(np.asarray(identity.fingerprint(cut)), first)


def test_prompts_and_prefixes_begin_as_words(records_dir):
    of, parameters = adapted(MODEL, Tuning(prompt=Prompt(length=5), prefix=Prefix(length=4)))
    table = np.asarray(parameters["token_embedder/embedding"])
    found = [np.flatnonzero((table == row).all(axis=1)) for row in np.asarray(parameters["prompt/embedding"])]
    words = [int(index[0]) for index in found]
    assert len(set(words)) == 5
    assert min(words) >= 3
    model: Any = families.join(of.structure, parameters)
    layer = model.stacks["encoder"].layers[0]
    x = jnp.asarray(table[words[:4]])[None]
    want = layer.attention.key(layer.pre_attention_layer_norm(x))[0]
    np.testing.assert_allclose(parameters["encoder/layers/0/attention/prefix/key"], want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (
            Tuning(lora=LoRA(rank=4, alpha=8.0, modules=("quary",))),
            r"'quary', which matches nothing. Did you mean 'query'",
        ),
        (Tuning(lora=LoRA(rank=65, alpha=8.0)), r"rank is 65, above the smaller dimension .* \[64, 64\]"),
        (Tuning(trained=(".*layer_norms/scale",)), "matches nothing"),
        (Tuning(base="nf4", quantized=("token_embedder",), lora=EVERY_LORA), "the matrix of the logits.*not quantized"),
        (Tuning(last_layers=3), "last_layers is 3"),
        (Tuning(prefix=Prefix(length=1, attentions=("mlp",))), "Prefix.attentions has 'mlp'"),
    ],
)
def test_a_tuning_that_does_not_fit_the_student_says_how(tuning, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        adapters.abstract(TIED, tuning)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0, alpha=1.0), "rank is 0"),
        (lambda: LoRA(rank=4, alpha=-1.0), "alpha is -1"),
        (lambda: LoRA(rank=4, alpha=1.0, dropout=1.0), "dropout is 1"),
        (lambda: LoRA(rank=4, alpha=1.0, modules="query"), "expected patterns"),
        (lambda: LoRA(rank=4, alpha=1.0, modules=("(",)), r"'\(' is not a regular expression"),
        (lambda: Bottleneck(width=8, activation="gleu"), "Did you mean 'gelu'"),
        (lambda: Tuning(base="nf5", lora=EVERY_LORA), "Did you mean 'nf4'"),
        (lambda: Tuning(), "trains nothing"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_that_do_not_divide_into_blocks_are_not_held_in_nf4():
    config = dataclasses.replace(MODEL, num_heads=3)
    with pytest.raises(ValueError, match=r"48 rows do not divide into blocks of 64"):
        adapters.abstract(config, Tuning(base="nf4", lora=EVERY_LORA))
    of = adapters.abstract(config, Tuning(base="nf4", quantized=("wi_0", "wi_1", "wo"), lora=EVERY_LORA))
    assert of.shapes["encoder/layers/0/mlp/wo/kernel/codes"].shape == (64, 64)


def test_scanned_layers_are_alike_or_refused(tmp_path, records_dir):
    scanned = stacks.Execution(layers="scanned", remat="none")
    for tuning in (SILENT["last layers"], Tuning(lora=LoRA(rank=2, alpha=2.0, modules=("encoder/layers/0/.*query",)))):
        with pytest.raises(ValueError, match='LAYERS = "unrolled"'):
            adapters.abstract(DEEP, tuning, execution=scanned)


def test_a_prompt_is_not_packed(tmp_path, records_dir):
    with pytest.raises(ValueError, match="PACK = False"):
        config_of(tmp_path, records_dir, SPOKEN["prompt"], pack=True)
    with pytest.raises(ValueError, match="optimizer_memory is 'host'"):
        config_of(tmp_path, records_dir, None, optimizer_memory="host")


COMPOSED = """
import sys, pathlib
from sbs_jax.student import adapters
from sbs_jax.training import gin_files
for file in sys.argv[1:]:
    config, text = gin_files.configure(
        "train.TrainConfig",
        gin_files=["gin_configs/experiments/svamp/cpu.gin", file, "gin_configs/adapters/neftune.gin"],
        bindings=["MODEL_DIR=/nowhere", "RECORDS_DIR=/nowhere", "PACK=False"],
    )
    if "neftune" not in file:
        print(pathlib.Path(file).stem, len(adapters.abstract(config.model, config.tuning).trained))
    assert config.model.neftune_alpha == 5.0
"""


@pytest.mark.slow
def test_every_file_of_adapters_is_an_include_on_top_of_a_method(starter, tmp_path):
    files = sorted((REPOSITORY / "gin_configs/adapters").glob("*.gin"))
    names = [str(file.relative_to(REPOSITORY)) for file in files]
    done = starter.run(tmp_path, names, command=("-c", COMPOSED))
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert set(counts) == {file.stem for file in files} - {"neftune"}
    assert all(int(count) > 0 for count in counts.values())
    assert quantized.NF4 in (REPOSITORY / "gin_configs/adapters/qlora.gin").read_text()
