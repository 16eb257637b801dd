"""The import of the release: exact figures on the real data, and every kind of bad file refused."""

import csv
import dataclasses
import json
import shutil

import pytest
from builders import real_records

from sbs_jax.cli import main
from sbs_jax.data import grading, records, release, tfds
from sbs_jax.data.dataset import Row
from sbs_jax.storage import checksums
from tasks import anli1, cqa, esnli, svamp

# ------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def imported(real_data_dir, tmp_path_factory):
    """Maps (dataset, parser) to the manifest of its import and the directory written."""

    def get(name, parser):
        made, folder = real_records.imported(name, parser, release_dir=real_data_dir, tmp_path_factory=tmp_path_factory)
        return made, folder / name

    return get


# dataset, parser, split: rows, teacher right, outcomes.
REAL = {
    ("esnli", "official", "validation"): (9842, 7201, {"no_answer": 4, "ok": 9838}),
    ("esnli", "official", "test"): (9824, 7171, {"ok": 9824}),
    ("esnli", "strict", "validation"): (9842, 7201, {"no_answer": 4, "ok": 9838}),
    ("esnli", "strict", "test"): (9824, 7171, {"ok": 9824}),
    ("anli1", "official", "validation"): (1000, 668, {"no_answer": 9, "ok": 991}),
    ("anli1", "official", "test"): (1000, 656, {"no_answer": 10, "ok": 990}),
    ("anli1", "strict", "validation"): (1000, 668, {"no_answer": 9, "ok": 991}),
    ("anli1", "strict", "test"): (1000, 656, {"no_answer": 10, "ok": 990}),
    ("cqa", "official", "train"): (9741, 7234, {"no_label": 3, "ok": 9738}),
    ("cqa", "official", "test"): (1221, 943, {"ok": 1221}),
    ("cqa", "strict", "train"): (
        *(9741, 7388),
        {"label_not_in_set": 182, "letter_text_disagreement": 267, "ok": 9292},
    ),
    ("cqa", "strict", "test"): (
        *(1221, 962),
        {"label_not_in_set": 16, "letter_text_disagreement": 31, "ok": 1174},
    ),
    ("svamp", "official", "train"): (800, 586, {"no_answer": 11, "no_label": 2, "ok": 787}),
    ("svamp", "official", "test"): (200, 148, {"no_answer": 2, "ok": 198}),
    ("svamp", "strict", "train"): (800, 594, {"no_answer": 11, "not_arithmetic": 22, "ok": 767}),
    ("svamp", "strict", "test"): (200, 155, {"no_answer": 2, "not_arithmetic": 5, "ok": 193}),
}


@pytest.mark.parametrize(("key", "expected"), REAL.items(), ids=map("-".join, REAL))
def test_real_split_gives_exactly_these_figures(imported, key, expected):
    name, parser, split = key
    summary = imported(name, parser)[0]["splits"][split]
    assert (summary["rows"], summary["teacher_right"], summary["outcomes"]) == expected
    assert summary["labelled"] == summary["rows"] == sum(summary["outcomes"].values())


@pytest.mark.parametrize(
    ("name", "parser", "split", "percent"),
    [
        ("esnli", "official", "test", "73.0"),
        ("anli1", "official", "test", "65.6"),
        ("cqa", "official", "test", "77.23"),
        ("svamp", "official", "test", "74.0"),
        ("cqa", "strict", "test", "78.79"),
        ("cqa", "official", "train", "74.26"),
        ("cqa", "strict", "train", "75.84"),
    ],
)
def test_teacher_accuracy_is_the_published_one(imported, name, parser, split, percent):
    accuracy = imported(name, parser)[0]["splits"][split]["teacher_accuracy"]
    assert f"{accuracy:.{len(percent.partition('.')[2])}f}" == percent


def test_damage_in_cqa_is_as_reported(imported):
    rows = records.read_records(imported("cqa", "official")[1] / "train.jsonl")
    labels = [(row.teacher_label, row.choices) for row in rows]
    assert sum(label is None for label, _ in labels) == 3
    assert sum(label is not None and label not in choices for label, choices in labels) == 445
    strict = records.read_records(imported("cqa", "strict")[1] / "train.jsonl")
    assert all(row.teacher_label in (None, *row.choices) for row in strict)
    assert sum(len(set(row.choices)) < 5 for row in strict) == 122


def test_damage_in_svamp_is_as_reported(imported):
    directory = imported("svamp", "official")[1]
    labels = [row.teacher_label for row in records.read_records(directory / "train.jsonl")]
    assert labels.count(None) == 13
    assert sum(bool(label) and grading.equation_value(label) is None for label in labels) == 21
    test = [row.teacher_label for row in records.read_records(directory / "test.jsonl")]
    assert "(14, 21)" in test
    assert "(175, 5)" in labels
    strict = records.read_records(imported("svamp", "strict")[1] / "train.jsonl")
    assert "(175, 5)" not in [row.teacher_label for row in strict]


def test_split_without_inputs_is_left_out_and_said(imported):
    for name, replies in (("anli1", 5000), ("esnli", 5500)):
        manifest, directory = imported(name, "strict")
        assert manifest["skipped"] == {
            "train": f"1 teacher shard(s) with {replies} replies, but no inputs ({name}_train.json)"
        }
        assert sorted(path.name for path in directory.iterdir()) == [
            *("manifest.json", "test.jsonl", "validation.jsonl")
        ]


def test_real_records_are_the_sources_rows_in_order(imported, real_data_dir):
    rows = records.read_records(imported("cqa", "strict")[1] / "test.jsonl")
    lines = (real_data_dir / "cqa" / "cqa_test.json").read_text("utf-8").splitlines()
    assert [row.id for row in rows] == [json.loads(line)["id"] for line in lines]
    replies = [
        reply
        for shard in (0, 1)
        for reply in json.loads((real_data_dir / "cqa" / "llm" / f"test_CoT_{shard}.json").read_text("utf-8"))
    ]
    assert [row.teacher_text for row in rows] == replies
    rows = records.read_records(imported("esnli", "strict")[1] / "validation.jsonl")
    assert sum(row.id.endswith("-2") for row in rows) == 2  # two pairs occur twice
    assert all(row.input.count("</s>") == 1 for row in rows)
    rows = records.read_records(imported("anli1", "strict")[1] / "test.jsonl")
    assert rows[0].id == "4aae63a8-fcf7-406c-a2f3-50c31c5934a9"


# ------------------------------------------------------------------------------ invented releases

REPLIES = [f"It is {n} + 1. The answer is ({n} + 1).\n\nQ: B" for n in range(12)]
PROBLEMS = [{"input": f"Ann has {n} pens.\nShe buys 1?", "label": f"( {n}.0 + 1.0 )"} for n in range(12)]


def write_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_shards(folder, split, shards):
    folder.mkdir(parents=True, exist_ok=True)
    for number, texts in shards.items():
        (folder / f"{split}_CoT_{number}.json").write_text(json.dumps(texts))


@pytest.fixture
def made_release(tmp_path):
    """A release of SVAMP: 12 training rows in 12 shards, 2 test rows in one."""
    folder = tmp_path / "release" / "svamp"
    write_lines(folder / "svamp_train.json", PROBLEMS)
    write_lines(folder / "svamp_test.json", PROBLEMS[:2])
    write_shards(folder / "llm", "train", {n: [reply] for n, reply in enumerate(REPLIES)})
    write_shards(folder / "llm", "test", {0: REPLIES[:2]})
    return tmp_path / "release"


def import_svamp(directory, **options):
    settings = {"release_dir": directory, "records_dir": directory.parent / "records", "parser": "strict"}
    return release.import_release(svamp.DATASET, **(settings | options))


def read_split(directory, split="train", name="svamp"):
    return records.read_records(directory.parent / "records" / name / f"{split}.jsonl")


def test_shards_follow_in_numeric_order(made_release):
    import_svamp(made_release)
    # As text, "train_CoT_10" comes before "train_CoT_2".
    assert [row.teacher_text for row in read_split(made_release)] == REPLIES
    assert [row.teacher_label for row in read_split(made_release)] == [f"({n} + 1)" for n in range(12)]


def test_equal_sources_give_equal_bytes_and_are_left_alone(made_release, tmp_path):
    first = import_svamp(made_release)
    second = import_svamp(made_release, records_dir=tmp_path / "again")
    assert first == second == records.read_manifest(tmp_path / "again" / "svamp")
    for path in (tmp_path / "records" / "svamp").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "svamp" / path.name).read_bytes()
        assert str(tmp_path) not in path.read_text()
    before = {path: path.stat().st_ino for path in (tmp_path / "records" / "svamp").iterdir()}
    import_svamp(made_release)
    assert {path: path.stat().st_ino for path in before} == before
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == ["svamp"]


def test_manifest_names_sources_and_hashes(made_release):
    manifest = import_svamp(made_release)
    test = manifest["splits"]["test"]
    directory = made_release.parent / "records" / "svamp"
    assert test["sha256"] == checksums.file_sha256(directory / "test.jsonl")
    assert test["sources"] == {
        name: checksums.file_sha256(made_release / "svamp" / name)
        for name in ("llm/test_CoT_0.json", "svamp_test.json")
    }
    assert (test["rationales"], test["teacher_labels"], test["teacher_accuracy"]) == (2, 2, 100.0)
    assert json.loads((directory / "manifest.json").read_text()) == manifest


def test_ids_do_not_depend_on_other_rows_and_repeats_are_numbered():
    def ids(inputs):
        rows = release.with_ids([Row(input=text, label=None) for text in inputs], name="svamp", where="row {}".format)
        return [row.id for row in rows]

    # sha1("b") begins with e9d71f5ee7c9.
    assert ids(["b"]) == ["svamp-e9d71f5ee7c9"]
    a, b, second_a, third_a = ids(["a", "b", "a", "a"])
    assert (second_a, third_a) == (f"{a}-2", f"{a}-3")
    assert ids(["b", "a"]) == [b, a]


def test_source_id_that_repeats_is_refused(tmp_path):
    def question(row_id):
        choices = ["tea", "sand"]
        return {"id": row_id, "question": "Which?", "choices": choices, "answer": "tea"}

    folder = tmp_path / "release" / "cqa"
    write_lines(folder / "cqa_test.json", [question("q1"), question("q2"), question("q1")])
    write_shards(folder / "llm", "test", {0: ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"cqa_test\.json:3: the id 'q1' is already that of .*cqa_test\.json:1"):
        release.import_release(cqa.DATASET, release_dir=tmp_path / "release", records_dir=tmp_path, parser="strict")


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def put(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


BAD = {
    "gap": (remove("llm/train_CoT_3.json"), "train_CoT_3.json is missing, and train_CoT_11.json is there"),
    "first shard": (remove("llm/train_CoT_0.json"), "train_CoT_0.json is missing"),
    "last shard": (
        remove("llm/train_CoT_11.json"),
        r"svamp_train\.json has 12 rows and the teacher shards of train have 11 replies: 1 \(train_CoT_0",
    ),
    "all shards of a split": (remove("llm/test_CoT_0.json"), r"no teacher shards of test .*svamp_test\.json"),
    "too long a shard": (
        put("llm/test_CoT_0.json", json.dumps(REPLIES[:3])),
        r"svamp_test\.json has 2 rows .* have 3 replies: 3 \(test_CoT_0\.json\)",
    ),
    "number twice": (put("llm/test_CoT_00.json", "[]"), "are both shard 0"),
    "no number": (put("llm/test_CoT_x.json", "[]"), r"test_CoT_x\.json: expected a number"),
    "shard is no list": (put("llm/test_CoT_0.json", "{}"), r"test_CoT_0\.json: got \{\}; expected a list of texts"),
    "reply is no text": (
        put("llm/test_CoT_0.json", '["a", null]'),
        r"test_CoT_0\.json: the field '\[1\]' is null; expected text",
    ),
    "shard is cut short": (put("llm/test_CoT_0.json", '["a", "b'), r"test_CoT_0\.json: not valid JSON"),
    "shard in Latin-1": (put("llm/test_CoT_0.json", b'["caf\xe9", "b"]'), r"test_CoT_0\.json: byte 5 \(0xe9\)"),
    "half a character": (put("llm/test_CoT_0.json", '["\\ud800", "b"]'), r"test_CoT_0\.json: .*unpaired surrogate"),
    "no inputs": (remove("svamp_train.json", "svamp_test.json"), r"no inputs of svamp in .*It has \['svamp'\]"),
    "malformed line": (
        put("svamp_test.json", '{"input": "x", "label": "(1)"}\n{"inp'),
        r"svamp_test\.json:2: not valid",
    ),
    "blank line": (
        put("svamp_test.json", '\n{"input": "x", "label": "(1)"}\n'),
        r"svamp_test\.json:1: the line is blank",
    ),
    "missing field": (put("svamp_test.json", '{"input": "x"}\n'), r"test\.json:1: the field 'label' is missing"),
    "wrong type": (
        put("svamp_test.json", '{"input": "x", "label": 1}\n'),
        r"test\.json:1: .*'label' is 1; expected text",
    ),
    "no label": (
        put("svamp_test.json", '{"input": "x", "label": "(1)"}\n{"input": "y", "label": "one"}\n'),
        r"svamp_test\.json:2: 'one' is not a valid label: is_arithmetic\(\) rejects it",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_release_is_refused_and_nothing_is_written(made_release, damage, message):
    damage(made_release / "svamp")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        import_svamp(made_release)
    directory = made_release.parent / "records"
    assert not directory.exists() or not list(directory.iterdir())


def test_wrong_folder_names_the_right_one(made_release):
    with pytest.raises(FileNotFoundError, match=f"Give the folder above it, {made_release}"):
        import_svamp(made_release, release_dir=made_release / "svamp")
    with pytest.raises(FileNotFoundError, match="There is no such folder"):
        import_svamp(made_release, release_dir=made_release / "nowhere")


def test_unknown_names_offer_near_matches(made_release):
    with pytest.raises(ValueError, match=r"parser for svamp is 'strikt'.* mean 'strict'"):
        import_svamp(made_release, parser="strikt")
    with pytest.raises(ValueError, match=r"inputs is 'tdfs'.* mean 'tfds'"):
        import_svamp(made_release, inputs="tdfs")
    with pytest.raises(ValueError, match="svamp is not in TensorFlow Datasets"):
        import_svamp(made_release, inputs="tfds")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": 3}, "label is 3, which is outside the label set"),
        ({"label": -1}, "label is -1, which is outside"),
        ({"label": "neutral"}, "'label' is \"neutral\"; expected a whole number"),
        ({"label": True}, "'label' is true; expected a whole number"),
        ({"premise": None}, "'premise' is null; expected text"),
        ({"hypothesis": "a</s>b"}, "hypothesis contains '</s>'"),
    ],
)
def test_bad_inference_row_is_refused(tmp_path, fields, message):
    row = {"premise": "A dog barks.", "hypothesis": "It is loud.", "label": 0}
    write_lines(tmp_path / "esnli" / "esnli_test.json", [row, row | fields])
    with pytest.raises(ValueError, match=rf"esnli_test\.json:2: .*{message}"):
        esnli.read_release(tmp_path)


def test_answer_that_is_no_choice_is_refused(tmp_path):
    row = {"id": "q1", "question": "Which?", "choices": ["tea", "sand"], "answer": "Tea"}
    write_lines(tmp_path / "cqa" / "cqa_test.json", [row])
    write_shards(tmp_path / "cqa" / "llm", "test", {0: ["a"]})
    with pytest.raises(ValueError, match=r"cqa_test\.json:1: the label 'Tea' is outside the label set"):
        release.import_release(cqa.DATASET, release_dir=tmp_path, records_dir=tmp_path / "r", parser="strict")


# ------------------------------------------------------------------------- an existing directory


def change_parser(directory):
    return {"parser": "official"}


def change_source(directory):
    write_shards(directory / "svamp" / "llm", "test", {0: ["(2)", "(3)"]})
    return {}


def parse_otherwise(directory):
    """Changes records as if a rule of the parser had changed since."""
    folder = directory.parent / "records" / "svamp"
    rows = records.read_records(folder / "test.jsonl")
    manifest = records.read_manifest(folder)
    manifest["splits"]["test"]["sha256"] = records.write_records(folder / "test.jsonl", rows[:1])
    records.write_manifest(folder, manifest)
    return {}


def drop_a_split(directory):
    (directory / "svamp" / "svamp_test.json").unlink()
    (directory / "svamp" / "llm" / "test_CoT_0.json").unlink()
    return {}


def edit_the_records(directory):
    with (directory.parent / "records" / "svamp" / "test.jsonl").open("a") as file:
        file.write("\n")
    return {}


def lose_the_manifest(directory):
    (directory.parent / "records" / "svamp" / "manifest.json").unlink()
    return {}


CHANGES = {
    change_parser: r"other records: parser is 'strict' there, 'official' here\. Choose",
    change_source: r"sources of test differ \(llm/test_CoT_0\.json\)",
    parse_otherwise: "the replies of test were parsed by a different version",
    drop_a_split: "test is only there",
    edit_the_records: r"test\.jsonl is not the file its manifest describes",
    lose_the_manifest: r"it has no manifest\.json",
}


@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_other_records_are_replaced_only_when_told(made_release, change, message):
    import_svamp(made_release)
    options = change(made_release)
    directory = made_release.parent / "records" / "svamp"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(FileExistsError, match=message):
        import_svamp(made_release, **options)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    manifest = import_svamp(made_release, **options, overwrite=True)
    assert records.read_manifest(directory) == manifest
    assert {path.stem for path in directory.glob("*.jsonl")} == set(manifest["splits"])
    assert [path.name for path in directory.parent.iterdir()] == ["svamp"]


def test_overwriting_never_deletes_foreign_files(made_release):
    import_svamp(made_release)
    note = made_release.parent / "records" / "svamp" / "notes.txt"
    note.write_text("mine")
    with pytest.raises(FileExistsError, match=r"not records: \['notes\.txt'\]"):
        import_svamp(made_release, parser="official", overwrite=True)
    assert note.read_text() == "mine"
    assert import_svamp(made_release)["parser"] == "strict"


def test_records_do_not_replace_the_folder_they_are_made_from(made_release):
    before = {path: path.read_bytes() for path in made_release.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"is the folder of the inputs, which the records would replace"):
        import_svamp(made_release, records_dir=made_release, overwrite=True)
    assert {path: path.read_bytes() for path in made_release.rglob("*") if path.is_file()} == before


def test_dataset_outside_the_release_is_refused(made_release):
    dataset = dataclasses.replace(svamp.DATASET, read_release=None)
    with pytest.raises(ValueError, match="svamp is not part of the release"):
        release.import_release(dataset, release_dir=made_release, records_dir=made_release, parser="strict")


# ------------------------------------------------------------------------------------------- TFDS

PAIRS = [
    ("A dog barks.", "An animal is heard.", 0),
    ("A dog barks.", "The dog is brown.", 1),
    ("A man sleeps.", "A man runs.", 2),
    ("A dog barks.", "An animal is heard.", 0),
]
NAMES = ("entailment", "neutral", "contradiction")


@pytest.fixture
def esnli_tfds(tmp_path, monkeypatch):
    """A folder where the real TFDS builder `esnli` has prepared `PAIRS`, in another order, as test."""
    import tensorflow_datasets as tfds

    columns = ("pairID", "Sentence1", "Sentence2", "gold_label", "Explanation_1")
    for split in ("train", "dev", "test"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for number, (premise, hypothesis, label) in enumerate(reversed(PAIRS)):
                writer.writerow((f"{split}{number}", premise, hypothesis, NAMES[label], "e"))

    def downloaded(manager, urls):
        del manager
        files = {"train": "train", "validation": "dev", "test": "test"}
        paths = {split: str(tmp_path / f"{files[split]}.csv") for split in urls}
        return {split: [paths[split]] for split in urls}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", downloaded)
    return str(tmp_path / "tfds")


def write_esnli_release(directory, pairs=PAIRS):
    lines = [{"premise": p, "hypothesis": h, "label": n} for p, h, n in pairs]
    write_lines(directory / "esnli" / "esnli_test.json", lines)
    replies = [f"Reply {number}.\nAnswer: {NAMES[n]}" for number, (_, _, n) in enumerate(pairs)]
    write_shards(directory / "esnli" / "llm", "test", {0: replies})
    write_shards(directory / "esnli" / "llm", "train", {0: ["Reply.\nAnswer: neutral"] * 3})


def import_esnli(tmp_path, **options):
    settings = {"records_dir": tmp_path / "records", "parser": "strict"}
    return release.import_release(esnli.DATASET, **(settings | options))


def test_tfds_rows_find_their_replies_by_id(tmp_path, esnli_tfds):
    source = tmp_path / "release"
    write_esnli_release(source)
    manifest = import_esnli(tmp_path, release_dir=source, inputs="tfds", tfds_data_dir=esnli_tfds)
    assert manifest["inputs"] == "tfds"
    assert manifest["splits"]["test"]["outcomes"] == {"ok": 4}
    assert manifest["splits"]["train"]["outcomes"] == {"no_teacher": 4}
    assert manifest["splits"]["train"]["teacher_accuracy"] is None
    rows = records.read_records(tmp_path / "records" / "esnli" / "test.jsonl")
    assert len({row.id for row in rows}) == 4
    for row in rows:
        number = int((row.rationale or "").removeprefix("Reply ").removesuffix("."))
        premise, hypothesis, label = PAIRS[number]
        assert (row.input, row.label) == (f"{premise}</s>{hypothesis}", NAMES[label])
    # In TFDS's order, which is not the release's.
    assert [row.input for row in rows] != [f"{p}</s>{h}" for p, h, _ in PAIRS]

    # The same from a records directory; and without replies.
    import_esnli(tmp_path, release_dir=source, records_dir=tmp_path / "from_release")
    import_esnli(
        tmp_path,
        release_dir=tmp_path / "from_release",
        records_dir=tmp_path / "again",
        inputs="tfds",
        tfds_data_dir=esnli_tfds,
    )
    assert records.read_records(tmp_path / "again" / "esnli" / "test.jsonl") == rows
    bare = import_esnli(
        tmp_path,
        release_dir=None,
        records_dir=tmp_path / "bare",
        inputs="tfds",
        tfds_data_dir=esnli_tfds,
    )
    assert bare["splits"]["test"]["outcomes"] == {"no_teacher": 4}

    # A reply whose input TFDS does not have.
    shutil.rmtree(source)
    write_esnli_release(source, [*PAIRS[:2], ("A cat.", "A pet.", 0)])
    with pytest.raises(ValueError, match=r"1 of 3 teacher replies have ids that tfds:esnli/0\.1\.0/test"):
        import_esnli(
            tmp_path,
            release_dir=source,
            records_dir=tmp_path / "other",
            inputs="tfds",
            tfds_data_dir=esnli_tfds,
        )


def test_reply_whose_id_has_another_input_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "release" / "anli1"
    write_lines(
        folder / "anli1_test.json",
        [{"uid": "u1", "premise": "It opened in 1901.", "hypothesis": "It is old.", "label": 0}],
    )
    write_shards(folder / "llm", "test", {0: ["It is. So the answer is entailment."]})
    example = {"uid": "u1", "context": "It opened in 1901.", "hypothesis": "It is old.", "label": 0}

    def import_anli(records_dir):
        return release.import_release(
            anli1.DATASET,
            release_dir=tmp_path / "release",
            records_dir=records_dir,
            parser="strict",
            inputs="tfds",
        )

    monkeypatch.setattr(tfds, "examples", lambda name, splits, data_dir: {"test": (f"tfds:{name}/test", [example])})
    assert import_anli(tmp_path / "records")["splits"]["test"]["teacher_accuracy"] == 100.0
    example["context"] = "It opened in 2001."
    with pytest.raises(ValueError, match=r"'u1' answers 'It opened in 1901.* 'It opened in 2001"):
        import_anli(tmp_path / "other")


def test_the_folder_of_tfds_is_that_of_the_flag(tmp_path, monkeypatch):
    asked = []
    example = {"uid": "u1", "context": "It opened in 1901.", "hypothesis": "It is old.", "label": 0}

    def examples(name, splits, data_dir):
        asked.append(data_dir)
        return {"test": (f"tfds:{name}/test", [example])}

    monkeypatch.setattr(tfds, "examples", examples)
    release_row = {"uid": "u1", "premise": "It opened in 1901.", "hypothesis": "It is old.", "label": 0}
    write_lines(tmp_path / "release/anli1/anli1_test.json", [release_row])
    write_shards(tmp_path / "release/anli1/llm", "test", {0: ["It is. So the answer is entailment."]})
    common = [
        "--dataset=anli1",
        "--inputs=tfds",
        "--tfds_data_dir=gs://b/tfds",
        f"--records_dir={tmp_path / 'records'}",
    ]
    assert main.main(["records", f"--release={tmp_path / 'release'}", *common]) == 0
    teach = ["teach", "--provider=openai", "--model=m", f"--store={tmp_path / 's'}", "--dry_run"]
    assert main.main([*teach, *common]) == 0
    assert asked == ["gs://b/tfds"] * 2
    for call in (
        lambda: import_svamp(tmp_path, tfds_data_dir="D"),
        lambda: release.read_unanswered(anli1.DATASET, inputs_dir=tmp_path, inputs="records", tfds_data_dir="D"),
    ):
        with pytest.raises(ValueError, match=r"tfds_data_dir is D .*belongs to inputs 'tfds'"):
            call()


def test_anli_columns_are_those_of_tfds():
    import tensorflow_datasets as tfds

    features = tfds.builder_cls("anli").BUILDER_CONFIGS
    assert anli1.DATASET.tfds == f"anli/{features[0].name}"
