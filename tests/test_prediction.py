"""Answers to questions: shapes, decodings, precision of weights, errors."""

import dataclasses
import itertools
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sbs_jax import compiling
from sbs_jax.data import registry, tokens
from sbs_jax.prediction import answerer, compiled, precision, shapes
from sbs_jax.prediction.engine import Answer, Predictor, Question, Settings
from sbs_jax.student import decoding, families, partitioning
from sbs_jax.training import evaluate, students
from tasks import builtin

LIMIT = toy.UNTRAINED_LIMIT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    return toy.write_untrained(folder)


@pytest.fixture(scope="module")
def student(run: Path) -> students.Student:
    return students.load_student(run, layout=partitioning.DATA_PARALLEL)


def predictor(student: students.Student, **settings: Any) -> Predictor:
    return Predictor({None: student}, settings=Settings(**{"batch_size": 8, **settings}))


def questions(count: int, *, seed: int = 0) -> list[Question]:
    """Makes questions of various lengths, in no order."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh "))
    return [
        Question(id=f"q{number}", input="".join(random.choice(letters, random.integers(1, LIMIT - 12))))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def greedy(student: students.Student) -> Predictor:
    return predictor(student)


@pytest.fixture(scope="module")
def answers(greedy: Predictor) -> list[Answer]:
    return greedy.answer(questions(30))


def close(got: list[Answer], want: list[Answer]) -> None:
    assert [(a.id, a.prediction, a.error) for a in got] == [(a.id, a.prediction, a.error) for a in want]
    np.testing.assert_allclose([a.score or 0 for a in got], [a.score or 0 for a in want], rtol=1e-4, atol=1e-4)


def test_a_fresh_process_knows_the_shipped_datasets():
    code = "from sbs_jax.data import task_names; print(task_names.split('svamp_label')[0].name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "svamp", done.stderr


# ------------------------------------------------------------------------------------ greedy, shapes


def test_answers_are_those_of_the_student_padded_to_its_limit_in_order(student, answers):
    """Generates as `sbs evaluate` does: one batch, every row padded to the full length."""
    asked = questions(30)
    vocabulary = registry.vocabulary("byte")
    rows = np.zeros((30, LIMIT), np.int32)
    for row, question in zip(rows, asked, strict=True):
        ids = tokens.encode([f"predict: {question.input}"], vocabulary)[0]
        row[: len(ids)] = ids
    generator = evaluate.Generator(
        student.structure,
        eos_id=student.config.eos_id,
        partitioner=student.partitioner,
        batch_size=32,
        length=student.manifest["run"]["max_decode_length"],
    )
    want = [
        Answer(id=question.id, prediction=vocabulary.decode(ids).strip(), score=score)
        for question, (ids, score) in zip(asked, generator.run(student.parameters, rows), strict=True)
    ]
    close(answers, want)
    assert len({a.prediction for a in answers}) > 5


def test_each_length_is_compiled_once(greedy, answers):
    generator = greedy._answerers[None]._generators[0]
    compiled_before = generator._generate._cache_size()
    assert compiled_before <= len(evaluate.buckets(LIMIT))
    close(greedy.answer(questions(30)[::-1]), answers[::-1])
    greedy.answer(questions(50, seed=1))
    for each in itertools.chain(*greedy.programs()):
        each()
    assert generator._generate._cache_size() == len(evaluate.buckets(LIMIT))


def test_answers_are_the_same_whichever_programs_are_compiled(student, answers):
    """With fixed shapes, a few programs answer every question, and no answer compiles another."""
    server = Predictor(
        {None: student}, settings=Settings(batch_size=16, smaller=(8,), rationale=True), fixed_shapes=True
    )
    asked = questions(30)
    first, others = server.programs()
    generators: Any = server._answerers[None]._generators
    assert generators[0].sizes == [8, 16]
    assert (len(first), len(others)) == (2, 2 * (2 * len(evaluate.buckets(LIMIT)) - 1))
    for each in first:
        each()
    rationales = []
    for more in ([], others[:3], others[-1:]):
        for each in more:
            each()
        before = [generator._generate._cache_size() for generator in generators]
        found = server.answer(asked)
        assert [generator._generate._cache_size() for generator in generators] == before
        close(found, answers)
        rationales.append([answer.rationale for answer in found])
    assert rationales[0] == rationales[1] == rationales[2]
    assert sum(generator._generate._cache_size() for generator in generators) == 2 + 3 + 1


def test_the_labels_and_any_choices_are_answered_by_the_first_programs(student):
    settings = Settings(decoding="choices", batch_size=8)
    server = Predictor({None: student}, settings=settings, fixed_shapes=True)
    asked = [*questions(5), Question(id="own", input="abc", choices=("a", "b c", "defgh", *map(str, range(9))))]
    want = predictor(student, decoding="choices").answer(asked)
    first, others = server.programs()
    assert len(first) < len(others)
    for each in first:
        each()
    generator: Any = server._answerers[None]._generators[0]
    before = generator._generate._cache_size()
    close(server.answer(asked), want)
    assert generator._generate._cache_size() == before == len(first)


def test_the_cheapest_program_has_the_fewest_batches_then_the_least_padding():
    form = shapes.Form(0, 0, 8, (16, 32, 48))
    known = shapes.programs(0, form, sizes=[1, 8, 64])
    assert [(each.length, each.rows) for each in known] == [(48, 1), (48, 8), (32, 1), (32, 8), (16, 1), (16, 8)]
    for rows, length, ready, want in (
        (1, 10, known, (16, 1)),
        (3, 17, known, (32, 8)),
        (20, 33, known, (48, 8)),
        (3, 10, known[:3], (48, 8)),
        (1, 10, known[:3], (32, 1)),
        (5, 10, known[:1], (48, 1)),
    ):
        found = shapes.cheapest(ready, rows=rows, length=length)
        assert (found.length, found.rows) == want


def test_a_program_that_takes_long_to_compile_is_counted(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "sbs_jax")
    monkeypatch.setattr(compiling, "when", lambda: "when")
    monkeypatch.setattr(compiling, "PATIENCE", 0.02)
    progress = compiling.Progress(count=2)
    with progress.compiling("quick"):
        pass
    for name in ("slow", "slow", "one too many"):
        with progress.compiling(name):
            time.sleep(0.2)
    with compiling.Progress(count=3, at_most=True).compiling("slow"):
        time.sleep(0.2)
    assert [message.partition(" in ")[0] for message in caplog.messages] == [
        "compiling 2 of 2 programs: slow (when)",
        "compiled 2 of 2 programs",
        "compiling program 3: one too many (when)",
        "compiled program 3",
        "compiling 1 of at most 3 programs: slow (when)",
        "compiled 1 of at most 3 programs",
    ]


def test_a_cache_is_said_where_there_is_one(tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    with compiled.kept(str(tmp_path)):
        assert compiling.when() == "first run, cached afterwards"
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert compiling.when() == "at every start, without a cache"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_lengths_are_a_handful_and_reach_the_limit():
    for limit in (2, 16, 20, 112, 1024):
        lengths = evaluate.buckets(limit)
        assert lengths[-1] == limit
        assert list(lengths) == sorted(set(lengths))
        assert len(lengths) <= 13
        assert all(later / earlier < 1.8 for earlier, later in itertools.pairwise(lengths))


def test_what_cannot_be_asked_is_said_and_the_rest_is_answered(greedy, answers):
    bad = {
        "long": (
            Question(id="long", input="x" * 99),
            "the input has 109 tokens .*at most 48",
        ),
        "adapter": (Question(id="adapter", input="x", adapter="a"), "no adapter is named 'a'. None are loaded"),
        "half": (Question(id="half", input="\ud800"), "unpaired surrogate"),
    }
    asked = questions(3)
    got = greedy.answer([bad["long"][0], asked[0], bad["adapter"][0], asked[1], asked[2], bad["half"][0]])
    close([got[1], got[3], got[4]], answers[:3])
    for answer in (got[0], got[2], got[5]):
        question, message = bad[answer.id]
        assert (answer.prediction, answer.score) == (None, None)
        assert re.search(message, answer.error or "")
        assert greedy.check(question) == answer.error
    assert greedy.check(asked[0]) is None
    assert greedy.answer([]) == []


def test_too_long_can_be_cut(student, greedy):
    cutting = predictor(student, too_long="cut")
    long, whole = Question(id="1", input="ab" * 40), Question(id="1", input="ab" * 19)
    assert len("predict: ") + 38 + 1 == LIMIT
    close(cutting.answer([long]), greedy.answer([whole]))


# ------------------------------------------------------------------------------------ sampling


def test_a_sampled_row_depends_on_its_id_and_the_seed_alone(student):
    settings = {"decoding": "sample", "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    sampling = predictor(student, **settings)
    asked = questions(20)
    want = sampling.answer(asked)
    close(sampling.answer(asked[::-1])[::-1], want)
    close(sampling.answer(asked[3:5]), want[3:5])
    longer = [Question(id="long", input="c" * 38), *asked[:3]]  # padded further now
    close(sampling.answer(longer)[1:], want[:3])
    renamed = sampling.answer([dataclasses.replace(question, id=f"{question.id}x") for question in asked])
    assert sum(a.prediction != b.prediction for a, b in zip(renamed, want, strict=True)) > 10
    reseeded = predictor(student, **settings, seed=1).answer(asked)
    assert sum(a.prediction != b.prediction for a, b in zip(reseeded, want, strict=True)) > 10


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6)]
)
def test_tokens_are_drawn_by_their_probability(temperature, top_k, top_p):
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
    kept = np.asarray(decoding._filter(jnp.asarray(logits[None] / temperature), top_k=top_k, top_p=top_p))[0]
    # The rules of Hugging Face's warpers, written again with numbers.
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    if top_k:
        p[np.argsort(-p)[top_k:]] = 0.0
    if top_p < 1.0:
        count = int(np.searchsorted(np.cumsum(np.sort(p)[::-1]), top_p)) + 1
        p[np.argsort(-p)[count:]] = 0.0
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(jnp.asarray(kept))), p / p.sum(), rtol=1e-5)


def test_the_first_token_is_drawn_as_often_as_it_is_likely(student):
    """2,000 draws against the student's own distribution, by a chi-squared statistic."""
    source = jnp.asarray([[40, 50, 60, 1]], jnp.int32)
    draws, per_call = 2000, 500
    model = families.join(student.structure, student.parameters)
    logits = np.asarray(model(source, jnp.zeros((1, 1), jnp.int32)))[0, 0]
    want = np.exp(logits / 3.0) / np.exp(logits / 3.0).sum()

    @jax.jit
    def draw(parameters, keys):
        rows = jnp.broadcast_to(source, (per_call, 4))
        found, _ = decoding.sample(
            families.join(student.structure, parameters), rows, keys, length=1, temperature=3.0, top_k=0, top_p=1.0
        )
        return found[:, 0]

    keys = [answerer._key(f"row {number}", seed=0, kind="label") for number in range(draws)]
    tokens_drawn = np.concatenate(
        [draw(student.parameters, jnp.asarray(keys[at : at + per_call])) for at in range(0, draws, per_call)]
    )
    expected = want * draws
    often = expected >= 5
    observed = np.bincount(tokens_drawn, minlength=len(want))
    statistic = np.sum((observed[often] - expected[often]) ** 2 / expected[often])
    assert often.sum() > 20
    # Mean is the number of categories, variance twice that: four standard deviations.
    assert statistic < often.sum() + 4 * np.sqrt(2 * often.sum())


# ------------------------------------------------------------------------------------ choices


def test_choices_are_scored_as_given_targets_are(student):
    choosing = predictor(student, decoding="choices", rationale=True)
    rows = [
        dataclasses.replace(question, choices=choices)
        for question, choices in zip(
            questions(4), [None, ("a", "bcd", "e f"), ("x", "y"), ("a", "b", "c", "d", "e")], strict=True
        )
    ]
    got = choosing.answer(rows)
    vocabulary = registry.vocabulary("byte")
    score = jax.jit(lambda parameters, *rows: decoding.score(families.join(student.structure, parameters), *rows))
    for question, answer in zip(rows, got, strict=True):
        labels = question.choices or tuple(toy.LETTERS)
        sources = tokens.encode([f"predict: {question.input}"] * len(labels), vocabulary)
        targets = tokens.encode(labels, vocabulary)
        padded = [np.zeros((8, length), np.int32) for length in (LIMIT, 4)]  # one shape for all
        for array, ids in zip(padded, (sources, targets), strict=True):
            for row, each in zip(array, ids, strict=False):
                row[: len(each)] = each
        log_p = np.asarray(score(student.parameters, *padded), np.float64)[: len(labels)]
        p = np.exp(log_p) / np.exp(log_p).sum()
        assert answer.scores is not None
        assert list(answer.scores) == list(labels)
        np.testing.assert_allclose(list(answer.scores.values()), p, rtol=1e-3)
        assert sum(answer.scores.values()) == pytest.approx(1.0)
        assert answer.prediction == labels[int(log_p.argmax())]
        assert answer.score == pytest.approx(log_p.max(), rel=1e-4)
    close(
        [dataclasses.replace(a, prediction=a.rationale, score=0.0) for a in got],
        [dataclasses.replace(a, score=0.0) for a in predictor(student, objective="rationale").answer(rows)],
    )


def test_bad_choices_are_errors_of_their_rows(student, monkeypatch):
    choosing = predictor(student, decoding="choices")
    ask = lambda *choices: choosing.check(Question(id="1", input="a", choices=choices))  # noqa: E731
    assert "got 1 choices; expected 2 to 64" in (ask("a") or "")
    assert "got 65 choices" in (ask(*map(str, range(65))) or "")
    assert "name 'a' more than once" in (ask("a", "b", "a") or "")
    assert "a choice has 11 tokens" in (ask("a", "b" * 10) or "")
    assert ask("a", "b") is None
    monkeypatch.setattr(choosing._answerers[None], "_dataset", dataclasses.replace(toy.DATASET, labels=None))
    assert "toy has no label set that all rows share" in (choosing.check(Question(id="1", input="a")) or "")
    pieces = registry.vocabulary(builtin.vocabulary_path())
    monkeypatch.setattr(choosing._answerers[None], "_vocabulary", pieces)
    assert "the choices '\u662f' and '\u5426' are the same tokens" in (ask("no", "\u662f", "\u5426") or "")


def test_one_that_writes_a_rationale_first_gives_both_and_scores_no_choices(tmp_path):
    run = toy.write_untrained(tmp_path, task="toy_rationale_then_label")
    one = Predictor.load(run, settings=Settings(batch_size=8, rationale=True))
    assert len(one._answerers[None]._objectives) == 1
    answer = one.answer(questions(1))[0]
    assert answer.prediction == ""  # it says no "Answer:"
    assert answer.rationale
    with pytest.raises(ValueError, match=r"a rationale before its label.*--decoding greedy"):
        Predictor.load(run, settings=Settings(decoding="choices"))


# ------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(("form", "bytes_each"), [("bfloat16", 2), ("int8", 1)])
def test_matrices_are_held_in_fewer_bits_and_answers_stay(student, answers, form, bytes_each):
    few = predictor(student, weights=form)
    got = few.answer(questions(30))
    same = [a.prediction == b.prediction for a, b in zip(got, answers, strict=True)]
    assert sum(same) >= 27
    differences = [
        abs((a.score or 0) - (b.score or 0)) for a, b, is_same in zip(got, answers, same, strict=True) if is_same
    ]
    assert 0 < np.median(differences) < 0.1
    held = few._answerers[None]._parameters
    dense = {name: x for name, x in held.items() if "kernel" in name and "logits" not in name}
    size = sum(x.nbytes for name, x in dense.items() if not name.endswith("scale"))
    assert size == bytes_each * sum(
        x.size for name, x in student.parameters.items() if "kernel" in name and "logits" not in name
    )
    norms = [name for name in held if name.endswith("norm/scale")]
    assert norms
    assert all(held[name].dtype == jnp.float32 for name in (*norms, "token_embedder/embedding"))


def test_a_quantised_product_is_that_of_the_quantised_matrix(student):
    """For inputs that bfloat16 represents exactly, the product equals that of the unpacked int8 matrix."""
    structure, parameters = precision.held(student.structure, student.parameters, weights="int8")
    dense = getattr(families.join(structure, parameters).stacks["encoder"].layers[0].mlp, "wi_0")  # noqa: B009  (set by name)
    x = jnp.asarray(np.random.default_rng(0).integers(-8, 9, size=(3, 5, toy.MODEL.emb_dim)), jnp.float32)
    np.testing.assert_allclose(dense(x), x @ dense.kernel.matrix(), rtol=1e-5, atol=1e-5)
    original = student.parameters["encoder/layers/0/mlp/wi_0/kernel"]
    assert 0 < float(jnp.abs(dense.kernel.matrix() - original).max()) <= float(jnp.abs(original).max()) / 127


# ------------------------------------------------------------------------------------ compiled programs


def test_a_second_start_compiles_nothing(student, tmp_path):
    events: list[str] = []
    # JAX has no way to take a listener away again; this one says nothing once the test is over.
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

    def start() -> tuple[int, int, list[Answer]]:
        jax.clear_caches()
        events.clear()
        with compiled.kept(str(tmp_path)):
            found = predictor(student).answer(questions(9))
        return (
            events.count("/jax/compilation_cache/cache_hits"),
            events.count("/jax/compilation_cache/cache_misses"),
            found,
        )

    before = jax.config.values["jax_compilation_cache_dir"]
    hits, misses, want = start()
    assert misses > 0
    (kind,) = tmp_path.iterdir()
    entries = {path.name: path.read_bytes() for path in kind.iterdir()}
    assert entries
    assert all(name.endswith("-cache") for name in entries)
    hits, misses, got = start()
    assert misses == 0
    assert hits > 0
    assert got == want
    assert {path.name: path.read_bytes() for path in kind.iterdir()} == entries
    assert jax.config.values["jax_compilation_cache_dir"] == before


def test_programs_are_kept_whole_and_those_of_others_stay(tmp_path):
    own, place = tmp_path / "own", tmp_path / "place"
    own.mkdir()
    place.mkdir()
    (place / "a-cache").write_bytes(b"a")
    compiled._take(place, own)
    (own / "b-cache").write_bytes(b"b")
    (own / "c-cache").write_bytes(b"c")
    (place / "c-cache").write_bytes(b"of another process")
    compiled.add(own, place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        "a-cache": b"a",
        "b-cache": b"b",
        "c-cache": b"of another process",
    }


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoding": "gredy"}, "Settings.decoding is 'gredy'.* Did you mean 'greedy'"),
        ({"weights": "int4"}, "Settings.weights is 'int4'"),
        ({"top_p": 0.0}, "Settings.top_p is 0.0"),
        ({"top_p": 1.5}, "Settings.top_p is 1.5"),
        ({"temperature": 0.0}, "Settings.temperature is 0.0"),
        ({"top_k": -1}, "Settings.top_k is -1"),
        ({"batch_size": 0}, "Settings.batch_size is 0"),
        ({"beams": True}, "Settings.beams is True"),
        ({"length_penalty": float("nan")}, "Settings.length_penalty is nan"),
        ({"objective": "rationale", "decoding": "choices"}, "objective is 'rationale', which allows neither"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)
