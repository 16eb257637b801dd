"""Families whose layers rotate against an independent implementation, and by their invariants."""

import dataclasses
import json
import math
import re
from pathlib import Path

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import toy
from builders import decoders
from builders.exported import converted
from flax import nnx

from sbs_jax.data import tokens as data_tokens
from sbs_jax.pages import report
from sbs_jax.prediction import engine
from sbs_jax.run import checkpoints, directory
from sbs_jax.student import adapters, decoding, families, stacking, stacks
from sbs_jax.training import evaluate, gin_files, loop, students
from sbs_jax.weights import opening

KINDS = pytest.mark.parametrize("kind", list(decoders.ALL))


@nnx.jit
def forward(model, source, target, **options):
    return model(source, target, **options)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(2, 40, size=shape).astype(np.int32)


def shifted(target):
    return np.pad(target, ((0, 0), (1, 0)))[:, :-1]


@KINDS
def test_logits_equal_an_independent_implementation(kind):
    config = decoders.config(kind)
    source, target = tokens(2, 9), tokens(2, 6, seed=1)
    got = forward(decoders.model(config), source, shifted(target))
    reference = decoders.Reference(config, decoders.parameters(config))
    want = np.stack([reference.logits(s, t) for s, t in zip(source, target, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@KINDS
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
    want = decoders.Reference(model.config, decoders.parameters(model.config)).logits(source[0], target[0])
    got = forward(model, np.pad(source, ((0, 0), (0, 3))), shifted(target))[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [*((kind, 0) for kind in decoders.ALL), ("gemma3", 2), *((k, 2) for k in decoders.ENCODER_DECODERS)],
)
def test_cached_steps_equal_teacher_forcing(kind, prefix):
    """Each step reads its source's keys and its own earlier ones, with a prefix in every attention or without."""
    config = decoders.config(kind)
    model = decoders.model(config)
    if prefix:
        tuning = adapters.Tuning(prefix=adapters.Prefix(length=prefix))
        shapes = adapters.abstract(config, tuning).shapes
        random = np.random.default_rng(5)
        added = {
            name: jnp.asarray(random.normal(size=leaf.shape), jnp.float32)
            for name, leaf in sorted(shapes.items())
            if "/prefix/" in name
        }
        assert added
        model = families.join(adapters.abstract(config, tuning).structure, {**decoders.parameters(config), **added})
    source, target = jnp.pad(tokens(2, 6), ((0, 0), (0, 2))), jnp.asarray(tokens(2, 3, 5, seed=1))
    score = nnx.jit(decoding.score)
    want = [score(model, source, target[:, n]) for n in range(3)]
    got = nnx.jit(decoding.score_choices)(model, source, target)
    np.testing.assert_allclose(got, np.stack(want, axis=1), rtol=1e-4)


@pytest.mark.parametrize(("kind", "remat"), [("gemma3", "none"), ("gemma3", "full"), ("t5gemma2", "full")])
def test_scanned_layers_give_the_same_gradients(kind, remat):
    """Scanning takes layers of both kinds, whose windows and rotations differ, through one program."""
    config = decoders.config(kind, **({"num_layers": 6} if kind == "gemma3" else {}))
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


@pytest.mark.parametrize("kind", ["gemma3", "t5gemma2"])
def test_a_prompt_stands_before_the_source(kind):
    """Adapters that begin as words: a prompt of the words 5 and 6 is a source that begins with them."""
    config = decoders.config(kind)
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


# Two layers, as kinds of layers alternate; dropout, which takes longest to compile, in one family of each class. The
# Llama reads its source in both directions, which transformers cannot do; test_decoder_weights.py exports a causal one.
TWO_LAYERS = {"num_encoder_layers": 2, "num_decoder_layers": 2}
RUNS = {
    "llama": {"num_layers": 2, "source_attention": "bidirectional", "dropout_rate": 0.1},
    "gemma3": {"num_layers": 2, "global_every": 2},
    "t5gemma2": {**TWO_LAYERS, "dropout_rate": 0.1},
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, tmp_path_factory):
    """A run of six steps on packed rows, with scanned layers and logits in chunks: its configuration and result."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"vocab_size": 384, "emb_dim": 32, "head_dim": 16, "mlp_dim": 64, "decoder_start": 13}
    sizes |= RUNS[request.param]
    config = toy.config(
        folder / "run",
        toy.write_records(folder / "records"),
        model=decoders.config(request.param, **sizes),
        pack=True,
        vocabulary_chunks=4,
        execution=stacks.Execution(layers="scanned", remat="attended"),
    )
    return config, loop.train(config, config_text="")


def test_a_run_is_evaluated_and_predicts_as_it_was_graded(trained, tmp_path):
    config, result = trained
    losses = [line["loss"] for line in directory.read_metrics(config.model_dir) if line["kind"] == "train"]
    assert result["train"]["loss"] == losses[-1] < losses[0]
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


@pytest.mark.parametrize("trained", ["llama", "t5gemma2"], indirect=True)
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
    scores = nnx.jit(decoding.score)(model, jnp.tile(jnp.asarray([source]), (len(labels), 1)), jnp.asarray(target))
    assert answer.prediction == toy.LETTERS[int(np.argmax(scores))]
    assert answer.score == pytest.approx(float(np.max(scores)), rel=1e-4)


def tokens_of(texts):
    return data_tokens.encode(texts, data_tokens.vocabulary("byte"))


def test_a_run_is_exported_as_a_program_and_not_in_t5_s_forms(trained, tmp_path):
    config, run = trained[0], Path(trained[0].model_dir)
    summary = converted(run, tmp_path / "program", platforms=("cpu",), check=4)
    assert summary["check"] == {"samples": 4, "same_answers": 4, "percent": 100.0}
    if getattr(config.model, "source_attention", "causal") == "causal":
        converted(run, tmp_path / "transformers", "hf", check=0)
        converted(tmp_path / "transformers", tmp_path / "again", "sbs", check=0)
        again = opening.open_any(tmp_path / "again")
        assert families.differences(again.config, config.model) == []
        for name, array in opening.open_any(run).arrays.items():
            np.testing.assert_array_equal(again.arrays[name].whole(), array.whole(), err_msg=name)
    with pytest.raises(ValueError, match="T5X's form is written for T5 only"):
        converted(run, tmp_path / "t5x", "t5x")


def test_a_run_is_served_and_reported(trained, starter, tmp_path):
    config, result = trained
    arguments = ["serve", config.model_dir, "--port", "0", "--compiled", "off", "--batch_size", "2"]
    program = "from sbs_jax.data import registry; import toy; registry.add(toy.DATASET)"
    command = ("-c", f"{program}; import sys; from sbs_jax.cli import main; sys.exit(main.main(sys.argv[1:]))")
    with starter.alone(tmp_path, arguments, command=command) as process:
        processes.until(lambda: "\n" in process.said(), [process])
        (address,) = re.findall(r"ready: (http://[\d.:]+) ", process.said())
        answers = httpx2.post(f"{address}/predict", json={"inputs": [{"input": "a b c"}]}, timeout=60).json()["answers"]
    predictor = engine.Predictor.load(config.model_dir, settings=engine.Settings(batch_size=2))
    (want,) = predictor.answer([engine.Question(id="1", input="a b c")])
    assert [each["prediction"] for each in answers] == [want.prediction]
    report.write_page(tmp_path / "page.html", [report.identify(config.model_dir)], title=None, notes=())
    accuracy = f"{result['test']['accuracy']:.1f}"
    assert accuracy in (tmp_path / "page.html").read_text()


ONE_RUN = pytest.mark.parametrize("trained", ["gemma3"], indirect=True)


@ONE_RUN
def test_weights_that_compute_something_else_are_refused(trained, tmp_path):
    """The shapes agree, so only the settings that the checkpoint states tell."""
    config, _ = trained
    other = dataclasses.replace(config.model, rope_base=500.0, query_scale=0.5, dropout_rate=0.0)
    start = {"initial_checkpoint_path": config.model_dir, "model_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=r"has rope_base 500.0, not 1000.0; query_scale 0.5, not 0.25\. Include"):
        loop.train(dataclasses.replace(config, model=other, **start), config_text="")


@ONE_RUN
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


# The sums of the released checkpoints; for T5Gemma 2 without vision and the vector that ends an image.
SIZES = {
    "smollm2_135m": 134_515_008,
    "qwen3_0_6b": 596_049_920,
    "gemma3_270m": 268_098_176,
    "t5gemma2_270m": 368_424_192,
    "t5gemma2_1b": 1_697_782_016,
    "t5gemma2_4b": 7_089_110_016,
    "t5gemma_small": 312_517_632,
    "t5gemma_base": 591_490_560,
    "t5gemma_large": 1_241_761_792,
    "t5gemma_ml": 2_200_345_344,
    "t5gemma_xl": 3_766_980_608,
    "t5gemma_2b": 5_596_853_760,
    "t5gemma_9b": 20_333_401_088,
}


@pytest.mark.parametrize("file", SIZES)
def test_published_sizes(file, tmp_path):
    """Counted on one and two layers of each stack, since the others are equal and each takes its time."""
    config = configured(file, tmp_path)
    counts = [name for name in ("num_layers", "num_encoder_layers", "num_decoder_layers") if hasattr(config, name)]
    fewer = dict.fromkeys(counts, 1)
    total = size_of(config, **fewer)
    for name in counts:
        total += (getattr(config, name) - 1) * (size_of(config, **fewer | {name: 2}) - size_of(config, **fewer))
    assert total == SIZES[file]
    assert families.config_of(dataclasses.asdict(config)) == config


def size_of(config, **layers):
    shapes = families.abstract(dataclasses.replace(config, **layers))[1]
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


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
    return config.model
