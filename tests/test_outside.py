"""Tasks and mixtures that others registered in SeqIO: every kind of source, read as SeqIO does, and trained on."""

import functools
import itertools
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
import toy

from sbs_jax.cli import main
from sbs_jax.data import batches, dataset_module, outside, registry, task_names
from sbs_jax.run import directory
from sbs_jax.training import loop

ROWS = 30
LENGTHS = {"inputs": 24, "targets": 16}
BYTES = seqio.ByteVocabulary()
FEATURES = {name: seqio.Feature(vocabulary=BYTES, add_eos=True) for name in LENGTHS}
FINISH = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]


def texts(split: str, number: int) -> tuple[str, str]:
    a, b = number % 7, (number * (3 if split == "train" else 5)) % 9
    return f"{a} and {b}?", f"{a + b}"


def as_features(row: tf.Tensor) -> dict[str, tf.Tensor]:
    parts = tf.strings.split(row, "\t")
    return {"inputs": parts[0], "targets": parts[1]}


def exact(targets: list[str], predictions: list[str]) -> dict[str, float]:
    return {"right": 100 * float(np.mean([a == b for a, b in zip(targets, predictions, strict=True)])), "count": 1.0}


def generated(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    rows = ["\t".join(texts(split, number)) for number in range(ROWS)]
    return tf.data.Dataset.from_tensor_slices(rows).map(as_features)


def text_lines(folder: Path) -> seqio.DataSource:
    for split in ("train", "validation"):
        for part in range(2):
            lines = ["\t".join(texts(split, number)) for number in range(part, ROWS, 2)]
            (folder / f"{split}-{part}.tsv").write_text("\n".join(lines))
    return seqio.TextLineDataSource({split: f"{folder}/{split}-*.tsv" for split in ("train", "validation")})


def tf_examples(folder: Path) -> seqio.DataSource:
    for split in ("train", "validation"):
        with tf.io.TFRecordWriter(f"{folder}/{split}.tfrecord") as file:
            for number in range(ROWS):
                values = dict(zip(LENGTHS, (text.encode() for text in texts(split, number)), strict=True))
                feature = {
                    name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                    for name, value in values.items()
                }
                file.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    return seqio.TFExampleDataSource(
        {split: f"{folder}/{split}.tfrecord" for split in ("train", "validation")},
        feature_description={name: tf.io.FixedLenFeature([], tf.string) for name in LENGTHS},
    )


def tfds_source(folder: Path) -> seqio.DataSource:
    rows = {
        split: [dict(zip(LENGTHS, texts(split, number), strict=True)) for number in range(ROWS)]
        for split in ("train", "validation")
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="sums",
        version="1.0.0",
        data_dir=folder,
        features=tfds.features.FeaturesDict(dict.fromkeys(LENGTHS, tfds.features.Text())),
        split_datasets={
            split: tf.data.Dataset.from_generator(
                functools.partial(iter, found), output_signature=dict.fromkeys(LENGTHS, tf.TensorSpec([], tf.string))
            )
            for split, found in rows.items()
        },
    )
    return seqio.TfdsDataSource(tfds_name="sums:1.0.0", tfds_data_dir=str(folder))


SOURCES = {
    "lines": (text_lines, [lambda rows: rows.map(as_features)]),
    "examples": (tf_examples, []),
    "tfds": (tfds_source, []),
    "function": (lambda _: seqio.FunctionDataSource(generated, splits=("train", "validation")), []),
}


def add(name: str, source: Any, before: list[Any], **changes: Any) -> str:
    seqio.TaskRegistry.remove(name)
    defaults = {"preprocessors": [*before, *FINISH], "output_features": FEATURES, "metric_fns": [exact]}
    seqio.TaskRegistry.add(name, source, **{**defaults, **changes})
    return name


@pytest.fixture(autouse=True)
def configured(tmp_path: Path):
    options = toy.options(tmp_path)
    registry.configure(options)
    outside.dataset.cache_clear()
    yield options
    seqio.set_global_cache_dirs([])
    for name in [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]:
        if name.startswith("out_"):
            seqio.MixtureRegistry.remove(name)
            seqio.TaskRegistry.remove(name)


@pytest.fixture
def sums() -> str:
    return add("out_function", *(SOURCES["function"][0](Path()), []))


# ---------------------------------------------------------------------- rows and batches as SeqIO's


def epoch(name: str, *, pack: bool, count: int, **changes: Any) -> list[dict[str, np.ndarray]]:
    arguments = {"lengths": LENGTHS, "split": "train", "batch_size": 5, "seed": 0, "skip_batches": 0, **changes}
    return list(itertools.islice(batches.train_dataset(name, pack=pack, **arguments), count))


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_of_every_source_are_those_of_seqio(tmp_path, kind):
    make, before = SOURCES[kind]
    name = add(f"out_{kind}", make(tmp_path), before)
    ours = epoch(name, pack=False, count=ROWS // 5)
    dataset = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, split="train", shuffle=False)
    theirs = seqio.EncDecFeatureConverter(pack=False)(dataset, LENGTHS).as_numpy_iterator()

    def rows(found: Any) -> Counter[bytes]:
        return Counter(b"".join(np.asarray(row[name], np.int32).tobytes() for name in sorted(row)) for row in found)

    features = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    mine = [{name: batch[name][row] for name in features} for batch in ours for row in range(5)]
    assert rows(mine) == rows(theirs)


def test_packed_rows_are_those_of_seqio_in_our_order(tmp_path, sums):
    lengths = {"inputs": 40, "targets": 12}
    ours = epoch(sums, pack=True, count=2, lengths=lengths)
    examples = [
        example
        for number in range(2)
        for example in batches.batch_examples(
            sums, lengths=lengths, split="train", batch_size=5, pack=True, seed=0, batch=number
        )[0]
    ]
    tables = outside.rows(sums, "train", lengths=lengths, options=registry.options()).tables
    order = [int(example.id.removeprefix("train-")) for example in examples]
    dataset = tf.data.Dataset.from_generator(
        lambda: ({name: tables[name].row(row, length=lengths[name]) for name in lengths} for row in order),
        output_signature=dict.fromkeys(lengths, tf.TensorSpec([None], tf.int32)),
    )
    theirs = list(seqio.EncDecFeatureConverter(pack=True)(dataset, lengths).as_numpy_iterator())
    assert len(theirs) == 10
    for number, row in enumerate(theirs):
        for name, array in row.items():
            np.testing.assert_array_equal(ours[number // 5][name][number % 5], array, err_msg=name)


def test_a_mixture_has_its_own_rates_and_one_loss(tmp_path, sums):
    other = add("out_other", SOURCES["function"][0](Path()), [])
    seqio.MixtureRegistry.add("out_both", [(sums, 3.0), (other, 1.0)])
    assert task_names.parts("out_both") == (sums, other)
    assert [each.name for each in task_names.objectives("out_both", alpha=0.5)] == ["targets"]
    found, arrays = batches.batch_examples(
        "out_both", lengths=LENGTHS, split="train", batch_size=40, pack=False, seed=0, batch=0
    )
    assert Counter(example.task for example in found) == {sums: 30, other: 10}
    assert set(np.unique(arrays["decoder_task_ids"])) == {0, 1}
    weights = {sums: 0.5, other: 2.0}
    assert [each.weight for each in task_names.objectives("out_both", alpha=0.5, weights=weights)] == [0.5, 2.0]
    assert task_names.task_ids("out_both", weights=weights) == (1, 2)


def test_cached_tasks_are_read_from_their_cache(tmp_path, sums):
    """As `seqio_cache_tasks` leaves them: TFRecords of tokens with their statistics."""
    steps = [FINISH[0], seqio.CacheDatasetPlaceholder(), FINISH[1]]
    name = add("out_cached", SOURCES["function"][0](Path()), [], preprocessors=steps)
    folder = tmp_path / "cache" / name
    folder.mkdir(parents=True)
    with tf.io.TFRecordWriter(f"{folder}/train.tfrecord-00000-of-00001") as file:
        for number in range(4):
            feature = {
                feature: tf.train.Feature(int64_list=tf.train.Int64List(value=[50 + number, 60])) for feature in LENGTHS
            }
            file.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    info = {"num_shards": 1, "features": {name: {"shape": [None], "dtype": "int32"} for name in LENGTHS}}
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text('{"examples": 4}')
    (folder / "COMPLETED").touch()
    seqio.add_global_cache_dirs([str(tmp_path / "cache")])
    found = outside.rows(name, "train", lengths=LENGTHS, options=registry.options()).tables["targets"]
    assert [found.row(row, length=9).tolist() for row in range(4)] == [[50 + row, 60, 1] for row in range(4)]


def test_validation_is_held_out_from_training_if_the_task_has_none(sums):
    name = add("out_alone", seqio.FunctionDataSource(generated, splits=("train",)), [])
    rows = {
        split: outside.rows(name, split, lengths=LENGTHS, options=registry.options())
        for split in ("train", "validation")
    }
    assert {split: len(found) for split, found in rows.items()} == {"train": 27, "validation": 3}
    whole = outside.rows(sums, "train", lengths=LENGTHS, options=registry.options())
    together = [
        tuple(found.tables["inputs"].row(row, length=99)) for found in rows.values() for row in range(len(found))
    ]
    everything = [tuple(whole.tables["inputs"].row(row, length=99)) for row in range(len(whole))]
    assert Counter(together) == Counter(everything)


# -------------------------------------------------------------------------------- what cannot be


def broken(**features: Any) -> str:
    return add("out_bad", SOURCES["function"][0](Path()), [], output_features=features)


def bad_rows(rows: list[str], **changes: Any) -> str:
    def source(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=tf.TensorSpec([], tf.string))

    split = [lambda found: found.map(as_features)]
    return add("out_bad", seqio.FunctionDataSource(source, splits=("train",)), split, **changes)


def failing() -> str:
    def rows():
        yield "1\t2"
        yield "3\t4"
        raise OSError("the disk is gone")

    def source(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_generator(rows, output_signature=tf.TensorSpec([], tf.string))

    return add("out_bad", seqio.FunctionDataSource(source, splits=("train",)), [lambda found: found.map(as_features)])


BAD = {
    "no inputs": (lambda: broken(targets=FEATURES["targets"]), r"has the features \['targets'\]; expected inputs and"),
    "floats": (
        lambda: broken(inputs=seqio.Feature(BYTES, dtype=tf.float32), targets=FEATURES["targets"]),
        r"feature inputs of out_bad is float32 of rank 1; expected a sequence of integer",
    ),
    "another vocabulary": (
        lambda: broken(inputs=seqio.Feature(seqio.PassThroughVocabulary(9)), targets=FEATURES["targets"]),
        r"feature inputs of out_bad has the vocabulary PassThrough.*VOCABULARY is 'byte'",
    ),
    "no rows": (lambda: bad_rows([]), r"out_bad, train: the split is empty"),
    "a stream that breaks off": (failing, r"out_bad, train, row 2: its source or a preprocessor failed.*disk is gone"),
}


@pytest.mark.parametrize("kind", BAD)
def test_tasks_that_cannot_be_trained_are_named(kind):
    make, message = BAD[kind]
    name = make()
    with pytest.raises(ValueError, match=message):
        outside.rows(name, "train", lengths=LENGTHS, options=registry.options())


def test_a_row_without_tokens_is_named(sums):
    features = {feature: seqio.Feature(vocabulary=BYTES, add_eos=False) for feature in LENGTHS}
    name = bad_rows(["1\t2", "3\t4", "5\t", "6\t7"], output_features=features)
    with pytest.raises(ValueError, match=r"out_bad, train, row 2: targets has no token; expected ids above 0"):
        outside.rows(name, "train", lengths=LENGTHS, options=registry.options())


def test_a_rate_of_zero_is_named(sums):
    seqio.MixtureRegistry.add("out_none", [(sums, 0.0)])
    other = add("out_other", SOURCES["function"][0](Path()), [])
    seqio.MixtureRegistry.add("out_zero", [(sums, 0.0), (other, 1.0)])
    with pytest.raises(ValueError, match=r"The rate of out_function in out_zero is 0.0; expected"):
        epoch("out_zero", pack=False, count=1)


def test_only_so_many_rows_are_read(tmp_path, sums):
    registry.configure(toy.options(tmp_path, read_rows=7))
    assert len(outside.rows(sums, "train", lengths=LENGTHS, options=registry.options())) == 7


# --------------------------------------------------------------------------------- the whole path


def test_a_student_learns_a_task_from_outside(tmp_path, sums, monkeypatch):
    """And a resumed run takes its rows from its own folder."""
    config = toy.config(
        tmp_path / "run", tmp_path, mixture_or_task_name=sums, task_feature_lengths=LENGTHS, alpha=1.0,
        evaluate_test=False,
    )  # fmt: skip
    result = loop.train(config, config_text="")
    assert {"loss/targets", "token_accuracy/targets", "tokens/targets"} <= set(result["train"])
    assert result["validation"]["score"] == result["validation"]["right"]
    assert directory.read_scores(config.model_dir) == {
        line["step"]: line["score"] for line in directory.read_metrics(config.model_dir) if line["kind"] == "validation"
    }
    read: list[str] = []
    original = outside._read_now
    monkeypatch.setattr(
        outside, "_read_now", lambda task, split, **options: (read.append(split), original(task, split, **options))[1]
    )
    assert loop.train(config, config_text="") == result
    assert set(read) == {"validation"}
    assert main.main(["evaluate", config.model_dir, "--split", "validation", "--batch_size", "8"]) == 0
    asked = tmp_path / "in.jsonl"
    asked.write_text('{"id": "1", "input": "3 and 4?"}\n')
    predict = ["predict", config.model_dir, "--input", str(asked), "--output", str(tmp_path / "o.jsonl")]
    assert main.main([*predict, "--batch_size", "1"]) == 0
    (file,) = Path(config.model_dir, "predictions").glob("*-6.jsonl")
    graded = [json.loads(line) for line in file.read_text().splitlines()]
    assert (graded[0]["id"], graded[0]["input"]) == ("validation-0", texts("validation", 0)[0])


CACHED = """
import seqio
import tensorflow as tf

def split_line(lines):
    return lines.map(lambda line: dict(zip(("inputs", "targets"), tf.unstack(tf.strings.split(line, "\\t"), num=2))))

add_eos = seqio.preprocessors.append_eos_after_trim
seqio.TaskRegistry.add(
    "out_sums",
    source=seqio.TextLineDataSource({split: f"{split}.tsv" for split in ("train", "validation")}),
    preprocessors=[split_line, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), add_eos],
    output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary(), add_eos=True)),
)
"""


def write_cache(folder: Path, name: str) -> None:
    """Writes what SeqIO's Beam job writes of a task (version 0.0.20), in the order of its source and one shard."""
    task = seqio.TaskRegistry.get(name)
    (folder / name).mkdir(parents=True)
    for split in task.splits:
        rows = task.preprocess_precache(task.source.get_dataset(split=split, shuffle=False), seed=0)
        with tf.io.TFRecordWriter(f"{folder / name / split}.tfrecord-00000-of-00001") as file:
            found = list(rows.as_numpy_iterator())
            for row in found:
                file.write(seqio.dict_to_tfexample(row).SerializeToString())
        features = {
            feature: {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}
            for feature, spec in sorted(rows.element_spec.items())
        }
        info = {"features": features, "num_shards": 1, "seqio_version": "0.0.20"}
        (folder / name / f"info.{split}.json").write_text(json.dumps(info, sort_keys=True, indent=2))
        stats: dict[str, int] = {"examples": len(found)}
        for feature in LENGTHS:
            stats[f"{feature}_tokens"] = sum(len(row[feature]) for row in found)
            stats[f"{feature}_max_tokens"] = max(len(row[feature]) for row in found)
        (folder / name / f"stats.{split}.json").write_text(json.dumps(stats, sort_keys=True, indent=2))
    (folder / name / "COMPLETED").write_text("tfrecord")


def test_sbs_train_reads_a_cache_of_seqio_s_own_job(configured, tmp_path, monkeypatch, caplog):
    """Its rows are those of the task without a cache, to the last bit, also where the source of the task is gone."""
    monkeypatch.setattr(dataset_module, "_loaded", {})
    monkeypatch.chdir(tmp_path)
    Path("plain.py").write_text(CACHED)
    Path("cached.py").write_text(f'{CACHED}\nseqio.add_global_cache_dirs(["{tmp_path}/cache"])\n')
    for split in ("train", "validation"):
        Path(f"{split}.tsv").write_text("\n".join("\t".join(texts(split, number)) for number in range(ROWS)))
    dataset_module.load("plain.py")
    want = {
        split: outside.rows("out_sums", split, lengths=LENGTHS, options=configured) for split in ("train", "validation")
    }
    write_cache(tmp_path / "cache", "out_sums")
    seqio.TaskRegistry.remove("out_sums")
    outside.forget()
    for split in want:
        Path(f"{split}.tsv").unlink()

    files = ("runs/seqio.gin", "models/t5_1_1_mini.gin")
    flags = [f"--gin_file={Path(__file__).parents[1]}/gin_configs/{name}" for name in files]
    macros = {"MIXTURE_OR_TASK_NAME": "out_sums", "VOCABULARY": "byte", "VOCAB_SIZE": 384, "MAX_DECODE_LENGTH": 8}
    macros |= {"TRAIN_STEPS": 2, "EXAMPLES": 8, "EVAL_BATCH_SIZE": 8, "TASK_FEATURE_LENGTHS": LENGTHS}
    small = {"emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 16, "num_encoder_layers": 1}
    macros |= {f"t5.T5Config.{name}": value for name, value in small.items()}
    flags += [f"--gin.{name}={value}" for name, value in macros.items()]
    assert main.main(["train", "--module=cached.py", "--run=run", *flags]) == 0
    assert f"out_sums, train: read {ROWS} rows from the cache {tmp_path}/cache/out_sums." in caplog.text
    splits = directory.read_manifest("run")["data"]["splits"]
    assert {split: splits[split]["sha256"] for split in want} == {split: rows.sha256() for split, rows in want.items()}
    (file,) = Path("run/rows").iterdir()
    with np.load(file) as arrays:
        for name, table in want["train"].tables.items():
            np.testing.assert_array_equal(arrays[f"{name} ids"], table.ids)
            np.testing.assert_array_equal(arrays[f"{name} starts"], table.starts)


PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "seqio.md").read_text("utf-8")


QUICK = {
    "train": [
        *("--gin.TRAIN_STEPS=4", "--gin.EXAMPLES=8", "--gin.EVAL_BATCH_SIZE=8"),
        *("--gin.t5.T5Config.num_encoder_layers=1", "--gin.t5.T5Config.emb_dim=16"),
    ],
    "evaluate": ["--batch_size=8"],
    "predict": ["--batch_size=1"],
}


def test_the_task_file_of_the_page_becomes_a_student(tmp_path, monkeypatch, capsys):
    """By the page's own commands, with fewer steps of a smaller student."""
    monkeypatch.setattr(dataset_module, "_loaded", {})
    (source,) = re.findall(r'```python title="my_tasks.py"\n(.*?)```', PAGE, re.DOTALL)
    shown = re.findall(r"^sbs ((?:.*\\\n)*.*)", PAGE, re.MULTILINE)
    commands = [shlex.split(line.replace("\\\n", " ")) for line in shown if "runs/sums" in line]
    monkeypatch.chdir(tmp_path)
    Path("my_tasks.py").write_text(source)
    for split, rows in (("train", 60), ("validation", 6)):
        Path(f"sums_{split}.tsv").write_text("".join(f"{n} and {n % 7}?\t{n + n % 7}\n" for n in range(rows)))
    Path("questions.jsonl").write_text('{"id": "1", "input": "2 and 3?"}\n')
    before = registry.options()
    for command in commands:
        assert main.main(command + QUICK[command[0]]) == 0, capsys.readouterr().err
    assert {command[0] for command in commands} == {"train", "evaluate", "predict"}
    assert json.loads(Path("answers.jsonl").read_text())["id"] == "1"
    assert directory.read_manifest("runs/sums")["data"]["module"]["file"] == "my_tasks.py"
    registry.configure(before)
    for registered in ("sums", "products", "arithmetic"):
        seqio.MixtureRegistry.remove(registered)
        seqio.TaskRegistry.remove(registered)
