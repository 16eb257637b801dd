"""The built-in dataset, its scripted teacher, the pre-training text and the embedded student's files."""

import collections
import itertools
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
import sentencepiece

from sbs_jax.cli import demo
from sbs_jax.data import records, release, tokens
from sbs_jax.data.dataset import Row
from sbs_jax.student import families
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import prepare
from sbs_jax.weights import opening
from tasks import builtin, builtin_corpus

ROWS = {"train": 400, "validation": 50, "test": 400}
PLAIN = Row(input="x", label="no")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with release/ and records/ of a small built-in dataset."""
    folder = tmp_path_factory.mktemp("builtin")
    builtin.write_release(folder / "release", rows=ROWS, seed=7)
    release.import_release(
        builtin.DATASET, release_dir=folder / "release", records_dir=folder / "records", parser="strict"
    )
    return folder


def rows_of(folder: Path, split: str) -> list[records.Record]:
    return records.read_records(folder / "records" / builtin.NAME / f"{split}.jsonl")


def test_every_question_has_both_answers_and_only_known_values() -> None:
    for question in builtin.QUESTIONS:
        values = builtin.PROPERTIES[question.about]
        assert set(question.values) < set(values), question.text
        assert question.values, question.text
    facts = [q.fact(value) for q in builtin.QUESTIONS for value in builtin.PROPERTIES[q.about]]
    assert len(set(facts)) == len(facts)
    values = list(itertools.chain(*builtin.PROPERTIES.values()))
    assert len(set(values)) == len(values)  # so a value tells the property


def test_the_label_follows_from_the_description() -> None:
    float_ = next(q for q in builtin.QUESTIONS if q.text == "Will it float?")
    thing = dict.fromkeys(builtin.PROPERTIES, "") | {"material": "iron"}
    order = ("place", "month", "finder")
    assert builtin.Problem(thing=thing, order=order, question=float_).label == "no"
    assert builtin.Problem(thing=thing | {"material": "wax"}, order=order, question=float_).label == "yes"
    assert (float_.fact("iron"), float_.claim("iron", "yes")) == ("Iron sinks.", "Iron floats.")


def test_a_seed_fixes_every_byte(imported: Path, tmp_path: Path) -> None:
    builtin.write_release(tmp_path, rows=ROWS, seed=7)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / file).read_bytes() == (imported / "release" / file).read_bytes()
    builtin.write_release(tmp_path, rows=ROWS, seed=8)
    assert any((tmp_path / file).read_bytes() != (imported / "release" / file).read_bytes() for file in files)


def test_no_input_occurs_twice_in_or_across_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_ = random.Random(0)
    few = [builtin.random_problem(random_) for _ in range(60)]
    monkeypatch.setattr(builtin, "random_problem", lambda random_: random_.choice(few))  # repeats often
    builtin.write_release(tmp_path, rows={"train": 30, "test": 20}, seed=0)
    rows = builtin.read_release(tmp_path)
    inputs = [row.input for split in rows.values() for row in split]
    assert len(set(inputs)) == len(inputs) == 50


def test_labels_and_questions_are_balanced() -> None:
    random_ = random.Random(0)
    problems = [builtin.random_problem(random_) for _ in range(6000)]
    labels = collections.Counter(problem.label for problem in problems)
    assert abs(labels["yes"] / 6000 - 0.5) < 0.03
    questions = collections.Counter(problem.question.text for problem in problems)
    assert set(questions) == {question.text for question in builtin.ASKED}
    assert min(questions.values()) > 0.7 * 6000 / len(builtin.ASKED)


def test_the_teacher_errs_as_often_as_it_says() -> None:
    random_ = random.Random(0)
    outcomes, wrong, runs_on = collections.Counter(), 0, 0
    for _ in range(6000):
        problem = builtin.random_problem(random_)
        reply = builtin.teacher_reply(problem, random_)
        parsed = builtin.strict(reply, PLAIN)
        outcomes[parsed.outcome] += 1
        runs_on += "\n\nQ:" in reply
        if parsed.outcome == "ok":
            right = parsed.label == problem.label
            wrong += not right
            assert (parsed.rationale == problem.question.fact(problem.value)) == right
    assert abs(wrong / 6000 - builtin.WRONG) < 0.02
    assert abs(1 - outcomes["ok"] / 6000 - builtin.UNUSABLE) < 0.01
    assert set(outcomes) == {"ok", "no_answer", "no_label", "label_not_in_set"}
    assert abs(runs_on / 6000 - builtin.RUNS_ON) < 0.03


@pytest.mark.parametrize(
    ("reply", "strict", "official"),
    [
        ("Iron sinks. So the answer is no.\n\nQ: A", ("Iron sinks.", "no", "ok"), ("Iron sinks.", "no", "ok")),
        ("Iron sinks. So the answer is No", ("Iron sinks.", "no", "ok"), ("Iron sinks.", "No", "ok")),
        ("Iron sinks.", (None, None, "no_answer"), (None, None, "no_answer")),
        ("Iron sinks. So the answer is", (None, None, "no_label"), ("Iron sinks.", None, "no_label")),
        (
            "Iron sinks. So the answer is iron.",
            (None, None, "label_not_in_set"),
            ("Iron sinks.", "iron", "ok"),
        ),
        ("So the answer is no.", (None, "no", "no_rationale"), (None, "no", "no_rationale")),
    ],
)
def test_parsers(reply: str, strict: tuple, official: tuple) -> None:
    for parse, expected in ((builtin.strict, strict), (builtin.official, official)):
        parsed = parse(reply, PLAIN)
        assert (parsed.rationale, parsed.label, parsed.outcome) == expected


def test_the_manifest_tells_the_teachers_accuracy(imported: Path) -> None:
    manifest = records.read_manifest(imported / "records" / builtin.NAME)
    rows = rows_of(imported, "test")
    right = sum(row.teacher_label == row.label for row in rows)
    assert manifest["splits"]["test"]["teacher_accuracy"] == pytest.approx(100 * right / len(rows))
    assert 70 < 100 * right / len(rows) < 90


def test_pretraining_text_has_no_question_and_only_true_facts() -> None:
    random_ = random.Random(0)
    facts = {q.fact(value) for q in builtin.QUESTIONS for value in builtin.PROPERTIES[q.about]}
    for _ in range(500):
        passage = builtin_corpus.passage(random_)
        assert all(sentence in facts or ", found " in sentence for sentence in passage), passage
        assert not any(word in " ".join(passage).split() for word in ("?", "yes", "no.", "predict:", "explain:"))


def test_masked_rows_fill_up_to_the_passage() -> None:
    """Every sentinel of the inputs, replaced by its words of the targets, gives the passage back."""
    random_ = random.Random(3)
    kinds = collections.Counter()
    for _ in range(500):
        passage = builtin_corpus.passage(random_)
        inputs, targets = builtin_corpus.masked(passage, random_)
        pieces = targets.split("<extra_id_")[1:]
        kinds[len(pieces)] += 1
        for number, piece in enumerate(pieces):
            name, _, words = piece.partition(">")
            assert int(name) == number
            assert words.strip()
            assert inputs.count(f"<extra_id_{number}>") == 1
            inputs = inputs.replace(f"<extra_id_{number}>", words)
        assert re.sub(r" +([.,])", r"\1", " ".join(inputs.split())) == " ".join(passage)
    assert kinds.keys() >= {1, 2, 3}


def test_the_corpus_is_fixed_by_its_seed() -> None:
    def first(seed: int) -> list[tuple[str, str]]:
        return list(itertools.islice(builtin_corpus.rows(seed=seed), 20))

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_shipped_vocabulary_is_that_of_the_script() -> None:
    """Ids of another vocabulary would make the shipped student read other words."""
    made = sentencepiece.SentencePieceProcessor()
    made.LoadFromSerializedProto(builtin_corpus.vocabulary(seed=20261121))
    shipped = sentencepiece.SentencePieceProcessor()
    shipped.Load(builtin.vocabulary_path())
    assert [made.IdToPiece(i) for i in range(len(made))] == [shipped.IdToPiece(i) for i in range(len(shipped))]


def test_shipped_vocabulary_has_a_piece_per_word() -> None:
    tokens.check_vocabulary(builtin.vocabulary_path())
    vocabulary = tokens.vocabulary(builtin.vocabulary_path())
    random_ = random.Random(1)
    texts = [f"predict: {builtin.random_problem(random_).text}" for _ in range(300)]
    for ids, text in zip(tokens.encode(texts, vocabulary), texts, strict=True):
        assert vocabulary.decode(ids[:-1]) == text.lower()
        assert len(ids) == len(re.findall(r"\w+|[^\w\s]", text)) + 1  # and EOS
    assert 2 not in tokens.encode(["Answer: zebra-42 (x/y)?"], vocabulary)[0]  # <unk>


def test_feature_lengths_hold_every_row(imported: Path) -> None:
    vocabulary = tokens.vocabulary(builtin.vocabulary_path())

    def longest(texts: Iterable[str]) -> int:
        return max(len(ids) for ids in tokens.encode(list(texts), vocabulary))

    rows = [row for split in ROWS for row in rows_of(imported, split)]
    limits = builtin.DATASET.feature_lengths
    assert longest(f"predict: {row.input}" for row in rows) <= limits["inputs"]
    assert longest(f"{row.rationale} Answer: {row.label}" for row in rows) <= limits["targets"]
    config = demo_config("step_by_step")
    assert longest(f"explain: {row.input}" for row in rows) <= config.task_feature_lengths["inputs"]
    assert longest(row.rationale for row in rows if row.rationale) <= config.task_feature_lengths["targets"]
    corpus = list(itertools.islice(builtin_corpus.rows(seed=3), 2000))
    for part, feature in enumerate(("inputs", "targets")):
        assert longest(row[part] for row in corpus) <= builtin_corpus.DATASET.feature_lengths[feature]


def test_shipped_student_fits_its_gin_file_and_is_small() -> None:
    path = Path(builtin.student_path())
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 4e6
    config = demo_config("step_by_step")
    assert config.model.vocab_size >= tokens.vocabulary(config.data.vocabulary).vocab_size
    shapes = prepare(config).abstract.parameters
    parameters = opening.load_parameters(str(path), like=shapes)
    assert set(parameters) == set(families.abstract(config.model)[1])


def test_shipped_student_knows_the_text_of_the_shipped_vocabulary() -> None:
    """Mean cross-entropy of masked words; 0.7 after the recorded training, 6 for a student of another vocabulary."""
    config = demo_config("step_by_step")
    structure, shapes, _ = families.abstract(config.model)
    with np.load(builtin.student_path()) as arrays:
        parameters = {name: jnp.asarray(arrays[name]) for name in shapes}
    vocabulary = tokens.vocabulary(builtin.vocabulary_path())
    corpus = list(itertools.islice(builtin_corpus.rows(seed=3), 64))
    source_BS, target_BT = (padded(tokens.encode([row[part] for row in corpus], vocabulary)) for part in (0, 1))

    @jax.jit
    def loss_of(parameters):
        logits_BTV = families.join(structure, parameters)(source_BS, jnp.pad(target_BT, ((0, 0), (1, 0)))[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, target_BT)

    loss_BT = loss_of(parameters)
    assert float(loss_BT[target_BT > 0].mean()) < 1.0


def padded(rows: list[list[int]]) -> jnp.ndarray:
    return jnp.array([row + [0] * (32 - len(row)) for row in rows], jnp.int32)


def demo_config(method: str) -> TrainConfig:
    cells = demo.plan(Path("demo")).cells()
    return next(c for c in cells if (c.method, c.fraction, c.seed) == (method, 0.5, 1)).configured()[0]


def test_both_methods_make_the_same_updates_from_the_same_label_rows() -> None:
    standard, step_by_step = demo_config("standard_finetuning"), demo_config("step_by_step")
    assert standard.train_steps == step_by_step.train_steps
    assert 2 * standard.batch_size == step_by_step.batch_size  # as many rationales beside the labels
    for name in ("fraction", "seed", "label_source", "records_dir"):
        assert getattr(standard.data, name) == getattr(step_by_step.data, name)
    assert standard.initial_checkpoint_path == step_by_step.initial_checkpoint_path == builtin.student_path()


@pytest.mark.slow
def test_demo_from_questions_to_page(tmp_path: Path, starter: processes.Starter) -> None:
    """The whole demo on few rows, a few updates; and again, when nothing is left to train."""
    bindings = {"TRAIN_STEPS": 3, "EVAL_PERIOD": 3, "CHECKPOINT_PERIOD": 3, "EVAL_BATCH_SIZE": 16}
    rows = {"train": 64, "validation": 20, "test": 30}
    text = f"from sbs_jax.cli import demo, main\ndemo.ROWS, demo.BINDINGS = {rows}, {bindings}\n"
    text += "demo.FRACTIONS, demo.SEEDS = (1.0,), (0,)\n"
    text += f"raise SystemExit(demo.main({str(tmp_path / 'out')!r}, entry=main.main))"
    done = starter.run(tmp_path, [], command=("-c", text))
    assert done.returncode == 0, done.stderr
    assert "[ 2/2] step" in done.stdout or "[ 2/2] standard" in done.stdout
    assert "Finished in" in done.stdout
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>")
    (measured,) = (tmp_path / "out").glob("runs/*/rationales.json")
    assert "step_by_step" in str(measured)
    assert page.count('<p class="said question"') == 3
    assert "sbs init questions.csv" in page
    lines = (tmp_path / "out" / "release" / "builtin" / "builtin_test.json").read_text("utf-8").splitlines()
    assert [json.loads(line)["label"] for line in lines].count("yes") > 5
    again = starter.run(tmp_path, [], command=("-c", text))
    assert again.returncode == 0, again.stderr
    assert "2 cells: 2 finished." in again.stdout
