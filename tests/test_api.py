"""The Python interface: `sbs_jax.distill` and `sbs_jax.Student`, over the same run directory as the commands."""

import pytest
from builders.garden import EXPLAINED, ROWS, TOPICS

import sbs_jax
from sbs_jax import api
from sbs_jax.data import catalogue, records, registry
from sbs_jax.prediction import compiled
from sbs_jax.training import gin_files

QUESTIONS = ["My fern: thirsty, what now?", "My rose: slugs, what now?"]
SMALL = {
    "TRAIN_STEPS": 3,
    "WARMUP_STEPS": 1,
    "EXAMPLES": 4,
    "EVAL_BATCH_SIZE": 8,
    "TASK_FEATURE_LENGTHS": {"inputs": 72, "targets": 32},
    "t5.T5Config.num_encoder_layers": 1,
    "t5.T5Config.num_decoder_layers": 1,
    "t5.T5Config.emb_dim": 16,
}


class ReachedError(Exception):
    """Training would begin."""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    before = registry.options()
    run = tmp_path_factory.mktemp("runs") / "garden"
    yield sbs_jax.distill(EXPLAINED, output=run, label_column="team", macros=SMALL, quiet=True)
    catalogue._DATASETS.pop("garden")
    registry.configure(before)


def test_rows_become_a_student_that_answers(student):
    assert set(student.metrics) == {"train", "validation", "test"}
    assert student.metrics["train"]["step"] == 3
    assert all(isinstance(answer, str) for answer in student.predict(QUESTIONS))
    closed = sbs_jax.Settings(decoding="choices")
    assert set(student.predict(QUESTIONS, settings=closed)) <= set(TOPICS)
    explained = student.explain(QUESTIONS, settings=closed)
    assert [answer.prediction for answer in explained] == student.predict(QUESTIONS, settings=closed)
    assert all(answer.rationale is not None and answer.scores.keys() == set(TOPICS) for answer in explained)


def test_the_run_loads_alone_and_resumes(student):
    assert sbs_jax.Student.load(student.run).predict(QUESTIONS) == student.predict(QUESTIONS)
    before = (student.run / "metrics.jsonl").read_bytes()
    again = sbs_jax.distill(iter(EXPLAINED), output=student.run, label_column="team", macros=SMALL, quiet=True)
    assert (student.run / "metrics.jsonl").read_bytes() == before
    assert again.predict(QUESTIONS) == student.predict(QUESTIONS)
    # The folder of its rows is one of `sbs init`.
    folder = student.run / "dataset"
    again = sbs_jax.distill(str(folder), output=student.run, macros=SMALL)
    assert (student.run / "metrics.jsonl").read_bytes() == before
    found = records.read_records(folder / "records" / "garden" / "train.jsonl")
    assert {record.rationale for record in found} == {f"It is about {topic}." for topic in TOPICS}


def test_the_cache_is_opened_for_programs_alone(student, tmp_path, monkeypatch):
    """It changes settings of JAX and links every cached file, so an answer by a compiled program leaves it closed."""
    monkeypatch.setenv("SBS_COMPILED", str(tmp_path / "compiled"))
    opened, kept = [], compiled.kept
    monkeypatch.setattr(compiled, "kept", lambda folder: opened.append(folder) or kept(folder))
    settings = sbs_jax.Settings(batch_size=3)
    first = student.answer(QUESTIONS, settings=settings)
    assert opened == [str(tmp_path / "compiled")]
    assert len(list((tmp_path / "compiled").rglob("*-cache"))) >= 1
    assert student.answer(QUESTIONS[:1], settings=settings) == first[:1]
    assert len(opened) == 1


def test_an_input_that_cannot_be_answered_is_named(student):
    long = "My rose: " + "dry " * 100
    with pytest.raises(ValueError, match=r"inputs\[1\]: .*72"):
        student.predict([QUESTIONS[0], long])
    first, second = student.answer([QUESTIONS[0], long])
    assert first.prediction is not None
    assert "72" in (second.error or "")
    with pytest.raises(ValueError, match="expected a list of texts"):
        student.predict(QUESTIONS[0])


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([*EXPLAINED[:-1], EXPLAINED[-1] | {"text": "Other?"}], {}, FileExistsError, "dataset is of other rows"),
        (EXPLAINED, {"macros": SMALL | {"TRAIN_STEPS": 4}}, FileExistsError, "TRAIN_STEPS"),
        (EXPLAINED, {"macros": {"TRIAN_STEPS": 4}}, gin_files.UsageError, "TRAIN_STEPS"),
        (EXPLAINED, {"method": "step_by_stepp"}, gin_files.UsageError, "step_by_stepp"),
        (EXPLAINED, {"label_column": "tema"}, ValueError, "no column 'tema'.*'team'"),
        (iter(["My rose is dry."]), {}, ValueError, r"train\[0\] is 'My rose is dry.'; expected a mapping of columns"),
        ("nowhere.csv", {}, FileNotFoundError, "nowhere.csv"),
    ],
)
def test_what_does_not_fit_is_named(rows, options, error, message, student):
    given = {"output": student.run, "label_column": "team", "macros": SMALL, "quiet": True} | options
    with pytest.raises(error, match=message):
        sbs_jax.distill(rows, **given)


def test_rows_without_rationales_need_a_teacher_or_another_method(tmp_path, monkeypatch):
    asked = {"output": tmp_path / "bare", "label_column": "team", "quiet": True}
    with pytest.raises(ValueError, match=r"no rationales, which method .*sbs teach --dataset"):
        sbs_jax.distill(ROWS, **asked)

    def reached(config, config_text):
        raise ReachedError(config.mixture_or_task_name)

    monkeypatch.setattr(api.loop, "train", reached)
    with pytest.raises(ReachedError, match="bare_label"):
        sbs_jax.distill(ROWS, **asked, method="standard_finetuning")
    assert len(records.read_records(tmp_path / "bare" / "dataset" / "inputs" / "bare" / "train.jsonl")) == 33
    catalogue._DATASETS.pop("bare")


def test_a_name_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="it has distill, Student and Settings"):
        _ = sbs_jax.Distill
