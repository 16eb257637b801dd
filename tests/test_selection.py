"""Selection of examples from records, and counts of the rest."""

import dataclasses
import math
from typing import Any

import pytest

from sbs_jax.data import grading, records, selection
from sbs_jax.data.selection import DataOptions

OPTIONS = DataOptions(records_dir="records", vocabulary="byte")


def record(number: int, **changes) -> records.Record:
    fields: dict[str, Any] = {
        "id": f"row-{number}",
        "input": f"{number} cats",
        "label": f"{number}.0",
        "teacher_text": "raw",
        "rationale": f"there are {number}",
        "teacher_label": f"{number}",
        "outcome": "ok",
    }
    return records.Record(**(fields | changes))


def rows(count: int) -> list[records.Record]:
    return [record(number) for number in range(count)]


def select(found, *, split="train", hold_out=False, same_label=grading.same_equation_value, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return selection.select(found, options, same_label=same_label, split=split, hold_out=hold_out)


def ids(selected: selection.Selection, task: str) -> list[str]:
    return [example.id for example in selected.examples[task]]


def test_texts_of_each_task():
    selected = select(rows(1))
    assert {task: tuple(found) for task, found in selected.examples.items()} == {
        "label": (selection.Example(id="row-0", label="0.0", inputs="predict: 0 cats", targets="0.0"),),
        "rationale": (selection.Example(id="row-0", label="0.0", inputs="explain: 0 cats", targets="there are 0"),),
        "rationale_then_label": (
            selection.Example(
                id="row-0",
                label="0.0",
                inputs="predict: 0 cats",
                targets="there are 0 Answer: 0.0",
            ),
        ),
        "label_given_rationale": (
            selection.Example(
                id="row-0",
                label="0.0",
                inputs="predict: 0 cats Rationale: there are 0",
                targets="0.0",
            ),
        ),
    }
    for examples in selected.examples.values():
        for feature in ("inputs", "targets"):
            assert [*examples.texts(feature)] == [getattr(example, feature) for example in examples]


def test_prefixes_and_teacher_labels():
    selected = select(rows(1), label_source="teacher", label_prefix="", rationale_prefix="[why] ")
    assert selected.examples["label"][0].inputs == "0 cats"
    assert selected.examples["label"][0].targets == "0"
    assert selected.examples["rationale"][0].inputs == "[why] 0 cats"
    assert selected.examples["rationale_then_label"][0].targets == "there are 0 Answer: 0"


@pytest.mark.parametrize(("count", "expected"), [(9741, 975), (800, 80), (1, 1), (30, 3), (0, 0)])
def test_held_out_sizes_round_up(count: int, expected: int):
    """The paper's 8,766/975 of CQA and 720/80 of SVAMP."""
    assert len(selection.held_out_ids(rows(count), 0.1)) == expected


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (30, 3), (81, 9)])
def test_train_and_validation_share_a_file(count: int, expected: int):
    found = rows(count)
    train = select(found, hold_out=True)
    validation = select(found, split="validation", hold_out=True)
    assert len(ids(validation, "label")) == expected
    assert len(ids(train, "label")) == count - expected
    assert set(ids(train, "label")).isdisjoint(ids(validation, "label"))
    assert set(ids(train, "label")) | set(ids(validation, "label")) == {row.id for row in found}
    assert train.counts["held out for validation"] == expected
    assert validation.counts["kept for training"] == count - expected


def test_held_out_rows_depend_on_ids_alone():
    found = rows(200)
    expected = set(ids(select(found, split="validation", hold_out=True), "label"))
    for changes in ({"seed": 7}, {"fraction": 0.1}, {"label_source": "teacher"}):
        again = select(found[::-1], split="validation", hold_out=True, **changes)
        assert set(ids(again, "label")) == expected
    assert expected != {row.id for row in found[:20]}


def test_chosen_rows_are_the_same_for_ever():
    """Golden: a change here gives every user another validation split and other fractions."""
    found = rows(30)
    assert selection.held_out_ids(found, 0.1) == {"row-13", "row-16", "row-7"}
    assert selection.subset_ids(found, 0.1, seed=0) == {"row-13", "row-24", "row-28"}
    assert selection.subset_ids(found, 0.1, seed=1) == {"row-16", "row-24", "row-3"}


def test_fractions_are_nested_and_the_same_for_all_tasks():
    found = rows(500)
    before: set[str] = set()
    for fraction in (0.001, 0.07, 0.125, 0.25, 0.5, 0.75, 1.0):
        selected = select(found, hold_out=True, fraction=fraction, seed=3)
        chosen = set(ids(selected, "label"))
        assert before <= chosen
        assert len(chosen) == math.ceil(round(fraction * 450, 9))
        for task in selection.TASKS:
            assert set(ids(selected, task)) == chosen
        assert selected.counts["outside the fraction"] == 450 - len(chosen)
        before = chosen
    other_seed = set(ids(select(found, hold_out=True, fraction=0.25, seed=4), "label"))
    assert other_seed != set(ids(select(found, hold_out=True, fraction=0.25, seed=3), "label"))


def test_a_fraction_is_exact_in_decimals():
    """0.07 * 100 is 7.000000000000001 in floats, whose ceiling would be 8."""
    assert len(ids(select(rows(100), fraction=0.07), "label")) == 7
    assert len(ids(select(rows(100), fraction=1), "label")) == 100


def test_the_fraction_does_not_depend_on_what_a_task_drops():
    found = rows(100)
    holes = [dataclasses.replace(row, rationale=None) for row in found[:50]] + found[50:]
    full, partial = select(found, fraction=0.2), select(holes, fraction=0.2)
    assert ids(full, "label") == ids(partial, "label")
    assert ids(partial, "rationale") == [row_id for row_id in ids(full, "rationale") if int(row_id[4:]) >= 50]


def test_order_of_the_file_is_kept():
    chosen = ids(select(rows(100), fraction=0.3), "label")
    assert chosen == sorted(chosen, key=lambda row_id: int(row_id[4:]))


def test_what_is_not_used_is_counted_by_reason():
    found = [
        record(0),
        record(1, rationale="  "),
        record(2, rationale=None, teacher_label=None, outcome="no_answer"),
        record(3, label=None),
        record(4, teacher_label=" "),
        record(5, teacher_label="6"),
        record(6, label=None, rationale=None, teacher_label=None, outcome="no_teacher"),
    ]
    human = select(found)
    assert dict(human.counts) == {
        "rows": 7,
        "outside the fraction": 0,
        "used": 7,
        "label": 5,
        "label: not used, no human label": 2,
        "rationale": 4,
        "rationale: not used, blank rationale": 1,
        "rationale: not used, no rationale (no_answer)": 1,
        "rationale: not used, no rationale (no_teacher)": 1,
        "rationale_then_label": 3,
        "rationale_then_label: not used, blank rationale": 1,
        "rationale_then_label: not used, no rationale (no_answer)": 1,
        "rationale_then_label: not used, no human label": 2,
        "label_given_rationale": 3,
        "label_given_rationale: not used, blank rationale": 1,
        "label_given_rationale: not used, no rationale (no_answer)": 1,
        "label_given_rationale: not used, no human label": 2,
    }
    teacher = select(found, label_source="teacher")
    assert ids(teacher, "label") == ["row-0", "row-1", "row-3", "row-5"]
    assert teacher.counts["label: not used, no teacher label (no_answer)"] == 1
    assert teacher.counts["label: not used, no teacher label (no_teacher)"] == 1
    assert teacher.counts["label: not used, blank label"] == 1
    for task in selection.TASKS:
        dropped = sum(n for reason, n in human.counts.items() if reason.startswith(f"{task}: "))
        assert human.counts[task] + dropped == human.counts["used"]


def test_agreeing_rationales_are_graded_as_the_dataset_grades():
    found = [record(1), record(2, teacher_label="4 / 2"), record(3, teacher_label="9"),
             record(4, teacher_label=None), record(5, label=None)]  # fmt: skip
    agreeing = select(found, rationales="agreeing")
    assert ids(agreeing, "rationale") == ["row-1", "row-2"]
    assert ids(agreeing, "rationale_then_label") == ["row-1", "row-2"]
    assert ids(agreeing, "label") == ["row-1", "row-2", "row-3", "row-4"]
    assert agreeing.counts["rationale: not used, argues for another label"] == 2
    # Compared as text, even "1.0" and "1" differ.
    assert ids(select(found, rationales="agreeing", same_label=grading.same_text), "rationale") == []
    # The teacher's rationale always argues for the teacher's label.
    distilled = select(found, rationales="agreeing", label_source="teacher")
    assert ids(distilled, "rationale") == ["row-1", "row-2", "row-3", "row-5"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_keeps_every_row_with_a_label(split: str):
    found = [record(0, teacher_label="9"), record(1, rationale=None), record(2, label=None),
             record(3, label=None, teacher_label=None)]  # fmt: skip
    options = {"label_source": "teacher", "rationales": "agreeing", "fraction": 0.01}
    selected = select(found, split=split, **options)
    assert [example.targets for example in selected.examples["label"]] == ["0.0", "1.0", "2"]
    assert [example.targets for example in selected.examples["rationale_then_label"]] == [
        "there are 0 Answer: 0.0",
        "Answer: 1.0",
        "there are 2 Answer: 2",
    ]
    assert ids(selected, "rationale") == ["row-0", "row-2", "row-3"]
    cascade = selected.examples["label_given_rationale"]  # whose teacher's rationales stay out
    assert [*cascade.texts("inputs")] == [example.inputs for example in selected.examples["label"]]
    assert [example.inputs for example in cascade] == ["predict: 0 cats", "predict: 1 cats", "predict: 2 cats"]
    assert selected.counts["label: not used, no label"] == 1


def test_repeated_ids_are_refused():
    with pytest.raises(ValueError, match="'row-1' occurs 2 times"):
        select([record(0), record(1), record(1)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_source": "humans"}, "'humans'.*human, teacher.*Did you mean 'human'"),
        ({"rationales": "agreing"}, "Did you mean 'agreeing'"),
        ({"train_split": "test"}, "expected one of"),
        ({"fraction": 0.0}, "above 0 and at most 1"),
        ({"fraction": 12.5}, "fraction is 12.5"),
        ({"fraction": float("nan")}, "expected a number"),
        ({"fraction": True}, "expected a number"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"validation_fraction": -0.1}, "at least 0"),
        ({"seed": True}, "seed is True"),
        ({"records_dir": ""}, "expected a path"),
        ({"vocabulary": ""}, "expected a path"),
        ({"folds": 1}, "folds is 1, which leaves no rows"),
        ({"folds": 3, "fold": 3}, "fold is 3 with 3 folds"),
        ({"fold": 1}, "fold is 1 with 0 folds"),
        ({"folds": 2, "train_split": "validation"}, "'validation' with 2 folds"),
        ({"augmentation": ""}, "augmentation is ''"),
    ],
)
def test_bad_options_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OPTIONS, **changes)


def test_folds_cut_the_rows_into_equal_parts_that_depend_on_ids_alone():
    found = rows(23)
    tested = [ids(select(found, split="test", folds=5, fold=fold), "label") for fold in range(5)]
    assert sorted(map(len, tested)) == [4, 4, 5, 5, 5]
    assert sorted(one for part in tested for one in part) == sorted(row.id for row in found)
    options: dict[str, Any] = {"folds": 5, "fold": 2, "hold_out": True, "validation_fraction": 0.2}
    train, validation = (select(found, split=split, **options) for split in ("train", "validation"))
    parts = [set(ids(train, "label")), set(ids(validation, "label")), set(tested[2])]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 23
    assert len(parts[1]) == 4  # of 18
    assert train.counts["tested in this fold"] == 5
    other = select(found[::-1], split="test", folds=5, fold=2, seed=9, fraction=0.5, label_source="teacher")
    assert set(ids(other, "label")) == parts[2]
    with pytest.raises(ValueError, match="folds is 24, but there are 23 rows"):
        select(found, split="test", folds=24, fold=0)


def test_further_rows_join_the_tasks_that_they_have_a_target_for():
    more = [record(100, rationale=None, teacher_label=None), record(101, label=None, teacher_label=None)]
    train = selection.select(
        rows(10),
        dataclasses.replace(OPTIONS, fraction=0.5),
        same_label=grading.same_equation_value,
        split="train",
        hold_out=False,
        further=more,
    )
    assert (len(train.examples["label"]), len(train.examples["rationale"])) == (6, 6)
    assert ids(train, "label")[-1] == "row-100"
    assert ids(train, "rationale")[-1] == "row-101"
    assert (train.counts["added by augmentation"], train.counts["used"]) == (2, 7)
