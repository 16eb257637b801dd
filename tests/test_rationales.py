"""Measured rationales: the label that a text names, overlap with the teacher's, and `sbs rationales` on a run."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import toy
from builders import garden

import tasks
from sbs_jax.cli import main
from sbs_jax.data import catalogue, grading, parsing, records, registry, release
from sbs_jax.stats import rationales
from sbs_jax.training import loop
from tasks import builtin, nli, svamp


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer must be a drink. Of the above choices, only tea is a drink.", "tea"),
        ("People drink Teas.", "tea"),
        ("Tea is hot. Of the above choices, only ice cream is cold.", "ice cream"),  # and "ice" is not named
        ("Only ice is solid.", "ice"),
        ("Both tea and ice are wet.", None),
        ("Tea is wet. Both tea and ice are wet.", None),  # the last sentence that names any decides
        ("Only tea is hot. That settles it.", "tea"),
        ("Nice steam.", None),  # no whole word
        ("", None),
    ],
)
def test_the_choice_that_a_text_names(text: str, expected: str | None) -> None:
    assert parsing.only_label_named(text, parsing.label_patterns(("tea", "ice", "ice cream"))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7.", "3 + 4"),
        ("7 * 36 is 252. 252 / 2 is 126.", "252 / 2"),
        ("That is (84.5 - 2) * 3 = 247.5 in all.", "(84.5 - 2) * 3"),
        ("He has 3 pens and 4 books.", None),
        ("The 19-year-old has 3.", None),
        ("2 + 2 = 4, then 5 / 0.", None),  # has no value
        ("1 + " * 5000 + "1", None),
    ],
)
def test_the_last_calculation_of_a_text(text: str, expected: str | None) -> None:
    assert svamp.implied_label(text, ()) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sleeping contradicts running.", "contradiction"),
        ("So this is a contradiction.", "contradiction"),
        ("A dog entails an animal.", "entailment"),
        ("Being a cook does not entail writing.", "neutral"),
        ("A man who eats is not necessarily hungry.", "neutral"),
        ("That doesn't mean that he won.", "neutral"),
        ("This does not contradict it.", None),
        ("A man who sleeps cannot run.", None),
    ],
)
def test_the_relation_that_a_text_names(text: str, expected: str | None) -> None:
    assert nli.implied_label(text, ()) == expected


def test_every_usable_reply_of_the_scripted_teacher_argues_for_its_answer() -> None:
    """Holds also where the teacher errs: a claim names one answer, and no other question reads it as another."""
    random_ = random.Random(5)
    answers = []
    for _ in range(500):
        problem = builtin.random_problem(random_)
        found = builtin.strict(builtin.teacher_reply(problem, random_), builtin.row({"input": "", "label": ""}))
        if found.rationale is not None and found.label is not None:
            assert builtin.implied_label(found.rationale, ()) == found.label
            answers.append(found.label == problem.label)
    assert 0.75 < sum(answers) / len(answers) < 0.95


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("Half of 84 is 42.", "Half of 84 is 42.", 1.0),
        ("Half of 84 is 42.", "half of it is 42", 0.8),  # 4 of 5 and 5 words
        ("a b c d", "d c b a", 0.25),  # in order: one word
        ("a b c d", "a x b", 2 * 2 / 7),
        ("a b", "", 0.0),
        ("...", "a", 0.0),
    ],
)
def test_rouge_l(reference: str, text: str, expected: float) -> None:
    assert grading.rouge_l_of(reference, text) == pytest.approx(expected)
    assert grading.rouge_l_of(text, reference) == pytest.approx(expected)


def test_quality_by_hand() -> None:
    """Three rows: consistent, inconsistent, and one whose text names no label and that has no teacher's rationale."""

    def row(name: str, rationale: str | None) -> records.Record:
        return records.Record(
            id=name,
            input="x",
            label="( 1.0 + 2.0 )",
            teacher_text="",
            rationale=rationale,
            teacher_label="1 + 2",
            outcome=records.OK,
        )

    rows = [row("a", "1 + 2 = 3."), row("b", "1 + 2 is 3."), row("c", None)]
    said = ["1 + 2 = 3.", "So 2 + 2 = 4.", "Pens are many here."]
    found, lines = rationales.quality(svamp.DATASET, rows, rationales=said, predictions=["( 2.0 + 1.0 )", "(3)", "(3)"])
    assert found["consistency"] == {"by_parser": 0.5, "by_parser_rows": 2, "by_label_task": None}
    assert [line["consistent"] for line in lines] == [True, False, None]
    assert [line["implied_label"] for line in lines] == ["1 + 2", "2 + 2", None]
    assert lines[2]["rouge_l"] is None
    assert found["overlap_with_teacher"]["rouge_l"] == pytest.approx((1 + 2 * 1 / 8) / 2)  # "2" of 4 and 4 words
    assert found["length"] == {"student_words": pytest.approx((5 + 6 + 4) / 3), "teacher_words": 5.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a toy student for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    named = toy.write_records(folder / "records")
    config = toy.config(folder / "run", named, train_steps=2, eval_period=2, checkpoint_period=2)
    loop.train(config, config_text="")
    return folder / "run"


def test_a_students_rationales(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures what the student writes, by the parser and by the label task."""
    found = rationales.measure(trained, batch_size=8)
    assert found == json.loads((trained / "rationales.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (trained / "rationales.jsonl").read_text("utf-8").splitlines()]
    assert (found["version"], found["dataset"], found["split"], found["step"]) == (1, "toy", "test", 2)
    assert found["rows"] == len(lines) == 16
    assert [line["teacher_rationale"] for line in lines] == [
        row.rationale for row in records.read_records(trained.parent / "records" / "toy" / "test.jsonl")
    ]
    # The predictions are those of the test that the run made itself.
    tested = (trained / "predictions" / "toy_label-test-2.jsonl").read_text("utf-8").splitlines()
    assert [line["prediction"] for line in lines] == [json.loads(row)["prediction"] for row in tested]
    shares = found["consistency"]
    assert 0 <= shares["by_label_task"] <= 1
    assert shares["by_label_task_other_rationale"] is not None
    # The figures follow the student's texts: the same run with the teacher's words.
    said = [line["teacher_rationale"] for line in lines]

    def as_the_teacher(
        self: object, texts: Sequence[str], *, prefix: str, answer: str, wide: bool = False
    ) -> list[str]:
        return said if answer == "targets" else [text.split()[-1][0] if wide else "a" for text in texts]

    monkeypatch.setattr(rationales._Generator, "__call__", as_the_teacher)
    perfect = rationales.measure(trained)
    assert perfect["overlap_with_teacher"]["rouge_l"] == 1.0
    names_a = [text == "last is a." for text in said]
    assert 0 < sum(names_a) < 16
    assert perfect["consistency"]["by_parser"] == perfect["consistency"]["by_label_task"] == sum(names_a) / 16


def test_a_student_of_labels_alone_has_none(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    manifest["run"]["mixture_or_task_name"] = "toy_label"
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="trained on labels alone"):
        rationales.measure(run)


def test_the_teachers_own_texts_fit_its_answers(
    real_data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Repeats the figures of docs/rationales.md for PaLM on SVAMP and CQA."""
    assert tasks is not None
    for name, share, rows in (("svamp", 0.894, 188), ("cqa", 0.995, 1035)):
        release.import_release(
            registry.get(name),
            release_dir=str(real_data_dir),
            records_dir=str(tmp_path),
            parser="strict",
            inputs="release",
            overwrite=False,
        )
        assert main.main(["rationales", "--dataset", name, "--records_dir", str(tmp_path)]) == 0
        found = json.loads(capsys.readouterr().out)["consistency"]
        assert (found["by_parser"], found["by_parser_rows"]) == (pytest.approx(share, abs=5e-4), rows)


def test_the_teacher_of_a_folder_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    garden.write_folder(Path("data/garden"))
    before = registry.options()
    assert main.main(["rationales", "--dataset", "data/garden"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dataset"], found["rows"], found["consistency"]["by_parser"]) == ("garden", 6, 1.0)
    assert main.main(["rationales", "--teacher", "data/garden"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == found
    assert "--teacher NAME is now --dataset NAME" in said.err
    catalogue._DATASETS.pop("garden")
    registry.configure(before)
