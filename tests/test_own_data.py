"""`sbs init`: from a user's table to a dataset, and from there to a student, without Python or gin by hand."""

import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import teacher_server
from builders.garden import ROWS, TOPICS

from sbs_jax.cli import main
from sbs_jax.data import catalogue, dataset_folder, own_data, own_experiments, records, registry, release, table
from sbs_jax.training import gin_files


def csv_of(rows, delimiter=","):
    columns = list(rows[0])
    quoted = [[f'"{row[name]}"' for name in columns] for row in rows]
    return "\n".join([delimiter.join(columns), *map(delimiter.join, quoted)]) + "\n"


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


WRITERS = {
    "tickets.csv": lambda path, rows: path.write_text("\ufeff" + csv_of(rows), "utf-8"),
    "tickets.tsv": lambda path, rows: path.write_text(csv_of(rows, "\t"), "utf-8"),
    "tickets.jsonl": lambda path, rows: path.write_text(lines_of(rows), "utf-8"),
    "tickets.json": lambda path, rows: path.write_text(json.dumps(rows), "utf-8"),
    "tickets.csv.gz": lambda path, rows: path.write_bytes(gzip.compress(csv_of(rows).encode())),
    "tickets.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


def plan_of(tmp_path, rows, file="tickets.jsonl", **options):
    WRITERS[file](tmp_path / file, rows)
    return own_data.plan(str(tmp_path / file), **options)


@pytest.mark.parametrize("file", WRITERS)
def test_all_forms_give_the_same_dataset(file, tmp_path):
    got = plan_of(tmp_path, ROWS, file, label_column="team")
    want = plan_of(tmp_path, ROWS, label_column="team")
    assert (got.dataset.definition, got.splits, got.prompt) == (want.dataset.definition, want.splits, want.prompt)
    assert got.dataset.name == "tickets"
    assert got.dataset.labels == ("pests", "soil", "water")
    # Stratified, disjoint, whole.
    assert {split: Counter(row.label for row in rows) for split, rows in got.splits.items()} == {
        "train": dict.fromkeys(TOPICS, 11),
        "validation": dict.fromkeys(TOPICS, 2),
        "test": dict.fromkeys(TOPICS, 2),
    }
    assert sorted(row.input for rows in got.splits.values() for row in rows) == sorted(row["text"] for row in ROWS)
    held_out = {row.input for split in ("validation", "test") for row in got.splits[split]}
    assert not any(text in got.prompt["instruction"] for text in held_out)
    assert sum(f"Input: {row.input}" in got.prompt["instruction"] for row in got.splits["train"]) == 12


def test_an_instruction_set_has_its_inputs_behind_the_instructions(tmp_path):
    rows = [
        {
            "instruction": f"Name {n}.",
            "input": "" if n % 2 else f"Of {n} roses",
            "output": f"{n} it is",
            "rationale": "So.",
        }
        for n in range(20)
    ]
    plan = plan_of(tmp_path, rows, "tickets.jsonl")
    found = {row.input: row.label for of in plan.splits.values() for row in of}
    assert found["Name 4.\nOf 4 roses"] == "4 it is"
    assert found["Name 5."] == "5 it is"
    assert (len(found), plan.dataset.labels, len(plan.rationales)) == (20, None, 20)
    assert "instructions, each followed by its 'input' on a new line" in plan.lines


def test_order_and_further_rows_move_few_rows_between_splits(tmp_path):
    """A row keeps its split whatever the order of the file, because the hash of its id decides."""
    first = plan_of(tmp_path, ROWS, label_column="team")
    second = plan_of(tmp_path, ROWS[::-1], label_column="team")
    for split, rows in first.splits.items():
        assert {row.input for row in rows} == {row.input for row in second.splits[split]}


def test_what_was_decided_is_said(tmp_path):
    rows = [*ROWS, ROWS[0], {**ROWS[1], "team": "soil"}, {"text": None, "team": "soil"}]
    rows = [{**row, "uid": number} for number, row in enumerate(rows)]
    said = "\n".join(plan_of(tmp_path, rows, label_column="team").lines)
    for part in (
        "input: column 'text'; id: column 'uid'",
        "label: column 'team'",
        "1 rows with the input of an earlier row: left out",
        "1 rows with the input of an earlier row and another label: left out",
        "1 rows without an input: left out",
        "answers: one of 3 labels",
        "splits: 33 train, 6 validation, 6 test; test and validation by the hash of ids, label by label",
        "prompt: 12 examples of train, none of validation or test",
    ):
        assert part in said, said


def test_rationales_of_the_table_become_records(tmp_path):
    """Then no teacher is needed; rows without one, and other splits, stay as they are."""
    rows = [
        {**row, "explanation": f"It is about {row['team']}." if number else None} for number, row in enumerate(ROWS)
    ]
    found = plan_of(tmp_path, rows, label_column="team")
    assert "rationales: column 'explanation', so no teacher is needed" in found.lines
    own_data.write(found, tmp_path / "tickets", gin={})
    got = {
        record.input: record
        for split in records.SPLITS
        for record in records.read_records(tmp_path / "tickets" / "records" / "tickets" / f"{split}.jsonl")
    }
    assert len(got) == len(rows)
    for row in rows:
        record = got[row["text"]]
        assert (record.label, record.rationale) == (row["team"], row["explanation"])
        assert record.teacher_label == (record.rationale and row["team"])
    assert (
        found.dataset.feature_lengths["targets"]
        < plan_of(tmp_path, ROWS, label_column="team").dataset.feature_lengths["targets"]
    )
    assert not (tmp_path / "tickets" / "inputs" / "tickets" / "train.jsonl").read_text().count("It is about")
    with pytest.raises(ValueError, match="The column 'text' has the rationales; name others"):
        plan_of(tmp_path, ROWS, label_column="team", rationale_column="text")


def test_free_answers_unlabelled_rows_and_splits_of_the_source(tmp_path):
    free = [{"question": f"What is {n} plus {n}?", "answer": f"{2 * n}"} for n in range(40)]
    found = plan_of(tmp_path, free)
    assert found.dataset.labels is None
    assert found.dataset.primary_metric == "normalized_accuracy"
    parsed = found.dataset.parse("Twice 4. So the answer is 8.", found.splits["train"][0], parser="strict")
    assert (parsed.rationale, parsed.label) == ("Twice 4.", "8")
    closed = plan_of(tmp_path, free, labels="closed")
    assert len(closed.dataset.labels or ()) == 40
    unlabelled = plan_of(tmp_path, [{"text": row["text"]} for row in ROWS])
    assert {row.label for rows in unlabelled.splits.values() for row in rows} == {None}
    assert "label: none" in "\n".join(unlabelled.lines)
    assert plan_of(tmp_path, ROWS, unlabelled=True).dataset.labels is None
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "train.csv").write_text(csv_of(ROWS[:20]))
    (folder / "dev.csv").write_text(csv_of(ROWS[20:30]))
    (folder / "test.jsonl").write_text(lines_of(ROWS[30:]))
    whole = own_data.plan(str(folder), label_column="team")
    assert {split: len(rows) for split, rows in whole.splits.items()} == {"train": 20, "validation": 10, "test": 15}


@pytest.mark.parametrize(
    ("file", "contents", "options", "message"),
    [
        ("a.csv", "text,team\nx,y,z\n", {}, r"a.csv:2: got 3 fields; expected 2, as in the header. Quote fields"),
        ("a.csv", 'text,team\n"x,y\n', {}, "a.csv:2: not valid CSV"),
        ("a.csv", "text,text\nx,y\n", {}, "the header has the column 'text' 2 times"),
        ("a.csv", "text,team\n", {}, "has no rows"),
        ("a.csv", b"text,team\n\xff,y\n", {}, "UTF-8"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', {}, "a.jsonl:2: .* expected a JSON object"),
        ("a.parquet", "text", {}, "cannot be read as Parquet"),
        ("a.xlsx", "text", {}, "ends in '.xlsx'; expected .csv"),
        (
            "a.csv",
            csv_of(ROWS),
            {},
            r"usual name for the label .* name it with --label COLUMN .* or say with --unlab",
        ),
        ("a.csv", csv_of(ROWS), {"label_column": "tema"}, r"no column 'tema'; it has \['text', 'team'\].*'team'"),
        ("a.csv", csv_of(ROWS), {"label_column": "text"}, "both the column 'text'"),
        ("a.csv", csv_of([{"a": "x", "b": "y"}]), {}, "usual name for the input .* name it with --input COLUMN"),
        ("a.csv", csv_of(ROWS[:4]), {"label_column": "team"}, "4 rows are too few"),
        ("a.csv", csv_of(ROWS), {"label_column": "team", "name": "My Data"}, "'My Data': expected lower-case"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(file, contents, options, message, tmp_path):
    path = tmp_path / file
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(ValueError, match=message):
        own_data.plan(str(path), **options)


def test_a_place_without_a_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no train, validation or test"):
        table.read(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        table.read("./nowhere.csv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "'version' is 2; expected 1"),
        ({"metric": "acuracy"}, "'accuracy'"),
        ({"metric": "rouge"}, "'metric' is 'rouge'; expected one of .*Did you mean 'rouge_l'"),
        ({"metrics": ["chrf", "bleu"]}, "'metrics' is 'bleu'; expected one of"),
        (
            {"metric": "numeric_accuracy", "labels": None, "tolerance": "half"},
            "'tolerance' is \"half\"; expected a number",
        ),
        (
            {"metric": "numeric_accuracy", "labels": None, "tolerance": -1.0},
            "'tolerance' is -1.0; expected .* at least 0",
        ),
        ({"relative_tolerance": 0.1}, "'relative_tolerance' is for the metric numeric_accuracy"),
        ({"metric": "numeric_accuracy"}, "the label 'pests' holds not exactly one number"),
        ({"labels": ["one"]}, "at least two different texts"),
        ({"labels": ["one", "one"]}, "at least two different texts"),
        ({"marker": " "}, "'marker' is blank"),
        ({"lengths": {"inputs": 8}}, "exactly 'inputs' and 'targets'"),
        ({"lables": []}, "lables"),
        ({"name": "x_label"}, "not ending in"),
    ],
)
def test_a_definition_that_does_not_fit_is_named(changes, message, tmp_path):
    definition = plan_of(tmp_path, ROWS, label_column="team").dataset.definition or {}
    (tmp_path / dataset_folder.FILE).write_text(json.dumps({**definition, **changes}))
    with pytest.raises(ValueError, match=f"dataset.json: .*{message}"):
        dataset_folder.read(tmp_path)


PRICES = [{"text": f"How much are {number} roses?", "price": f"{3 * number}.50 euros"} for number in range(1, 31)]


def test_free_answers_are_graded_by_named_metrics(tmp_path):
    plan = plan_of(tmp_path, PRICES, label_column="price", metric="numeric_accuracy")
    definition = {**(plan.dataset.definition or {}), "tolerance": 1.0, "metrics": ["rouge_l"]}
    dataset = dataset_folder.of(definition, where="here")
    assert dataset.definition == definition  # and of a run's manifest comes back as it was
    assert plan.dataset.labels is None
    assert "answers: free text, graded by numeric_accuracy" in plan.lines
    found = [metric(["3.50 euros"] * 2, ["It is 4.5", "5 euros"]) for metric in dataset.metric_fns]
    assert found == [{"numeric_accuracy": 50.0}, {"rouge_l": 20.0}]
    assert dataset.same_label("3.50 euros", "4.5")
    assert not dataset.same_label("3.50 euros", "4.51")
    with pytest.raises(ValueError, match=r"--metric is 'rouge'; .* Did you mean 'rouge_l'"):
        plan_of(tmp_path, PRICES, label_column="price", metric="rouge")
    with pytest.raises(ValueError, match=r"train row \d+: \"?'?a few.* is_number\(\) rejects it"):
        plan_of(
            tmp_path, [*PRICES, {"text": "And two?", "price": "a few"}], label_column="price", metric="numeric_accuracy"
        )
    texts = dataset_folder.of({**(plan.dataset.definition or {}), "metric": "rouge_l"}, where="here")
    assert texts.same_label("Three Euros.", "three euros")
    assert [next(iter(metric(["a"], ["a"]))) for metric in texts.metric_fns] == ["rouge_l", "normalized_accuracy"]


def test_a_definition_of_an_earlier_version_is_described_as_it_was(tmp_path):
    definition = plan_of(tmp_path, ROWS, label_column="team").dataset.definition or {}
    assert not {"metrics", "tolerance", "relative_tolerance"} & definition.keys()


def test_from_a_csv_to_a_served_student(tmp_path, monkeypatch, capsys):
    """The commands that `sbs init` prints, with a teacher over loopback and a few updates; then without the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    Path("garden.csv").write_text(csv_of(ROWS))
    assert main.main(["init", "garden.csv", "--label", "team"]) == 0
    assert "sbs teach --dataset garden --provider openai" in capsys.readouterr().out
    assert main.main(["init", "garden.csv", "--label", "team"]) == 1
    assert "garden exists already" in capsys.readouterr().err

    def answer(prompt):
        topic = next(topic for topic, words in TOPICS.items() if any(word in prompt[-1]["content"] for word in words))
        return f"It is about {topic}. So the answer is {topic}."

    before = registry.options()
    with teacher_server.served(answer=answer) as server:
        teach = ["teach", "--dataset", "garden", "--provider", "openai", "--model", "m", "--base_url", server.openai]
        assert main.main(teach) == 0
    assert (
        'next: sbs train --gin_file=garden/laptop.gin --gin.TASK_FEATURE_LENGTHS=\'{"inputs": 56, "targets": 40}\' '
        "--gin.MAX_DECODE_LENGTH=7 --gin.MODEL_DIR=runs/garden\n"
    ) in capsys.readouterr().err
    taught = records.read_records("garden/records/garden/train.jsonl")
    assert [(row.label, row.rationale) for row in taught] == [
        (row.label, f"It is about {row.label}.") for row in taught
    ]
    small = [
        "--gin.TRAIN_STEPS=3",
        "--gin.WARMUP_STEPS=1",
        "--gin.EXAMPLES=4",
        "--gin.EVAL_BATCH_SIZE=8",
        '--gin.TASK_FEATURE_LENGTHS={"inputs": 72, "targets": 32}',
        "--gin.t5.T5Config.num_encoder_layers=1",
        "--gin.t5.T5Config.emb_dim=16",
    ]
    assert main.main(["train", "--gin_file=garden/laptop.gin", "--gin.MODEL_DIR=runs/garden", *small]) == 0
    capsys.readouterr()
    assert main.main(["baseline", "--dataset", "garden"]) == 0
    assert re.search(r"a linear model of words +100.0 %", capsys.readouterr().out)  # the words tell the topic
    # The run alone: it has been moved, and its dataset is known from its manifest.
    shutil.rmtree("garden")
    shutil.move("runs/garden", tmp_path / "moved")
    catalogue._DATASETS.pop("garden")
    Path("in.jsonl").write_text('{"id": "1", "input": "My rose: bugs, what now?"}\n')
    predict = ["predict", "moved", "--input", "in.jsonl", "--output", "out.jsonl", "--decoding", "choices"]
    assert main.main([*predict, "--batch_size", "1"]) == 0
    (row,) = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert row["prediction"] in TOPICS
    catalogue._DATASETS.pop("garden")
    registry.configure(before)


@pytest.mark.parametrize(("hardware", "parts", "sharded"), [(None, 1, 1), ("one_gpu", 4, 1), ("tpu_host", 1, -1)])
def test_t5_base_starts_from_the_hub_and_takes_a_file_for_the_machine(hardware, parts, sharded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, ROWS, label_column="team")
    own_data.write(plan, Path("tickets"), gin=own_experiments.of(plan, Path("tickets")))
    files = ["tickets/t5_base.gin", *([f"gin_configs/hardware/{hardware}.gin"] if hardware else [])]
    config, _ = gin_files.configure("train.TrainConfig", gin_files=files, bindings=["MODEL_DIR=run"])
    assert config.initial_checkpoint_path == config.data.vocabulary == "google/t5-v1_1-base"
    assert (config.micro_batches, config.layout.fsdp) == (parts, sharded)
    assert config.model.dtype == ("bfloat16" if hardware else "float32")


def test_rows_of_the_inputs_are_records(tmp_path):
    """So standard fine-tuning needs no teacher: RECORDS_DIR may be the folder's inputs."""
    plan = plan_of(tmp_path, ROWS, label_column="team")
    own_data.write(plan, tmp_path / "tickets", gin={})
    found = release.read_unanswered(plan.dataset, inputs_dir=tmp_path / "tickets" / "inputs", inputs="records")
    assert {split: list(source.rows) for split, source in found.items()} == plan.splits
