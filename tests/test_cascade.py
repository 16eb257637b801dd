"""A student of the cascade answers in two steps, x to rationale and both to label, wherever it is asked."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from sbs_jax.cli import main
from sbs_jax.data import batches, records, registry, selection
from sbs_jax.prediction.engine import Answer, Predictor, Question, Settings
from sbs_jax.run import directory
from sbs_jax.stats import rationales
from sbs_jax.student import partitioning
from sbs_jax.training import evaluate, loop, students
from tasks import builtin

TASK = "toy_label_given_rationale"
ROW = records.Record(id="", input="", label="a", rationale="last is a.", teacher_label="a", outcome=records.OK)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random parameters, whose rationales and answers differ from row to row, and its records."""
    folder = tmp_path_factory.mktemp("cascade")
    toy.write_records(folder / "records", train_rows=8)
    return toy.write_untrained(folder, task="toy_cascade")


@pytest.fixture(scope="module")
def student(run: Path) -> students.Student:
    return students.load_student(run, layout=partitioning.DATA_PARALLEL)


def changed(
    student: students.Student, *, task: str = "toy_cascade", lengths: Mapping[str, int] | None = None, **options: Any
) -> students.Student:
    """Returns the same parameters as a student of another task, with other lengths or options of its data."""
    run = student.manifest["run"] | {"mixture_or_task_name": task}
    manifest = {**student.manifest, "run": run | ({"task_feature_lengths": lengths} if lengths else {})}
    return dataclasses.replace(student, manifest=manifest, options=dataclasses.replace(student.options, **options))


def predictor(student: students.Student, **settings: Any) -> Predictor:
    return Predictor({None: student}, settings=Settings(**{"batch_size": 8, **settings}))


def graded(student: students.Student) -> list[dict[str, Any]]:
    """Grades a student on test; returns the rows."""
    registry.configure(student.options)
    run = student.manifest["run"]
    generators = evaluate.Generators(
        structure=student.structure,
        eos_id=student.config.eos_id,
        partitioner=student.partitioner,
        batch_size=8,
        max_decode_length=run["max_decode_length"],
    )
    lengths = run["task_feature_lengths"]
    grader = evaluate.evaluator(tasks=[TASK], split="test", task_feature_lengths=lengths, generators=generators)
    return grader.run(student.parameters)[TASK].rows


def questions(run: Path) -> list[Question]:
    rows = records.read_records(run.parent / "records" / "toy" / "test.jsonl")
    return [Question(id=row.id, input=row.input) for row in rows]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_hand(student: students.Student, asked: list[Question], **settings: Any) -> list[Answer]:
    """Answers in two predictions of a student that takes x and a rationale for one text."""
    plain = changed(student, task="toy_step_by_step")
    explaining = {**settings, "decoding": settings.get("decoding", "greedy").replace("choices", "greedy")}
    first = predictor(plain, objective="rationale", **explaining).answer(asked)
    second = [
        dataclasses.replace(question, input=f"{question.input} Rationale: {answer.prediction}")
        for question, answer in zip(asked, first, strict=True)
    ]
    answers = predictor(plain, too_long="cut", **settings).answer(second)
    return [dataclasses.replace(answer, rationale=said.prediction) for answer, said in zip(answers, first, strict=True)]


def close(got: list[Answer], want: list[Answer]) -> None:
    assert [dataclasses.replace(a, score=None, scores=None) for a in got] == [
        dataclasses.replace(a, score=None, scores=None) for a in want
    ]
    for mine, other in zip(got, want, strict=True):
        assert mine.score == pytest.approx(other.score, rel=1e-4)
        assert (mine.scores is None) == (other.scores is None)
        assert (mine.scores or {}) == pytest.approx(other.scores or {}, rel=1e-3)


# ------------------------------------------------------------------------------------ batches


def test_both_tasks_of_a_row_follow_one_another(run: Path, student: students.Student):
    registry.configure(student.options)
    options: dict[str, Any] = {"split": "train", "batch_size": 8, "pack": False, "seed": 0, "skip_batches": 0}
    batch = next(batches.train_dataset("toy_cascade", lengths={"inputs": 48, "targets": 16}, **options))
    decode = registry.vocabulary("byte").decode
    texts, targets = (
        [decode(ids.tolist()) for ids in batch[side]] for side in ("encoder_input_tokens", "decoder_target_tokens")
    )
    assert batch["decoder_task_ids"][:, 0].tolist() == [1, 2] * 4
    for number in range(0, 8, 2):
        x, rationale = texts[number + 1].removeprefix("explain: "), targets[number + 1]
        assert texts[number] == f"predict: {x} Rationale: {rationale}"
        assert rationale == f"last is {targets[number]}."


# ------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("decoding", ["greedy", "beam", "sample", "choices"])
def test_an_answer_is_that_of_two_predictions(run: Path, student: students.Student, decoding: str):
    asked = questions(run)[:6]
    settings = {"decoding": decoding, "beams": 2}
    want = by_hand(student, asked, **settings)
    assert len({answer.rationale for answer in want}) > 3
    got = predictor(student, rationale=True, **settings).answer(asked)
    close(got, want)
    silent = [dataclasses.replace(asked[0], rationale=False), *asked[1:]]
    assert [a.rationale for a in predictor(student, rationale=True, **settings).answer(silent)][:2] == [
        None,
        want[1].rationale,
    ]
    close(predictor(student, **settings).answer(asked), [dataclasses.replace(a, rationale=None) for a in want])


def test_an_evaluation_is_a_prediction_and_knows_no_teacher(run: Path, student: students.Student, tmp_path: Path):
    want = predictor(student, rationale=True).answer(questions(run))
    rows = graded(student)
    assert [(row["id"], row["prediction"], row["rationale"]) for row in rows] == [
        (answer.id, answer.prediction, answer.rationale) for answer in want
    ]
    np.testing.assert_allclose([row["score"] for row in rows], [answer.score or 0.0 for answer in want], rtol=1e-4)
    assert {row["input"] for row in rows} == {f"predict: {question.input}" for question in questions(run)}
    toy.write_records(tmp_path, train_rows=8)
    file = tmp_path / "toy" / "test.jsonl"
    poisoned = [dataclasses.replace(row, rationale="poison!") for row in records.read_records(file)]
    records.write_records(file, poisoned)
    assert graded(changed(student, records_dir=str(tmp_path))) == rows


def test_too_long_second_inputs_are_cut_and_counted(run: Path, student: students.Student, caplog):
    limited = changed(student, lengths={"inputs": 30, "targets": 9})
    rows = graded(limited)
    answers = predictor(limited, rationale=True).answer(questions(run))
    assert [row["prediction"] for row in rows] == [answer.prediction for answer in answers]
    joined = [f"predict: {q.input} Rationale: {a.rationale}" for q, a in zip(questions(run), answers, strict=True)]
    cut = sum(len(text.encode()) + 1 > 30 for text in joined)
    assert 0 < cut <= 16
    assert f"{cut} of 16 inputs with the student's rationale are longer than 30 tokens" in caplog.text
    (refused,) = predictor(limited).answer([Question(id="1", input="x" * 30)])
    assert "at most 30" in (refused.error or "")


def test_both_steps_are_in_slots(run: Path, student: students.Student, tmp_path: Path):
    """Numbers come back in what is shown; the second step reads the slots that the student wrote."""
    kernel = np.random.default_rng(1).normal(size=(toy.MODEL.emb_dim, toy.MODEL.vocab_size)).astype(np.float32)
    vocabulary = registry.vocabulary(builtin.vocabulary_path())
    first, second = vocabulary.encode("<extra_id_0> <extra_id_1>")
    kernel[:, first] *= 3.0
    kernel[:, second] = -kernel[:, first]  # one of the two is likely anywhere
    slotted = changed(
        dataclasses.replace(student, parameters={**student.parameters, "logits_dense/kernel": kernel}),
        number_slots=True,
        vocabulary=builtin.vocabulary_path(),
        records_dir=str(tmp_path),
    )
    rows = [dataclasses.replace(ROW, id=str(n), input=f"{n} pens and {n + 7} books") for n in range(6)]
    (tmp_path / "toy").mkdir()
    records.write_records(tmp_path / "toy" / "test.jsonl", rows)
    predicting = predictor(slotted, rationale=True)
    answerer: Any = predicting._answerers[None]
    read: list[str] = []
    step = answerer._with_rationales
    answerer._with_rationales = lambda rows, texts: read.extend(texts) or step(rows, texts)
    answers = predicting.answer([Question(id=row.id, input=row.input) for row in rows])
    assert sum("<extra_id_" in text for text in read) > 1
    assert [answer.rationale for answer in answers] == [
        selection.numbers_of(row.input, slotted.options).fill(text).strip()
        for row, text in zip(rows, read, strict=True)
    ]
    assert any(text.strip() != answer.rationale for text, answer in zip(read, answers, strict=True))
    assert [(row["prediction"], row["rationale"]) for row in graded(slotted)] == [
        (answer.prediction, answer.rationale) for answer in answers
    ]


def test_a_server_compiles_all_that_two_steps_need(run: Path, student: students.Student):
    server = Predictor({None: student}, settings=Settings(batch_size=8), fixed_shapes=True)
    first, _ = server.programs()
    for each in first:
        each()
    generators: Any = server._answerers[None]._generators
    before = [generator._generate._cache_size() for generator in generators]
    assert before == [1, 1]
    want = predictor(student).answer(questions(run))
    assert [a.prediction for a in server.answer(questions(run))] == [a.prediction for a in want]
    assert [generator._generate._cache_size() for generator in generators] == before


# ------------------------------------------------------------------------------------ the whole path


def test_a_run_of_the_cascade_from_records_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture):
    named = toy.write_records(tmp_path / "records")
    lengths = {"inputs": 48, "targets": 16}
    config = toy.config(
        *(tmp_path / "run", named),
        mixture_or_task_name="toy_cascade",
        task_feature_lengths=lengths,
        train_steps=2,
        eval_period=2,
        checkpoint_period=2,
    )
    loop.train(config, config_text="EXAMPLES = 4\n")
    assert {"loss/label", "loss/rationale"} <= directory.read_metrics(config.model_dir)[0].keys()
    rows = lines(tmp_path / "run" / "predictions" / f"{TASK}-test-2.jsonl")
    assert all(isinstance(row["rationale"], str) for row in rows)

    found = rationales.measure(config.model_dir, batch_size=8)
    said = lines(tmp_path / "run" / "rationales.jsonl")
    assert [(row["prediction"], row["rationale"]) for row in said] == [
        (row["prediction"], row["rationale"]) for row in rows
    ]
    assert found["consistency"]["by_label_task"] is None
    assert 0 <= found["consistency"]["by_label_task_other_rationale"] <= 1

    capsys.readouterr()
    assert main.main(["evaluate", config.model_dir, "--batch_size=8", f"--output={tmp_path / 'graded'}"]) == 0
    again = lines(tmp_path / "graded" / f"{TASK}-test-2.jsonl")
    assert [{**row, "score": 0} for row in again] == [{**row, "score": 0} for row in rows]
    assert main.main(["report", config.model_dir, f"--output={tmp_path / 'report.html'}"]) == 0
    assert "cascade" in (tmp_path / "report.html").read_text()
