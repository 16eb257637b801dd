"""Registered tasks: names, options in force, files and splits, and SeqIO's view of them."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import seqio
from builders.cats import configure, dataset, register, row, write

from sbs_jax.data import catalogue, records, registry, release, task_names
from sbs_jax.student import losses
from tasks import builtin

LENGTHS = {"inputs": 40, "targets": 40, "task_ids": 40}


@pytest.fixture
def records_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with 20 training and 4 test records of `cats`, which is registered."""
    write(tmp_path, [row(number) for number in range(20)])
    write(tmp_path, [row(number) for number in range(100, 104)], split="test")
    register(tmp_path, monkeypatch)
    return tmp_path


def ids(task_name: str, split: str) -> list[str]:
    return [example.id for example in registry.examples(task_name, split)]


def stream(name: str, *, count: int, seed: int | None = 0, **changes) -> list[dict]:
    provider = seqio.get_mixture_or_task(name)
    arguments = {"sequence_length": LENGTHS, "split": "train", "num_epochs": None, "seed": seed}
    found = provider.get_dataset(**(arguments | changes))
    return list(found.take(count).as_numpy_iterator())


def text(ids: np.ndarray) -> str:
    return registry.vocabulary("byte").decode(ids.tolist())


# ------------------------------------------------------------------------------- names


def test_parts_of_task_names(records_dir: Path):
    assert task_names.split("cats_rationale_then_label") == (dataset(), "rationale_then_label")
    assert task_names.split("cats_label") == (dataset(), "label")
    assert task_names.dataset_of("cats_step_by_step") == dataset()
    assert task_names.graded("cats_step_by_step") == ("cats_label",)
    assert task_names.graded("cats_label") == ("cats_label",)
    assert task_names.graded("cats_rationale_then_label") == ("cats_rationale_then_label",)
    assert task_names.graded("cats_rationale") == ()
    assert task_names.subtasks("cats_step_by_step") == ("cats_label", "cats_rationale")
    assert task_names.split("cats_label_given_rationale") == (dataset(), "label_given_rationale")
    assert task_names.subtasks("cats_cascade") == ("cats_label_given_rationale", "cats_rationale")
    assert task_names.graded("cats_cascade") == ("cats_label_given_rationale",)
    assert task_names.task_ids("cats_cascade") == task_names.task_ids("cats_step_by_step") == (1, 2)
    assert task_names.objectives("cats_cascade", alpha=0.3) == task_names.objectives("cats_step_by_step", alpha=0.3)
    assert task_names.subtasks("cats_rationale") == ("cats_rationale",)


def test_unknown_names_get_near_matches(records_dir: Path):
    with pytest.raises(ValueError, match=r"Unknown task.*'cats_lable'.*Did you mean 'cats_label'"):
        task_names.split("cats_lable")
    with pytest.raises(ValueError, match="Did you mean 'cats_step_by_step'"):
        task_names.split("cat_step_by_step")
    with pytest.raises(ValueError, match=r"Unknown dataset 'cat'.*Did you mean 'cats'"):
        registry.get("cat")


def test_bad_descriptions_are_refused(records_dir: Path):
    with pytest.raises(ValueError, match="Dataset name 'Cats'"):
        registry.add(dataset("Cats"))
    with pytest.raises(ValueError, match="not ending in"):
        registry.add(dataset("cats_label"))
    with pytest.raises(ValueError, match="exactly 'inputs' and 'targets'"):
        dataset(feature_lengths={"inputs": 8})
    with pytest.raises(ValueError, match="at least 2"):
        dataset(feature_lengths={"inputs": 8, "targets": 1})
    with pytest.raises(ValueError, match="no metric_fns"):
        dataset(metric_fns=())
    registry.add(dataset())  # the same once more is fine
    with pytest.raises(ValueError, match="already registered as 'cats'"):
        registry.add(dataset(primary_metric="other"))


def test_graded_text():
    assert registry.graded_text(" yes ", kind="label") == "yes"
    then = "rationale_then_label"
    assert registry.graded_text("It barks. Answer: yes", kind=then) == "yes"
    assert registry.graded_text("Answer: no. Answer: yes", kind=then) == "yes"
    assert registry.graded_text("yes", kind=then) == ""
    assert registry.graded_text("Answer: it", kind="rationale") == "Answer: it"


# ------------------------------------------------------------------------------ files and splits


def test_missing_records_name_the_command(records_dir: Path):
    registry.add(dataset("dogs"))
    with pytest.raises(FileNotFoundError) as error:
        registry.examples("dogs_label", "train")
    command = f"sbs records --dataset dogs --release DIR --records_dir {records_dir}"
    assert command in str(error.value)


@pytest.mark.parametrize(
    ("label", "shown"),
    [("yes ", "'yes '"), ("YES", "'YES'"), ("maybe", "'maybe'"), ("", "''"), ("\u662f", "'\u662f'")],
)
def test_every_reader_refuses_the_same_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str, shown: str):
    """Training, evaluation, the import and the teacher: one check, one message."""
    monkeypatch.setattr(registry, "_options", registry._options)
    rows = [records.Record(id=f"{n}", input=f"q{n}", label="no") for n in range(3)]
    rows.append(records.Record(id="3", input="q3", label=label))
    builtin_dir = tmp_path / "builtin"
    (builtin_dir / "llm").mkdir(parents=True)
    for split in ("train", "test"):
        records.write_records(builtin_dir / f"{split}.jsonl", rows)
        lines = [json.dumps({"input": row.input, "label": row.label}) + "\n" for row in rows]
        (builtin_dir / f"builtin_{split}.json").write_text("".join(lines))
        (builtin_dir / "llm" / f"{split}_CoT_0.json").write_text(json.dumps(["It is so."] * 4))
    configure(tmp_path)
    where, folder = {"records": r"t\w+\.jsonl:4: ", "release": r"builtin_t\w+\.json:4: "}, tmp_path / "r"
    readers = [
        ("records", lambda: registry.examples("builtin_label", "train")),
        ("records", lambda: registry.examples("builtin_label", "test")),
        ("records", lambda: registry.read_split("builtin", "test")),
        ("records", lambda: release.read_unanswered(builtin.DATASET, inputs_dir=tmp_path, inputs="records")),
        ("release", lambda: release.read_unanswered(builtin.DATASET, inputs_dir=tmp_path, inputs="release")),
        (
            "release",
            lambda: release.import_release(builtin.DATASET, release_dir=tmp_path, records_dir=folder, parser="strict"),
        ),
    ]
    for form, read in readers:
        message = where[form] + rf"the label {shown} is outside the label set \['yes', 'no'\]; correct it\."
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert label != "yes " or str(error.value).endswith("Did you mean 'yes'?")
    registry.configure(registry.options())


def test_teacher_labels_that_cannot_be_one_are_counted_before_training_on_them(records_dir: Path, caplog):
    rows = [row(number, choices=("0", f"{number}"), teacher_label="17" if number < 3 else "0") for number in range(9)]
    write(records_dir, rows)
    configure(records_dir)
    registry.manifest("cats_label")
    assert not caplog.records
    configure(records_dir, label_source="teacher")
    registry.manifest("cats_label")
    assert "cats, train: 3 of 9 teacher labels are no possible label of their row, such as '17' of the row 'row-0'" in (
        caplog.text
    )


def test_a_label_of_a_closed_set_that_the_vocabulary_cannot_write_is_an_error(records_dir: Path, monkeypatch):
    closed = dataclasses.replace(dataset("cats"), labels=("\u662f", *map(str, range(200))))
    monkeypatch.setitem(catalogue._DATASETS, "cats", closed)
    configure(records_dir, vocabulary=builtin.vocabulary_path())
    with pytest.raises(ValueError, match=r"lacks '\u662f', a piece of 1 of the labels of cats"):
        registry.token_tables("cats_label", "train")
    configure(records_dir)
    registry.token_tables("cats_label", "train")


def test_pieces_that_the_vocabulary_lacks_are_counted(records_dir: Path, caplog):
    rows = [
        row(number, **({"label": "\u662f", "teacher_label": "\u662f"} if number < 5 else {})) for number in range(20)
    ]
    rows[7] = row(7, input="7 c\u0103ts</s>a \u732b", rationale="</s>there are \u4e03")
    write(records_dir, rows)
    configure(records_dir, vocabulary=builtin.vocabulary_path(), validation_fraction=0)
    tables = registry.token_tables("cats_label", "train")
    registry.token_tables("cats_rationale", "train")
    unknown = registry.vocabulary(builtin.vocabulary_path()).unk_id
    assert unknown in tables["targets"].row(0, length=9)
    said = [record.getMessage() for record in caplog.records]
    assert [message.partition(" have")[0] for message in said] == [
        "Warning: cats_label, train: 1 of 20 inputs (5 %)",
        "Warning: cats_label, train: 5 of 20 targets (25 %)",
        "Warning: cats_rationale, train: 1 of 20 targets (5 %)",
    ]
    assert "lacks, such as '\u662f'; the student cannot write them" in said[1]
    assert "such as '\u4e03'" in said[2]
    # Bytes are never unknown, and known text is no news.
    caplog.clear()
    configure(records_dir)
    registry.token_tables("cats_label", "train")
    configure(records_dir, vocabulary=builtin.vocabulary_path())
    registry.token_tables("cats_label", "test")
    assert not caplog.records


def test_held_out_where_there_is_no_validation_file(records_dir: Path):
    assert registry.available_splits("cats") == ("train", "validation", "test")
    assert len(ids("cats_label", "train")) == 18
    assert len(ids("cats_label", "validation")) == 2
    assert set(ids("cats_label", "train")).isdisjoint(ids("cats_label", "validation"))
    configure(records_dir, validation_fraction=0)
    assert registry.available_splits("cats") == ("train", "test")
    assert len(ids("cats_label", "train")) == 20
    with pytest.raises(ValueError, match="no validation split: validation_fraction is 0"):
        ids("cats_label", "validation")


def test_a_validation_file_is_used_as_it_is(records_dir: Path):
    found = [row(number) for number in range(50, 60)]
    write(records_dir, found, split="validation")
    configure(records_dir)
    assert len(ids("cats_label", "train")) == 20
    assert ids("cats_label", "validation") == [record.id for record in found]


@pytest.mark.parametrize("keep_train_file", [True, False])
def test_the_validation_file_can_be_trained_on(records_dir: Path, keep_train_file: bool):
    found = [row(number) for number in range(50, 80)]
    write(records_dir, found, split="validation")
    if not keep_train_file:
        (records_dir / "cats" / "train.jsonl").unlink()
    configure(records_dir, train_split="validation")
    train, validation = ids("cats_label", "train"), ids("cats_label", "validation")
    assert len(train) == 27
    assert len(validation) == 3
    assert {*train, *validation} == {record.id for record in found}
    assert ids("cats_label", "test") == [f"row-{number}" for number in range(100, 104)]


def test_splits_that_do_not_exist(records_dir: Path):
    (records_dir / "cats" / "train.jsonl").unlink()
    assert registry.available_splits("cats") == ("test",)
    with pytest.raises(ValueError, match=r"no train split: there is no .*train.jsonl"):
        ids("cats_label", "train")
    with pytest.raises(ValueError, match=r"'tset'.*Did you mean 'test'"):
        ids("cats_label", "tset")
    with pytest.raises(ValueError, match="no examples in test; it is a mixture"):
        ids("cats_step_by_step", "test")


def test_a_task_without_rows_says_what_became_of_them(records_dir: Path):
    found = [row(number, rationale=" ") for number in range(5)]
    write(records_dir, found)
    configure(records_dir)
    with pytest.raises(ValueError, match=r"cats_rationale has no examples.*blank rationale"):
        ids("cats_rationale", "train")


def test_manifest(records_dir: Path):
    configure(records_dir, fraction=0.5)
    manifest = registry.manifest("cats_label")
    assert manifest["options"]["fraction"] == 0.5
    assert list(manifest["splits"]) == ["train", "validation", "test"]
    train = manifest["splits"]["train"]
    content = (records_dir / "cats" / "train.jsonl").read_bytes()
    assert train["sha256"] == hashlib.sha256(content).hexdigest()
    assert train["file"] == manifest["splits"]["validation"]["file"] == "train.jsonl"
    assert train["counts"]["rows"] == 20
    assert train["counts"]["held out for validation"] == 2
    assert train["counts"]["label"] == train["counts"]["used"] == 9


def test_configure_reads_anew(records_dir: Path):
    assert len(ids("cats_label", "test")) == 4
    write(records_dir, [row(1)], split="test")
    assert len(ids("cats_label", "test")) == 4
    configure(records_dir, label_prefix="")
    assert len(ids("cats_label", "test")) == 1
    assert registry.examples("cats_label", "test")[0].inputs == "1 cats"
    assert registry.options().label_prefix == ""


# --------------------------------------------------------------------------------- through SeqIO


def test_features_of_a_seqio_task(records_dir: Path):
    task = seqio.TaskRegistry.get("cats_rationale_then_label")
    assert set(task.output_features) == {"inputs", "targets", "task_ids"}
    assert task.output_features["inputs"].vocabulary.vocab_size == 359
    assert list(task.splits) == ["train", "validation", "test"]
    (example, *_) = stream("cats_rationale_then_label", count=1, split="test", shuffle=False)
    assert example["id"] == b"row-100"
    assert example["label"] == b"100"
    assert example["inputs_pretokenized"] == b"predict: 100 cats"
    assert example["targets_pretokenized"] == b"there are 100 Answer: 100"
    for feature in ("inputs", "targets", "task_ids"):
        assert example[feature].dtype == np.int32
    assert text(example["inputs"]) == "predict: 100 cats"
    assert example["inputs"][-1] == example["targets"][-1] == 1
    assert example["task_ids"].tolist() == [losses.LABEL] * len(example["targets"])
    assert task.postprocess_fn("so. Answer: 100", example=example, is_target=False) == "100"
    assert [fn.__name__ for fn in task.metric_fns] == ["accuracy"]
    assert seqio.TaskRegistry.get("cats_rationale").metric_fns == []


def test_cut_sequences_end_in_eos_and_keep_their_task_ids(records_dir: Path):
    lengths = {"inputs": 8, "targets": 5, "task_ids": 5}
    (example,) = stream("cats_rationale", count=1, sequence_length=lengths)
    assert text(example["inputs"]) == "explain"
    assert text(example["targets"]) == "ther"
    assert example["inputs"][-1] == example["targets"][-1] == 1
    assert example["task_ids"].tolist() == [losses.RATIONALE] * 5
    for lengths in ({"inputs": 17, "targets": 13, "task_ids": 13}, None):
        examples = stream("cats_rationale", count=18, sequence_length=lengths)
        for example in examples:
            assert text(example["targets"]) == example["targets_pretokenized"].decode()
            assert len(example["task_ids"]) == len(example["targets"])


def test_every_row_once_per_epoch_in_a_new_order(records_dir: Path):
    found = [example["id"].decode() for example in stream("cats_label", count=54)]
    epochs = [found[start : start + 18] for start in (0, 18, 36)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(ids("cats_label", "train"))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_mixture_alternates_pairs_across_epochs(records_dir: Path):
    rows = stream("cats_step_by_step", count=90, passthrough_features=["id"])
    objectives = [int(example["task_ids"][0]) for example in rows]
    assert objectives == [losses.LABEL, losses.RATIONALE] * 45
    names = [example["id"] for example in rows]
    assert names[0::2] == names[1::2]
    assert sorted(names[0:36:2]) == sorted(name.encode() for name in ids("cats_label", "train"))


def test_tasks_of_different_size_repeat_on_their_own(records_dir: Path):
    found = [row(number, rationale=None if number >= 10 else "few") for number in range(30)]
    write(records_dir, found)
    configure(records_dir, validation_fraction=0)
    examples = stream("cats_step_by_step", count=120, passthrough_features=["id"])
    assert [int(example["task_ids"][0]) for example in examples] == [1, 2] * 60
    names = [example["id"].decode() for example in examples]
    for start in (0, 30):
        assert sorted(names[0::2][start : start + 30]) == sorted(record.id for record in found)
    for start in range(0, 60, 10):
        assert set(names[1::2][start : start + 10]) == {record.id for record in found[:10]}


def test_hosts_share_an_epoch(records_dir: Path):
    seen = []
    for index in range(4):
        shard = seqio.ShardInfo(index=index, num_shards=4)
        seen += stream("cats_label", count=100, num_epochs=1, shard_info=shard)
    assert sorted(example["id"].decode() for example in seen) == sorted(ids("cats_label", "train"))
    with pytest.raises(ValueError, match="18 rows in train, too few to share between 19 hosts"):
        stream("cats_label", count=1, shard_info=seqio.ShardInfo(index=0, num_shards=19))


def test_same_seed_same_order(records_dir: Path):
    def order(seed: int) -> list[bytes]:
        return [example["id"] for example in stream("cats_label", count=36, seed=seed)]

    assert order(5) == order(5)
    assert order(5) != order(6)


# ------------------------------------------------------------------------------- folds and further rows


def test_folds_pool_the_rows_of_all_files(records_dir: Path):
    tested = []
    for fold in range(3):
        configure(records_dir, folds=3, fold=fold)
        of_split = {split: ids("cats_label", split) for split in ("train", "validation", "test")}
        assert {name: len(found) for name, found in of_split.items()} == {"train": 14, "validation": 2, "test": 8}
        assert len({one for found in of_split.values() for one in found}) == 24
        assert [record.id for record in registry.read_split("cats", "test")] == of_split["test"]
        tested += of_split["test"]
    assert sorted(tested) == sorted(f"row-{number}" for number in (*range(20), *range(100, 104)))
    sources = registry.manifest("cats_label")["splits"]
    assert {facts["file"] for facts in sources.values()} == {"train.jsonl test.jsonl"}
    write(records_dir, [row(3)], split="validation")
    configure(records_dir, folds=3)
    with pytest.raises(ValueError, match=r"'row-3' is in .*train.jsonl and in .*validation.jsonl; folds"):
        registry.manifest("cats_label")


def test_augmentation_is_for_training_alone(records_dir: Path, tmp_path: Path):
    further = tmp_path / "further.jsonl"
    records.write_records(further, [row(200, rationale=None), row(201, label=None, teacher_label=None)])
    before = registry.manifest("cats_label")
    configure(records_dir, augmentation=str(further), fraction=0.5)
    found = registry.manifest("cats_label")
    assert found["splits"]["train"]["counts"]["added by augmentation"] == 2
    assert found["splits"]["train"]["file"] == "train.jsonl further.jsonl"
    assert ids("cats_label", "train")[-1] == "row-200"
    assert ids("cats_rationale", "train")[-1] == "row-201"
    assert [record.id for record in registry.read_split("cats", "train")][-2:] == ["row-200", "row-201"]
    for split in ("validation", "test"):
        assert found["splits"][split] == before["splits"][split]
    records.write_records(further, [row(200), row(102)])
    configure(records_dir, augmentation=str(further))
    assert registry.sources("cats")["splits"]["train"]["sha256"] != found["splits"]["train"]["sha256"]
    with pytest.raises(ValueError, match=r"further.jsonl has the id 'row-102', which .*test.jsonl has too"):
        registry.manifest("cats_label")
    configure(records_dir, augmentation="no/such.jsonl")
    with pytest.raises(FileNotFoundError, match="There is no augmentation no/such"):
        registry.manifest("cats_label")
