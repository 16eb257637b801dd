"""Pre-training: texts read, spans corrupted as T5 does, runs graded by loss, resumed and fine-tuned."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import seqio
import toy

from sbs_jax.cli import main
from sbs_jax.data import batches, corpus, features, registry, selection, tokens
from sbs_jax.hosts import preemption
from sbs_jax.run import directory
from sbs_jax.training import gin_files, loop

LENGTHS = {"inputs": 40, "targets": 12}
DENSITY = {"density": 0.15, "mean": 3.0}
WORDS = ["a cat sat", "a dog ran", "the sun set", "it was late", "no one spoke"]


def write(folder, *, lines=400, name="text.txt"):
    random = np.random.default_rng(0)
    file = folder / name
    file.write_text("".join(f"{number} {'. '.join(random.permutation(WORDS))}\n\n" for number in range(lines)))
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus"))


def options(*files, **changes):
    given = {"records_dir": "none", "vocabulary": "byte", "corpus": [str(file) for file in files]} | changes
    return selection.DataOptions(**given)


# ------------------------------------------------------------------------------------- texts


def test_texts_of_lines_and_of_json_packed_or_not(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\n  Two \r\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('"Three\\nfour."\n\n{"text": "Five."}\n{"id": "x", "input": "Six?", "label": "6"}\n')
    found = [list(corpus.texts(tmp_path / name)) for name in ("a.txt", "b.jsonl.gz")]
    assert found == [["One.", "Two"], ["Three\nfour.", "Five.", "Six?"]]


def test_every_token_is_in_one_split_once_and_neighbours_are_held_out_together(text):
    vocabulary = tokens.vocabulary("byte")
    found = corpus.read(options(text, validation_fraction=0.1), vocabulary)
    lines = list(corpus.texts(text))
    decoded = {
        split: [vocabulary.decode(table.row(i, length=1000).tolist()) for i in range(len(table))]
        for split, table in found.items()
    }
    assert len(decoded["validation"]) == 40
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(lines)
    assert corpus.counts(found["train"], vocabulary)["unknown"] == 0
    numbers = [int(line.split()[0]) for line in decoded["validation"]]
    assert np.sum(np.diff(numbers) > 1) < 10  # blocks of 4
    whole = corpus.read(options(text, validation_fraction=0), vocabulary)
    assert len(whole["train"]) == 400


@pytest.mark.parametrize(
    ("name", "contents", "match"),
    [
        ("empty.txt", b" \n", "has no text"),
        ("binary.txt", b"abc\n\0\0\1\n", "zero byte"),
        ("latin.txt", b"caf\xe9\n", "UTF-8"),
        ("list.jsonl", b'["a"]\n', "expected a JSON text"),
        ("cut.jsonl", b'"abc\n', "not valid JSON"),
        ("zip.txt", b"PK\x03\x04aa", "zip archive"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, contents, match):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=match):
        corpus.read(options(tmp_path / name), tokens.vocabulary("byte"))


def test_options_of_records_are_refused(text):
    with pytest.raises(ValueError, match="FRACTION is 0"):
        corpus.read(options(text, fraction=0.5), tokens.vocabulary("byte"))
    with pytest.raises(ValueError, match="CORPUS="):
        corpus.read(options(), tokens.vocabulary("byte"))


# -------------------------------------------------------------------------------- corruption


def test_the_numbers_are_t5s():
    spans = corpus.Spans.fitting({"inputs": 512, "targets": 114}, **DENSITY)
    assert spans == corpus.Spans(568, 85, 28)  # t5.data.preprocessors.random_spans_helper
    assert spans.lengths == {"inputs": 512, "targets": 114}
    assert corpus.Spans.fitting({"inputs": 3, "targets": 3}, **DENSITY).tokens == 2


def test_rows_that_fit_no_span_or_need_more_sentinels_are_refused():
    with pytest.raises(ValueError, match="too short"):
        corpus.Spans.fitting({"inputs": 2, "targets": 30}, **DENSITY)
    with pytest.raises(ValueError, match="100 sentinels"):
        corpus.Spans.fitting({"inputs": 2048, "targets": 512}, **DENSITY)


def test_inputs_and_targets_together_are_the_tokens():
    spans, sentinel = corpus.Spans.fitting(LENGTHS, **DENSITY), 358
    count = 10_000
    ids = np.arange(count * spans.tokens).reshape(count, -1) % 250 + 3
    found = spans.corrupt(ids, np.random.default_rng(0).random((count, spans.tokens - 2)), sentinel=sentinel)
    noise = []
    for row, inputs, targets in zip(ids, found["inputs"], found["targets"], strict=True):
        assert [len(inputs), len(targets)] == list(spans.lengths.values())
        assert inputs[-1] == targets[-1] == tokens.EOS_ID
        masked = np.split(targets[:-1], np.flatnonzero(targets[:-1] > sentinel - spans.count))[1:]
        assert [each[0] for each in masked] == [sentinel - number for number in range(spans.count)]
        whole = []
        for token in inputs[:-1]:
            whole += masked[sentinel - token][1:].tolist() if token > sentinel - spans.count else [token]
        assert whole == row.tolist()
        noise.append([len(each) - 1 for each in masked])
    assert np.all(np.sum(noise, axis=1) == spans.noise)
    assert len({tuple(each) for each in noise}) > 5


def test_spans_are_divided_evenly_at_random():
    """Every division of 6 items into 3 parts is equally likely, as in T5."""
    found = corpus._segments(np.random.default_rng(0).random((20_000, 5)), 3)
    assert np.all(found.sum(axis=1) == 6)
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 10
    assert np.all(np.abs(counts - 2000) < 200)


def rows(seed, *, skip=0, count=40, mine=None):
    stream = batches.train_dataset(
        corpus.TASK, lengths=LENGTHS, split="train", batch_size=16, pack=False, seed=seed, skip_batches=skip, rows=mine
    )
    return [next(stream)["encoder_input_tokens"] for _ in range(count)]


def test_corruption_is_new_each_epoch_and_fixed_by_seed_epoch_and_row(text):
    registry.configure(options(text))
    examples = batches.count_truncated(corpus.TASK, "train", LENGTHS)[corpus.TASK]
    assert examples["inputs longest"] == LENGTHS["inputs"]
    epochs = 3
    count = -(-epochs * examples["rows"] // 16)
    found = rows(1, count=count)
    assert all(np.array_equal(a, b) for a, b in zip(found[30:], rows(1, skip=30, count=count - 30), strict=True))
    assert np.array_equal(found[5][[3, 9]], rows(1, skip=5, count=1, mine=[3, 9])[0])
    assert not np.array_equal(found[0], rows(2, count=1)[0])
    # Hardly a row of three epochs occurs twice.
    everything = np.concatenate(found)[: epochs * examples["rows"]]
    assert len(np.unique(everything, axis=0)) > 0.98 * len(everything)
    assert np.all(everything != 0)  # no padding
    held_out = batches.eval_features(corpus.TASK, split="validation", lengths=LENGTHS)
    again = batches.eval_features(corpus.TASK, split="validation", lengths=LENGTHS)
    assert all(np.array_equal(held_out[name], again[name]) for name in held_out)


def test_seqio_has_the_task_with_the_same_features(tmp_path):
    registry.configure(options(write(tmp_path, lines=60)))
    task = seqio.get_mixture_or_task(corpus.TASK)
    spans = corpus.Spans.fitting(LENGTHS, **DENSITY)
    lengths = {**LENGTHS, "task_ids": LENGTHS["targets"]}
    made = [
        list(task.get_dataset(lengths, "train", shuffle=True, seed=seed, num_epochs=2).as_numpy_iterator())
        for seed in (0, 0, 1)
    ]
    assert len(made[0]) == 2 * batches.count_truncated(corpus.TASK, "train", LENGTHS)[corpus.TASK]["rows"]
    for row in made[0]:
        assert {name: len(row[name]) for name in LENGTHS} == spans.lengths
        assert np.sum(row["inputs"] > 258) == np.sum(row["targets"] > 258) == spans.count
        assert np.all(row["task_ids"] == 1)
    inputs = [np.stack([row["inputs"] for row in each]) for each in made]
    assert np.array_equal(inputs[0], inputs[1])
    assert not np.array_equal(inputs[0], inputs[2])
    assert len(np.unique(inputs[0], axis=0)) > 0.98 * len(inputs[0])  # the second epoch is corrupted anew
    converted = batches.StepByStepFeatureConverter(pack=False)(task.get_dataset(lengths, "train"), lengths)
    assert set(next(converted.as_numpy_iterator())) == set(features.shapes(LENGTHS, batch_size=1, pack=False))


# ---------------------------------------------------------------------------------- training


def config(text, run, **changes):
    model = {f"t5.T5Config.{name}": value for name, value in dataclasses.asdict(toy.MODEL).items()}
    bindings = {
        "CORPUS": text,
        "MODEL_DIR": run,
        "VOCABULARY": "byte",
        "MODEL": "@t5.T5Config()",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "EXAMPLES": 8,
        "TRAIN_STEPS": 20,
        "WARMUP_STEPS": 2,
        "EVAL_PERIOD": 10,
        "CHECKPOINT_PERIOD": 5,
        "LOG_PERIOD": 5,
        **model | {"t5.T5Config.dropout_rate": "%DROPOUT_RATE", "DROPOUT_RATE": 0.1},
        **changes,
    }
    given = [f"{name}={value}" for name, value in bindings.items()]
    return gin_files.configure("train.TrainConfig", gin_files=["gin_configs/runs/pretrain.gin"], bindings=given)


def run_of(*arguments, **changes):
    configured, as_text = config(*arguments, **changes)
    return loop.train(configured, config_text=as_text)


@pytest.fixture(scope="module")
def pretrained(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("pretrained") / "run"
    return run, run_of(text, run)


def test_a_preempted_pretraining_ends_bit_for_bit_as_an_uninterrupted_one(pretrained, text, tmp_path, monkeypatch):
    run, result = pretrained
    asked = iter(range(100))
    monkeypatch.setattr(loop.hosts, "preemption_requested", lambda: next(asked) == 12)
    with pytest.raises(preemption.PreemptedError):
        run_of(text, tmp_path / "run")
    monkeypatch.undo()
    resumed = run_of(text, tmp_path / "run")
    assert resumed["validation"] == result["validation"]
    lines = [[line["loss"] for line in directory.read_metrics(each)] for each in (run, tmp_path / "run")]
    assert lines[0] == lines[1]
    assert result["validation"]["loss"] < 5.5 < lines[0][0] + 1
    assert set(result["validation"]) == {"step", "loss", "token_accuracy"}
    assert not list((run / "predictions").glob("*"))


def test_a_fine_tuning_starts_from_the_pretrained_checkpoint(pretrained, tmp_path):
    run, _ = pretrained
    records_dir = toy.write_records(tmp_path / "records")
    started = toy.config(tmp_path / "run", records_dir, initial_checkpoint_path=str(run), train_steps=1)
    assert loop.train(started, config_text="")["test"]["step"] == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"CORPUS": "none.txt"}, "none.txt"),
        ({"EVALUATE_TEST": True}, "no test split"),
        ({"VALIDATION_FRACTION": 0}, "no validation split"),
        ({"TASK_FEATURE_LENGTHS": "{'inputs': 2, 'targets': 2}"}, "too short"),
        ({"TASK_FEATURE_LENGTHS": "{'inputs': 4000, 'targets': 4000}"}, "100 sentinels"),
        ({"TASK_FEATURE_LENGTHS": "{'inputs': 300, 'targets': 150}", "VALIDATION_FRACTION": 0.005}, "less than a row"),
        ({"NOISE_DENSITY": 1.5}, "noise_density"),
        ({"MEAN_SPAN": 0.5}, "mean_span"),
    ],
)
def test_impossible_pretrainings_fail_before_a_directory_is_made(text, tmp_path, changes, match):
    with pytest.raises((ValueError, OSError, gin_files.UsageError), match=match):
        run_of(text, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_examples_of_a_batch_have_names(text):
    registry.configure(options(text))
    given = {"lengths": LENGTHS, "split": "train", "batch_size": 4, "pack": False, "seed": 0}
    found, features = batches.batch_examples(corpus.TASK, batch=3, **given)
    assert all(example.id.startswith("train-") for example in found)
    batch = next(batches.train_dataset(corpus.TASK, skip_batches=3, **given))
    assert all(np.array_equal(features[name], batch[name]) for name in batch)


# ---------------------------------------------------------------------------------- afterwards


def test_evaluate_grades_it_by_loss_as_its_run_did(pretrained, tmp_path, capsys):
    run, result = pretrained
    flags = ["evaluate", "--gin_file=gin_configs/runs/evaluate.gin", f"--gin.CHECKPOINT_PATH={run}/checkpoints/20"]
    assert main.main([*flags, "--gin.SPLIT=validation", f"--gin.EVAL_OUTPUT_DIR={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-6)
    assert found["token_accuracy"] == result["validation"]["token_accuracy"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["metrics.json"]
    capsys.readouterr()
    assert main.main(flags) == 1
    assert "A corpus has no test split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["predict", "RUN", "--input", "IN", "--output", "OUT"], "answers no questions"),
        (["rationales", "RUN"], "answers no questions"),
        (["serve", "RUN"], "answers no questions"),
        (["report", "RUN", "--output", "OUT"], "not a known method"),
    ],
)
def test_commands_that_need_answers_say_so_in_a_sentence(
    pretrained, tmp_path, capsys, flags: list[str], said: str
) -> None:
    names = {"RUN": str(pretrained[0]), "IN": str(tmp_path / "in.jsonl"), "OUT": str(tmp_path / "out.jsonl")}
    (tmp_path / "in.jsonl").write_text('{"id": "1", "input": "a"}\n')
    assert main.main([names.get(flag, flag) for flag in flags]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_pretrained_checkpoint_is_converted_with_a_card_that_says_what_it_writes(pretrained, tmp_path):
    run, _ = pretrained
    assert main.main(["convert", "--to", "hf", str(run), str(tmp_path / "hf")]) == 0
    card = json.loads((tmp_path / "hf" / "sbs_student.json").read_text())
    assert (card["dataset"], card["answer"]["is"], card["input"]["prefix"]) == ("corpus", "masked spans", "")
