"""`sbs select`: each rule, the same choice every time, the student's likelihood, mistakes."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sbs_jax.cli import main
from sbs_jax.data import choice, parsing, records, registry, tokens
from sbs_jax.data.records import Rationale, Record
from sbs_jax.prediction import likelihood
from sbs_jax.student import families, partitioning
from sbs_jax.training import students

TEXTS = ("the last is c.", "c", "so it is c", "the last is d.", "a b c: c is last of them")


def row(number: int = 0, *, texts: tuple[str, ...] = TEXTS, labels: str = "cccdc", **changes: Any) -> Record:
    """Makes a toy row, whose vote says c, and one reply of five d."""
    found = [Rationale(rationale=text, teacher_label=label) for text, label in zip(texts, labels, strict=True)]
    fields = {
        "id": f"toy-{number}",
        "input": f"a {toy.LETTERS[number % 8]} c",
        "label": "c",
        "teacher_text": f"{texts[0]} {labels[0]}",
        "rationale": texts[0],
        "teacher_label": labels[0],
        "outcome": "ok",
        "votes": (4, 5),
        "other_rationales": tuple(found[1:]),
    }
    return Record(**(fields | changes))


def kept(one: Record, *rules: str, keep: int | None = None) -> list[str]:
    found, _ = choice.choose([one], rules=rules, keep=keep, same_label=str.__eq__)
    return [each.rationale for each in found[0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    registry.add(toy.DATASET)
    rows = [row(number) for number in range(6)]
    rows += [row(6, texts=("one",), labels="c", votes=None), row(7, label="e", labels="cccdc")]
    records.write_records(tmp_path / "in" / "toy" / "train.jsonl", rows)
    records.write_records(tmp_path / "in" / "toy" / "test.jsonl", [Record(id="t", input="a b c", label="c")])
    return tmp_path


def select(folder: Path, *flags: str, output: str = "out") -> int:
    words = ["select", "--dataset", "toy", "--records_dir", str(folder / "in"), "--output", str(folder / output)]
    return main.main([*words, *flags])


def contents(folder: Path, output: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / output / "toy").iterdir())}


# ------------------------------------------------------------------------------------ rules


def test_agreement_drops_other_labels():
    assert kept(row(), "agreement") == [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4]]
    assert kept(row(label="d"), "agreement") == [TEXTS[3]]
    assert kept(row(label=None), "agreement") == kept(row(), "agreement")  # the vote's
    assert kept(row(label=None, teacher_label=None), "agreement") == []
    assert kept(row(label="e"), "agreement") == []


def test_short_is_by_words_and_ties_keep_their_order():
    assert kept(row(), "short") == [TEXTS[1], TEXTS[0], TEXTS[2], TEXTS[3], TEXTS[4]]
    assert kept(row(), "short", keep=2) == [TEXTS[1], TEXTS[0]]


def test_diverse_takes_the_farthest_from_the_nearest():
    texts = ("a b c d", "A b, c e", "x y z", "a x", "x y z w")
    # From {a b c d}: 2/5, 1, 4/5, 1: "x y z". Then the nearest are 2/5, 3/4, 1/4: "a x". Then 2/5, 1/4.
    assert kept(row(texts=texts), "diverse") == [texts[0], texts[2], texts[3], texts[1], texts[4]]
    assert kept(row(texts=("?", "!", "a", ".", "")[:4], labels="cccc"), "diverse") == ["?", "a", "!", "."]


def test_rules_apply_in_their_order():
    assert kept(row(), "agreement", "short", "diverse", keep=2) == [TEXTS[1], TEXTS[4]]
    assert kept(row(), "diverse", "agreement", keep=2) == [TEXTS[0], TEXTS[1]]
    assert kept(row(label="e"), "short", "agreement") == []


def test_the_first_chosen_becomes_the_record_s():
    found = row()
    assert choice.with_chosen(found, found.rationales, str.__eq__) is found
    fewer = choice.with_chosen(found, found.rationales[:2], str.__eq__)
    assert fewer == dataclasses.replace(found, other_rationales=found.other_rationales[:1])
    other = choice.with_chosen(found, found.rationales[1:3], str.__eq__)
    assert (other.rationale, other.teacher_label, other.outcome, other.votes) == ("c", "c", "ok", (4, 5))
    assert (other.teacher_text, [each.rationale for each in other.other_rationales]) == (None, ["so it is c"])
    against = choice.with_chosen(dataclasses.replace(found, hinted=True), found.rationales[3:4], str.__eq__)
    assert (against.teacher_label, against.votes, against.hinted, against.other_rationales) == ("d", None, False, ())
    none = choice.with_chosen(found, [], str.__eq__)
    assert (none.rationale, none.label, none.teacher_label, none.teacher_text) == (None, "c", "c", found.teacher_text)
    assert none.outcome == parsing.NONE_CHOSEN in parsing.DROPPED
    bare = Record(id="t", input="a b c", label="c")
    assert choice.with_chosen(bare, [], str.__eq__) is bare


# ---------------------------------------------------------------------------------- command


def test_the_command_writes_records_that_say_how_they_were_chosen(folder: Path, capsys):
    assert select(folder, "--by", "agreement", "short", "--keep", "2") == 0
    first = contents(folder)
    found = {each.id: each for each in records.read_records(folder / "out" / "toy" / "train.jsonl")}
    assert [each.rationale for each in found["toy-0"].rationales] == [TEXTS[1], TEXTS[0]]
    assert found["toy-6"] == row(6, texts=("one",), labels="c", votes=None)
    assert (found["toy-7"].rationale, found["toy-7"].outcome) == (None, "none_chosen")
    manifest = records.read_manifest(folder / "out" / "toy")
    assert manifest.get("selection") == json.loads(capsys.readouterr().out)
    assert manifest.get("selection") == {
        "by": ["agreement", "short"],
        "keep": 2,
        "rows": 9,
        "rationales": 36,
        "kept": 13,
        "dropped": {"agreement": 11, "keep": 12},
        "rows without a rationale left": 1,
    }
    assert manifest["splits"]["train"]["rationales"] == 7
    # The same command again, elsewhere, and after the rows changed their places.
    assert select(folder, "--by", "agreement", "short", "--keep", "2") == 0
    assert select(folder, "--by", "agreement", "short", "--keep", "2", output="again") == 0
    assert contents(folder) == contents(folder, "again") == first
    with pytest.raises(FileExistsError, match="chosen by other rules"):
        main.main(
            [*f"select --dataset toy --records_dir {folder}/in --output {folder}/out --by short --traceback".split()]
        )
    file = folder / "in" / "toy" / "train.jsonl"
    rows = records.read_records(file)
    random.Random(0).shuffle(rows)
    records.write_records(file, rows)
    assert select(folder, "--by", "agreement", "short", "--keep", "2", output="shuffled") == 0
    again = records.read_records(folder / "shuffled" / "toy" / "train.jsonl")
    assert [each.id for each in again] == [each.id for each in rows]
    assert {each.id: each for each in again} == found
    # Chosen among the chosen, the manifest has both.
    words = ["select", "--dataset", "toy", "--records_dir", str(folder / "out"), "--output", str(folder / "twice")]
    assert main.main([*words, "--by", "diverse", "--keep", "1"]) == 0
    assert records.read_manifest(folder / "twice" / "toy").get("selection", {})["earlier"]["keep"] == 2


# --------------------------------------------------------------------------------- the model


def mean_log_probability(student: students.Student, logits: Any, source: str, target: str) -> float:
    """Computes it alone: no padding, no batch; logits from the model, the rest in float64."""
    vocabulary = registry.vocabulary("byte")
    prefix = student.options.rationale_prefix
    inputs, targets = (tokens.encode([text], vocabulary)[0] for text in (prefix + source, target))
    limits = student.manifest["run"]["task_feature_lengths"]
    targets = tokens.cut(np.array(targets), limits["targets"]).tolist()
    of = np.asarray(logits(jnp.array([inputs]), jnp.array([[0, *targets[:-1]]]))[0], np.float64)
    log_p = of - of.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    return float(np.mean([log_p[place, token] for place, token in enumerate(targets)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student, whose targets have 9 tokens: longer rationales are truncated."""
    folder = tmp_path_factory.mktemp("student")
    toy.write_records(folder / "records")
    run = toy.write_untrained(folder)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["dataset"] = "toy"
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_likely_is_the_student_s_mean_log_probability(run: Path, folder: Path):
    student = students.load_student(run, layout=partitioning.DATA_PARALLEL)
    pairs = [(f"a {letter} c", text) for letter in toy.LETTERS[:6] for text in TEXTS]
    logits = jax.jit(families.join(student.structure, student.parameters).__call__)
    wanted = [mean_log_probability(student, logits, *pair) for pair in pairs]
    found = likelihood.Scorer(student, batch_size=8)(pairs)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert len(set(np.round(wanted, 2))) > 20
    other = likelihood.Scorer(student, batch_size=64)(pairs[::-1])  # with 34 rows of padding
    np.testing.assert_allclose(other[::-1], found, atol=1e-4)
    assert select(folder, "--by", "likely", "--keep", "1", "--model", str(run)) == 0
    by_id = {each.id: each for each in records.read_records(folder / "out" / "toy" / "train.jsonl")}
    for number in range(6):
        of_row = dict(zip(TEXTS, wanted[number * 5 : number * 5 + 5], strict=True))
        assert by_id[f"toy-{number}"].rationale == max(of_row, key=of_row.__getitem__)
    model = records.read_manifest(folder / "out" / "toy").get("selection", {})["model"]
    assert model == student.identity()
    assert select(folder, *f"--by likely --keep 1 --batch_size 3 --output {folder}/small --model {run}".split()) == 0
    assert contents(folder, "small") == contents(folder)


# ---------------------------------------------------------------------------------- mistakes


def changed(run: Path, folder: Path, **data: Any) -> str:
    """Copies the run's manifest and changes its task or its data."""
    copy = folder / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run / "checkpoints")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["run"]["mixture_or_task_name"] = data.pop("task", "toy_step_by_step")
    manifest["data"] |= data
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return str(copy)


@pytest.mark.parametrize(
    ("flags", "change", "message"),
    [
        ("--by likely --model RUN", {"task": "toy_label"}, "trained on toy_label, which has no rationale task"),
        ("--by likely --model RUN", {"dataset": "svamp"}, "trained on svamp, not on 'toy'"),
        ("--by likely --model RUN", {"vocabulary_sha256": "ab"}, "another vocabulary than that of the student"),
        ("--by short --model RUN", {}, "only --by likely uses a student"),
        ("--by short likely short --model RUN", {}, "each rule once"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(
    run: Path, folder: Path, capsys, flags: str, change: dict[str, Any], message: str
):
    path = changed(run, folder, **change)
    assert select(folder, *flags.replace("RUN", path).split()) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_the_records_themselves_are_not_replaced(folder: Path, capsys):
    before = contents(folder, "in")
    assert select(folder, "--by", "short", "--overwrite", output="in") == 1
    assert "is the folder of the inputs" in capsys.readouterr().err
    assert contents(folder, "in") == before
