"""Generation with a cache against searches written again without one, on random students."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import decoders

from sbs_jax.student import decoding, families, partitioning, stacks, stepping, t5

EOS = 1
SHAPE = {"emb_dim": 24, "num_heads": 4, "head_dim": 6, "mlp_dim": 20, "num_encoder_layers": 1, "num_decoder_layers": 2}
V1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True}
V1_1 = {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}
UMT5 = {**V1_1, "relative_attention_bias": "per_layer"}
# Every other test has v1.1.
KINDS = pytest.mark.parametrize(
    "kind", [V1_0, UMT5, decoders.LLAMA, decoders.GEMMA3], ids=["v1.0", "umt5", "llama", "gemma3"]
)
LONG = pytest.mark.faults  # more of the same, which takes long to compile
# Searched by blocks, on TPU: divides by the 128 tokens of a block.
BLOCKS = 256


def student(*, seed=0, eos=1.0, vocabulary=40, **changes):
    """Makes structure and parameters from numpy; a greater `eos` ends more sequences early."""
    shape = {} if "num_layers" in changes else {**SHAPE, **V1_1, "dropout_rate": 0.0}
    config = families.config_of({**shape, **changes, "vocab_size": vocabulary})
    structure, shapes, _ = families.abstract(config)
    random = np.random.default_rng(seed)
    parameters = {}
    for name in sorted(shapes):
        array = random.normal(size=shapes[name].shape) * (1.0 if name.startswith("token") else 0.4)
        if name == "logits_dense/kernel":
            array[:, 1] *= eos
        parameters[name] = jnp.asarray(array, jnp.float32)
    return structure, parameters


def sources(rows, *, seed=0, length=7, vocabulary=40, padding=()):
    """Makes `[rows, length]` ids of various lengths; the named rows are all padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(2, vocabulary, size=(rows, length))
    for row in range(rows):
        tokens[row, random.integers(2, length + 1) :] = 0
    tokens[list(padding)] = 0
    return jnp.asarray(tokens, jnp.int32)


def greedy(structure, parameters, source, *, length):
    search = jax.jit(lambda p, x: decoding.greedy(families.join(structure, p), x, length=length))
    return jax.device_get(search(parameters, source))


def beam(structure, parameters, source, *, length, beams, penalty=1.0):
    def search(p, x):
        return decoding.beam_search(families.join(structure, p), x, length=length, beams=beams, length_penalty=penalty)

    return jax.device_get(jax.jit(search)(parameters, source))


def slow_log_p(structure, parameters, source, *, length):
    """Computes log probabilities of a row's next token after given ones, by the whole model without a cache."""
    model = jax.jit(lambda p, x, y: jax.nn.log_softmax(families.join(structure, p)(x, y), axis=-1))
    source = np.asarray(source)

    def of(row, sequences):
        # Always the largest number of rows, so that it compiles once.
        target = np.zeros((16, length), np.int32)
        for i, sequence in enumerate(sequences):
            target[i, 1 : len(sequence) + 1] = sequence
        found = np.asarray(model(parameters, np.repeat(source[row : row + 1], 16, axis=0), target))
        return [found[i, len(sequence)] for i, sequence in enumerate(sequences)]

    return of


def slow_beam(log_p_of, row, *, length, beams, penalty):
    """Searches by the rules of `decoding.beam_search`, one row at a time, with lists: (tokens, log probability)."""
    live, ended = [((), 0.0)], []
    for position in range(length):
        extended = []
        for number, ((tokens, before), log_p) in enumerate(
            zip(live, log_p_of(row, [tokens for tokens, _ in live]), strict=True)
        ):
            extended += [(-(np.float32(before) + log_p[v]), number, v, (*tokens, v)) for v in range(len(log_p))]
        live = []
        for rank, (cost, _, token, tokens) in enumerate(sorted(extended)[: 2 * beams]):
            if token != EOS and position + 1 < length:
                live.append((tokens, -cost))
            elif rank < beams:
                ended.append((-cost / (position + 1) ** penalty, -cost, tokens))
        live, ended = live[:beams], sorted(ended, key=lambda each: -each[0])[:beams]
        if not live or (len(ended) == beams and live[0][1] / (position + 1) ** penalty <= ended[-1][0]):
            break
    _, log_p, tokens = ended[0]
    return [*tokens, *[0] * (length - len(tokens))], log_p


def assert_found(got, want, *, atol=1e-4):
    np.testing.assert_array_equal(got[0], [tokens for tokens, _ in want])
    np.testing.assert_allclose(got[1], [log_p for _, log_p in want], rtol=0, atol=atol)


@pytest.fixture
def as_on_tpu(monkeypatch):
    """Traces the TPU's form of the code on this machine."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, tpu=None, cpu=None: (tpu or default)(*args)
    )
    monkeypatch.setattr(partitioning, "platform", lambda: "tpu")


@pytest.mark.parametrize("way", ["greedy", "sample"])
def test_rows_that_have_ended_are_dropped_without_a_trace(way, monkeypatch):
    """Of 16 rows, 8 and then 4 continue; each row gets its own answer."""
    structure, parameters = student(seed=4, eos=6.0)
    source = sources(16, padding=(3, 11))
    keys = jnp.asarray(np.random.default_rng(2).integers(0, 2**32, size=(16, 2), dtype=np.uint32))
    steps = []

    class Counting(stepping.Stepper):
        def step(self, tokens_BN, *args, **options):
            jax.debug.callback(functools.partial(steps.append, len(tokens_BN)))
            return super().step(tokens_BN, *args, **options)

    monkeypatch.setattr(stepping, "Stepper", Counting)

    def search(*, drop_ended):
        def run(p, x, keys):
            model, options = families.join(structure, p), {"length": 40, "drop_ended": drop_ended}
            if way == "greedy":
                return decoding.greedy(model, x, **options)
            return decoding.sample(model, x, keys, temperature=0.9, top_k=0, top_p=1.0, **options)

        steps.clear()
        found = jax.device_get(jax.jit(run)(parameters, source, keys))
        jax.effects_barrier()
        return *found, collections.Counter(steps)

    tokens, score, whole = search(drop_ended=False)
    fewer_tokens, fewer_score, fewer = search(drop_ended=True)
    np.testing.assert_array_equal(fewer_tokens, tokens)
    np.testing.assert_allclose(fewer_score, score, rtol=1e-5)
    ended = tokens == EOS
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, 40)
    lengths = np.sort(np.where(np.asarray(source).any(axis=1), lengths, 0))
    # All rows stay while more than 8 continue, 8 while more than 4 do.
    until = (lengths[7], lengths[11], lengths[-1])
    assert 0 < until[0] < until[1] < until[2]
    assert whole == {16: until[2]}
    assert fewer == {16: until[0], 8: until[1] - until[0], 4: until[2] - until[1]}


def test_a_large_source_is_encoded_some_rows_after_others(monkeypatch):
    structure, parameters = student()
    source = sources(12, length=8)
    whole = greedy(structure, parameters, source, length=6)
    monkeypatch.setattr(decoding, "_ENCODED_AT_ONCE", 40)
    seen = []
    encode = t5.T5.encode
    monkeypatch.setattr(t5.T5, "encode", lambda self, x, **options: seen.append(x.shape) or encode(self, x, **options))
    pieces = greedy(structure, parameters, source, length=6)
    assert seen == [(4, 8)]
    np.testing.assert_array_equal(pieces[0], whole[0])
    np.testing.assert_allclose(pieces[1], whole[1], rtol=1e-5)


@KINDS
def test_steps_give_the_logits_of_the_whole_decoder_at_every_position(kind):
    structure, parameters = student(**kind)
    source = sources(2)
    target = jnp.asarray(np.random.default_rng(1).integers(2, 40, size=(2, 3, 5)), jnp.int32)
    beams, length = target.shape[1:]

    @jax.jit
    def forced(parameters):
        model = families.join(structure, parameters)
        shifted = jnp.pad(target.reshape(-1, length), ((0, 0), (1, 0)))[:, :-1]
        return model(jnp.repeat(source, beams, axis=0), shifted).reshape(2, beams, length, -1)

    @jax.jit
    def stepped(parameters):
        model, segments = families.join(structure, parameters), stacks.source_segments(source)
        encoded = model.encode(source, segment_ids=segments)
        stepper = stepping.Stepper(model, encoded, segments, length=length, beams=beams)
        cache, logits = stepper.empty_cache(), []
        mine = (jnp.arange(length * beams)[None, :] % beams == jnp.arange(beams)[:, None])[None]
        for position in range(length):
            before = target[:, :, position - 1] if position else jnp.full((2, beams), model.config.decoder_start)
            states, cache = stepper.step(before, cache, position=jnp.int32(position), visible_BNP=mine)
            logits.append(states @ stepper.table_DV)
        return jnp.stack(logits, axis=2)

    np.testing.assert_allclose(stepped(parameters), forced(parameters), rtol=2e-5, atol=2e-5)


@KINDS
def test_greedy_gives_the_argmax_of_its_own_teacher_forced_logits(kind):
    structure, parameters = student(seed=3, eos=2.0, **kind)
    source = sources(12, padding=(4,))
    got, log_p = greedy(structure, parameters, source, length=7)

    @jax.jit
    def forced(parameters, tokens):
        model = families.join(structure, parameters)
        logits = model(source, jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1])
        return logits.argmax(-1), decoding.score(model, source, tokens)

    best, score = jax.device_get(forced(parameters, jnp.asarray(got)))
    for number, (row, want) in enumerate(zip(got, best, strict=True)):
        end = 0 if number == 4 else list(row).index(1) + 1 if 1 in row else len(row)
        np.testing.assert_array_equal(row[:end], want[:end])
        assert not row[end:].any()
    assert log_p[4] == 0.0
    np.testing.assert_allclose(log_p, score, rtol=1e-4, atol=1e-4)


def test_greedy_stops_at_eos():
    structure, parameters = student()
    # The first column of all states is positive and makes EOS likely: a student that always says EOS.
    embedding, scale = parameters["token_embedder/embedding"], parameters["decoder/decoder_norm/scale"]
    parameters["token_embedder/embedding"] = embedding.at[:, 0].set(100.0)
    parameters["decoder/decoder_norm/scale"] = scale.at[0].set(1.0)
    parameters["logits_dense/kernel"] = jnp.zeros((24, 40)).at[0, 1].set(1.0)
    got, log_p = greedy(structure, parameters, sources(6, padding=(1,)), length=5)
    want = np.zeros((6, 5), int)
    want[[0, 2, 3, 4, 5], 0] = 1
    np.testing.assert_array_equal(got, want)
    assert log_p[1] == 0.0
    assert (np.delete(log_p, 1) < 0.0).all()


# Several lengths, beams and penalties; greater `eos`, earlier endings. Each platform has a penalty other than 1.
SEARCHES = {
    "plain": (0, 1.0, 6, 4, 1.0),
    "longer": (1, 2.0, 9, 4, 1.0),
    "short preferred": (2, 3.0, 9, 3, 0.6),
    "long preferred": (3, 2.0, 8, 2, 2.0),
    "one token": (4, 2.0, 1, 2, 1.0),
}
QUICK = {"any": ("plain", "short preferred", "one token"), "tpu": ("longer", "long preferred", "one token")}


@pytest.mark.parametrize(
    ("seed", "eos", "length", "beams", "penalty", "platform"),
    [
        pytest.param(*search, platform, id=f"{name}-{platform}", marks=[] if name in QUICK[platform] else LONG)
        for name, search in SEARCHES.items()
        for platform in QUICK
    ],
)
def test_beam_search_finds_what_a_slow_one_finds(seed, eos, length, beams, penalty, platform, request):
    vocabulary = 40
    if platform == "tpu":
        request.getfixturevalue("as_on_tpu")
        vocabulary = BLOCKS
    structure, parameters = student(seed=seed, eos=eos, vocabulary=vocabulary)
    source = sources(10, seed=seed, vocabulary=vocabulary, padding=(3, 9))
    got = beam(structure, parameters, source, length=length, beams=beams, penalty=penalty)
    log_p_of = slow_log_p(structure, parameters, source, length=length)
    want = [
        ([0] * length, 0.0) if row in (3, 9) else slow_beam(log_p_of, row, length=length, beams=beams, penalty=penalty)
        for row in range(10)
    ]
    assert_found(got, want)


def test_the_searches_end_early_and_late_and_change_their_beams():
    """Checks the inputs of the other tests: rows end at different steps, and beam search differs from greedy."""
    ends, differ = set(), 0
    for seed, eos in ((1, 2.0), (2, 3.0)):
        structure, parameters = student(seed=seed, eos=eos)
        source = sources(10, seed=seed)
        found, _ = beam(structure, parameters, source, length=9, beams=4)
        ends |= {list(row).index(1) if 1 in row else 9 for row in found}
        differ += int((found != greedy(structure, parameters, source, length=9)[0]).any(axis=1).sum())
    assert len(ends) >= 4
    assert differ >= 4


@pytest.mark.parametrize("platform", ["any", "tpu"])
def test_bfloat16_searches_stay_near_slow_ones(platform, request):
    """The cache rounds differently, so a close call may differ; then the log probabilities must be close."""
    if platform == "tpu":
        request.getfixturevalue("as_on_tpu")
    structure, parameters = student(seed=1, eos=2.0, vocabulary=BLOCKS, dtype="bfloat16")
    source = sources(10, seed=1, vocabulary=BLOCKS)
    got = beam(structure, parameters, source, length=6, beams=4)
    log_p_of = slow_log_p(structure, parameters, source, length=6)
    want = [slow_beam(log_p_of, row, length=6, beams=4, penalty=1.0) for row in range(10)]
    same = [list(tokens) == list(slow) for tokens, (slow, _) in zip(got[0], want, strict=True)]
    assert sum(same) >= 8
    np.testing.assert_allclose(got[1], [log_p for _, log_p in want], rtol=0.02, atol=0.05)
    tokens, _ = greedy(structure, parameters, source, length=6)
    model = families.join(structure, parameters)
    best = np.asarray(jax.jit(model.__call__)(source, jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]).argmax(-1))
    written = tokens != 0
    assert (tokens == best)[written].mean() > 0.9


def test_a_model_in_float32_computes_in_float32_throughout(as_on_tpu):
    structure, parameters = student(vocabulary=BLOCKS)
    for beams in (1, 4):

        def search(p, x, beams=beams):
            model = families.join(structure, p)
            if beams == 1:
                return decoding.greedy(model, x, length=4)
            return decoding.beam_search(model, x, length=4, beams=beams)

        assert "bf16" not in str(jax.make_jaxpr(search)(parameters, sources(2)))


@pytest.mark.parametrize(
    ("shape", "platform", "kind"),
    [
        pytest.param((1, 8, 1, 1), "any", V1_1, marks=LONG),
        ((1, 1, 4, 2), "any", V1_1),
        ((1, 1, 4, 2), "any", decoders.GEMMA3),  # one head of keys, which does not divide over two devices
        pytest.param((1, 8, 1, 1), "tpu", V1_1, marks=LONG),
        ((1, 4, 1, 2), "tpu", V1_1),
        ((1, 4, 1, 2), "tpu", decoders.LLAMA),
    ],
)
def test_sharded_generation_finds_the_same(shape, platform, kind, request):
    if platform == "tpu":
        request.getfixturevalue("as_on_tpu")
    structure, parameters = student(seed=1, eos=2.0, vocabulary=BLOCKS, **kind)
    source = sources(16, seed=1, vocabulary=BLOCKS, padding=(5,))
    layout = partitioning.Layout(**dict(zip(partitioning.AXES, shape, strict=True)))
    partitioner = layout.partitioner()
    _, shapes, axes = families.abstract(families.join(structure, parameters).config)
    placed = jax.device_put(parameters, partitioner.shardings(shapes, parameters=shapes, axes=axes))
    rows = partitioner.put_batch({"tokens": np.asarray(source)})["tokens"]
    with partitioner.active():
        mine = greedy(structure, placed, rows, length=6), beam(structure, placed, rows, length=6, beams=4)
    alone = greedy(structure, parameters, source, length=6), beam(structure, parameters, source, length=6, beams=4)
    for (tokens, log_p), (want, want_log_p) in zip(mine, alone, strict=True):
        np.testing.assert_array_equal(tokens, want)
        np.testing.assert_allclose(log_p, want_log_p, rtol=1e-4, atol=1e-4)


def test_of_equals_the_first_is_taken(as_on_tpu):
    """Includes logits that only rounding makes equal, across beams and blocks."""
    random = np.random.default_rng(0)
    table = jnp.asarray(random.integers(-2, 3, size=(6, BLOCKS)), jnp.float32)
    states = jnp.asarray(random.integers(-2, 3, size=(5, 3, 6)), jnp.float32)
    log_p = jnp.asarray(-1e4 * random.integers(1, 9, size=(5, 3)), jnp.float32)
    got_value, got_token = jax.jit(decoding.continuations, static_argnames="count")(states, table, log_p, count=6)
    every = jax.nn.log_softmax(states @ table, axis=-1) + log_p[..., None]
    want_value, want_token = jax.lax.top_k(every, 6)
    np.testing.assert_array_equal(got_token, want_token)
    np.testing.assert_allclose(got_value, want_value, rtol=1e-6)
    assert len(np.unique(want_value)) < want_value.size * 0.6
    values = jnp.asarray(random.integers(0, 4, size=(5, 12)), jnp.float32)
    for mine, theirs in zip(decoding.largest(values, 7), jax.lax.top_k(values, 7), strict=True):
        np.testing.assert_array_equal(mine, theirs)
