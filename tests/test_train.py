"""Training from records to a graded student, resuming, and refusals."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import toy
from builders import decoders
from builders.finished_runs import unmeasured

from sbs_jax import compiling
from sbs_jax.cli import main
from sbs_jax.data import batches, catalogue, grading, records, registry, tokens
from sbs_jax.prediction import engine, files
from sbs_jax.run import checkpoints, directory
from sbs_jax.stats import graded
from sbs_jax.student import families, partitioning, stacks
from sbs_jax.training import evaluate, loop
from sbs_jax.training.config import rows_per_update, rsqrt_schedule
from sbs_jax.training.state import initial_state
from sbs_jax.training.step import prepare
from sbs_jax.weights import npz, opening


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory):
    return toy.write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, records_dir):
    """A run of 6 steps on the mixture: its configuration, its result, its compiled step and what it said of that."""
    config = toy.config(tmp_path_factory.mktemp("run") / "toy", records_dir)
    trainers, said, prepare = [], [], loop.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", lambda config: trainers.append(prepare(config)) or trainers[-1])
        patch.setattr(compiling, "PATIENCE", 0.0)
        patch.setattr(compiling, "_log", said.append)
        result = loop.train(config, config_text="SEED = 0\n")
    return config, result, *trainers, said


@pytest.fixture(scope="module")
def finished(recorded):
    return recorded[:2]


def test_a_run_directory_holds_everything(finished):
    config, result = finished
    path = directory.Path(config.model_dir)
    assert set(result) == {"train", "validation", "test"}
    assert {p.name for p in path.iterdir()} == {
        *("config.gin", "manifest.json", "metrics.jsonl", "tensorboard", "predictions", "checkpoints", "lock")
    }
    assert list((path / "tensorboard").glob("events.out.tfevents.*"))
    lines = directory.read_metrics(path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("train", 2), ("validation", 3), ("train", 4), ("train", 6), ("validation", 6)),
        ("test", checkpoints.best_step(path)),
    ]
    assert all(math.isfinite(value) for line in lines for key, value in line.items() if key != "kind")
    assert lines[0]["tokens/rationale"] > lines[0]["tokens/label"] > 0
    manifest = directory.read_manifest(path)
    assert manifest["parameter_count"] == sum(math.prod(p["shape"]) for p in manifest["parameters"].values())
    assert set(manifest["data"]["splits"]) == {"train", "validation", "test"}
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["lengths"]["train"]["toy_label"]["inputs cut"] == 0


def test_a_run_tells_where_its_time_went(finished):
    path = finished[0].model_dir
    lines = [line for line in directory.read_metrics(path) if line["kind"] == "train"]
    seconds = {part: lines[-1][f"seconds/{part}"] for part in directory.TIME_PARTS}
    assert min(seconds[part] for part in ("steps", "start", "compiling", "evaluation", "saving")) > 0
    assert seconds["lost"] == 0
    assert lines[-1]["goodput"] == pytest.approx(seconds["steps"] / sum(seconds.values()))
    assert sum(seconds.values()) > sum(lines[0][f"seconds/{part}"] for part in directory.TIME_PARTS) > 0
    saved = checkpoints.read_metadata(path, checkpoints.steps(path)[-1])["clock"]
    assert saved["seconds"].keys() == seconds.keys()


def test_predictions_are_kept_per_evaluation(finished):
    path = directory.Path(finished[0].model_dir) / "predictions"
    best = checkpoints.best_step(path.parent)
    names = {p.name for p in path.iterdir()}
    assert names == {"toy_label-3.jsonl", "toy_label-6.jsonl", f"toy_label-test-{best}.jsonl"}
    rows = [json.loads(line) for line in (path / "toy_label-6.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {"id", "input", "target", "prediction", "correct", "score"} <= set(rows[0])
    assert rows[0]["input"].startswith("predict: ")


def test_a_run_with_every_term_of_the_loss(tmp_path, records_dir):
    config = toy.config(
        tmp_path / "run",
        records_dir,
        data=toy.options(records_dir, pairs=True),
        alpha=optax.linear_schedule(0.25, 0.75, 4),
        label_smoothing=0.1,
        mutual_information="as_released",
        train_steps=4,
        micro_batches=2,
        batch_size=16,
        log_period=1,
        evaluate_test=False,
        layout=partitioning.Layout(slice=1, data=8, fsdp=1, tensor=1),
    )
    loop.train(config, config_text="")
    lines = [line for line in directory.read_metrics(config.model_dir) if line["kind"] == "train"]
    for line, alpha in zip(lines, (0.25, 0.375, 0.5, 0.625), strict=True):
        of_tasks = alpha * line["loss/label"] + (1 - alpha) * line["loss/rationale"]
        # What smoothing adds is small at the start, when all tokens are about equally likely.
        assert line["loss"] == pytest.approx(of_tasks + 0.1 * line["loss/mutual_information"], rel=0.03)
    settings = directory.read_manifest(config.model_dir)["settings"]
    assert settings["alpha"] == {"0": 0.25, "1": 0.375, "2": 0.5, "3": 0.625}
    assert settings["mutual_information"] == "as_released"


def test_one_compile_per_run(recorded):
    assert recorded[2].step._cache_size() == 1


def test_each_program_is_counted_while_it_compiles(recorded):
    begun = [re.sub(r" \(.*", "", line) for line in recorded[3] if line.startswith("compiling")]
    assert begun == [
        "compiling program 1: random parameters",
        "compiling 1 of 2 programs: the training step",
        "compiling 2 of 2 programs: 8 rows of 20 tokens",
    ]
    assert sum(line.startswith("compiled 1 of 2 programs in ") for line in recorded[3]) == 1


def test_a_finished_run_is_not_repeated(finished):
    config, result = finished
    before = directory.read_metrics(config.model_dir)
    assert loop.train(config, config_text="SEED = 0\n") == result
    assert directory.read_metrics(config.model_dir) == before


def test_runs_that_share_programs_end_as_runs_of_their_own(recorded, tmp_path):
    """Bit for bit, with other rows, another order and other dropout than the run that compiled the programs."""
    config, _, trainer, _ = recorded
    programs = dataclasses.replace(loop.Programs.of(config), trainer=trainer)
    data = dataclasses.replace(config.data, fraction=0.5, seed=5)
    alone, shared = (
        dataclasses.replace(config, model_dir=str(tmp_path / name), seed=5, data=data) for name in ("alone", "shared")
    )
    loop.train(alone, config_text="")
    loop.train(shared, config_text="", programs=programs)
    assert trainer.step._cache_size() == 1
    ours, theirs, first = (
        [unmeasured(line) for line in directory.read_metrics(each.model_dir)] for each in (shared, alone, config)
    )
    assert ours == theirs
    assert ours[0] != first[0]
    for file in (tmp_path / "alone" / "predictions").iterdir():
        assert (tmp_path / "shared" / "predictions" / file.name).read_bytes() == file.read_bytes()
    paths = [tmp_path / name / "checkpoints" / "6" for name in ("alone", "shared")]
    arrays = [opening.load_parameters(str(path), like=trainer.saved.parameters) for path in paths]
    assert all((arrays[0][name] == arrays[1][name]).all() for name in arrays[0])
    with pytest.raises(ValueError, match="shared has another alpha"):
        programs.check(dataclasses.replace(shared, alpha=0.25))


def test_scores_outlive_the_metrics_and_a_run_without_its_checkpoints_does_not_begin_anew(
    recorded, tmp_path, monkeypatch
):
    """Loses the metrics and the last checkpoint of a finished run, then all checkpoints."""
    config, result, trainer, _ = recorded
    assert result["test"]["step"] == 3  # the earlier of two equal scores
    run = shutil.copytree(config.model_dir, tmp_path / "run")
    config = dataclasses.replace(config, model_dir=str(run))
    (run / "metrics.jsonl").write_bytes(b"")
    assert checkpoints.best_step(run) == 3
    shutil.rmtree(run / "checkpoints" / "6")
    monkeypatch.setattr(loop, "prepare", lambda config: trainer)
    again = loop.train(config, config_text="SEED = 0\n")
    assert {kind: line["step"] for kind, line in again.items()} == {"train": 6, "validation": 6, "test": 3}
    assert again["test"] == result["test"]

    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    said = rf"This run had checkpoints, but {run}/checkpoints has none\..* move {run} away to start over"
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            loop.train(config, config_text="SEED = 0\n")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_with_the_difference(finished):
    config, _ = finished
    with pytest.raises(FileExistsError, match=r"(?s)another configuration.*-settings.seed = 0.*\+settings.seed = 1"):
        loop.train(dataclasses.replace(config, seed=1), config_text="SEED = 1\n")


def test_a_directory_with_other_contents_is_refused(tmp_path, records_dir):
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(FileExistsError, match=r"holiday\.jpg"):
        loop.train(toy.config(tmp_path, records_dir), config_text="")


def test_a_run_starts_from_another_run_s_parameters(finished, tmp_path, records_dir):
    config, _ = finished
    start = toy.config(tmp_path / "next", records_dir, initial_checkpoint_path=config.model_dir)
    trainer = prepare(start)
    state = initial_state(start, trainer)
    best = checkpoints.best_step(config.model_dir)
    like = trainer.abstract.parameters
    want = opening.load_parameters(f"{config.model_dir}/checkpoints/{best}", like=like)
    fresh = families.init(config.model, seed=start.seed)[1]
    for name in want:
        np.testing.assert_array_equal(state.parameters[name], want[name])
    assert not np.array_equal(fresh["logits_dense/kernel"], want["logits_dense/kernel"])
    assert int(state.step) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parameters_travel_through_an_npz(tmp_path, dtype):
    parameters = families.init(toy.MODEL, seed=3)[1]
    npz.save_npz(tmp_path / "student.npz", parameters, dtype=dtype)
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in parameters.items()}
    back = opening.load_parameters(tmp_path / "student.npz", like=like)
    for name, x in parameters.items():
        np.testing.assert_array_equal(back[name], np.asarray(x).astype(dtype).astype(np.float32))


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path, records_dir):
    config, _ = finished
    changed = {
        "wider": dataclasses.replace(toy.MODEL, emb_dim=48),
        "deeper": dataclasses.replace(toy.MODEL, num_decoder_layers=2),
        "v1.0": dataclasses.replace(toy.MODEL, mlp_activations=("relu",), logits_via_embedding=True),
    }
    says = {"wider": r"shapes differ .*checkpoint \(.*32.*\), model \(.*48", "deeper": "missing", "v1.0": "left over"}
    for name, model in changed.items():
        other = toy.config(tmp_path, records_dir, model=model, initial_checkpoint_path=config.model_dir)
        with pytest.raises(ValueError, match=r"(?s)another architecture.*" + says[name]):
            initial_state(other, prepare(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "does not divide over 8"),
        ({"batch_size": 8, "micro_batches": 3}, "does not divide into 3"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": optax.linear_schedule(0.5, 1.2, 6)}, "alpha is 1.2.* at step 6"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"mutual_information": "as_release"}, "as_release.*as_released"),
        ({"mutual_information": "as_written"}, "with pairs False.*PAIRS = True"),
        ({"train_steps": 0}, "train_steps is 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"layout": partitioning.Layout(slice=1, data=3, fsdp=1, tensor=1)}, "does not fit 8 devices"),
        ({"mixture_or_task_name": "toy_step_by_stpe"}, "toy_step_by_step"),
        ({"mixture_or_task_name": "toy_rationale"}, "toy_rationale has only rationales"),
        ({"model": dataclasses.replace(toy.MODEL, vocab_size=300)}, "359 ids, and the model's table 300 rows"),
    ],
)
def test_impossible_configurations_fail_before_anything_is_written(tmp_path, records_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        loop.train(toy.config(tmp_path / "run", records_dir, **changes), config_text="")
    assert not (tmp_path / "run").exists()


LAYOUTS = {
    "dp": partitioning.DATA_PARALLEL,
    "fsdp": partitioning.Layout(slice=1, data=1, fsdp=8, tensor=1),
    "fsdp x tp": partitioning.Layout(slice=1, data=1, fsdp=4, tensor=2),
    "slices": partitioning.Layout(slice=2, data=1, fsdp=2, tensor=2),
}
SCANNED = stacks.Execution(layers="scanned", remat="attended")


def five_steps(config, *, devices=None):
    """Makes five updates: the state as a checkpoint has it, and the losses."""
    registry.configure(config.data)
    trainer = prepare(config, devices=devices)
    state = initial_state(config, trainer)
    stream = batches.train_dataset(
        config.mixture_or_task_name,
        lengths=config.task_feature_lengths,
        split="train",
        batch_size=config.batch_size,
        pack=config.pack,
        seed=0,
        skip_batches=0,
    )
    losses = []
    for _, batch in zip(range(5), stream, strict=False):
        state, metrics = trainer.step(state, trainer.partitioner.put_batch(batch))
        losses.append(float(metrics["loss"]))
    return jax.device_get(trainer.unstacked(state)), losses


# One head of keys and values, which does not divide over two devices as the heads of queries do.
DECODER = decoders.config("gemma3", vocab_size=384, emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64)


def unsharded(folder, records_dir, *, optimizer=optax.adamw, model=toy.MODEL):
    """A configuration without dropout on one device, its state and losses after five updates."""
    config = toy.config(
        folder,
        records_dir,
        layout=partitioning.Layout(slice=1, data=1, fsdp=1, tensor=1),
        optimizer=optimizer,
        model=dataclasses.replace(model, dropout_rate=0.0),
    )
    return config, *five_steps(config, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, records_dir):
    kinds = {"adamw": {}, "adafactor": {"optimizer": optax.adafactor}, "decoder-only": {"model": DECODER}}
    folder = tmp_path_factory.mktemp("runs")
    return {name: unsharded(folder / name, records_dir, **kind) for name, kind in kinds.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh", "execution"),
    [
        ("adamw", "dp", SCANNED),
        pytest.param("adafactor", "fsdp", SCANNED, marks=pytest.mark.faults),  # like "slices", with one axis fewer
        pytest.param("adafactor", "fsdp x tp", stacks.UNROLLED, marks=pytest.mark.faults),  # "slices" has these axes
        pytest.param("adamw", "fsdp x tp", SCANNED, marks=pytest.mark.faults),  # as the checkpoint's test below
        ("adafactor", "slices", SCANNED),
        ("decoder-only", "fsdp x tp", SCANNED),
    ],
)
def test_sharded_training_is_that_of_one_device(on_one_device, kind, mesh, execution):
    config, state, losses = on_one_device[kind]
    sharded, losses_too = five_steps(dataclasses.replace(config, layout=LAYOUTS[mesh], execution=execution))
    np.testing.assert_allclose(losses_too, losses, rtol=2e-4)
    assert losses[-1] < losses[0]
    assert jax.tree.structure(sharded) == jax.tree.structure(state)
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(sharded), strict=True):
        scale = np.abs(want).max() or 1.0
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3 * scale, err_msg=jax.tree_util.keystr(path))


def test_a_checkpoint_is_the_same_whichever_way_it_was_computed(tmp_path, records_dir):
    """Scanned on one mesh, resumed unrolled on another, is the run that never changed."""
    model = dataclasses.replace(toy.MODEL, dropout_rate=0.0)
    plain = toy.config(tmp_path / "plain", records_dir, model=model, train_steps=6, evaluate_test=False)
    other_way = {"execution": SCANNED, "layout": LAYOUTS["fsdp x tp"]}
    first = dataclasses.replace(plain, model_dir=str(tmp_path / "run"), train_steps=3, **other_way)
    loop.train(first, config_text="")
    programs = loop.Programs.of(plain)
    resumed = dataclasses.replace(plain, model_dir=first.model_dir)
    loop.train(resumed, config_text="", accept_changes=True, programs=programs)
    loop.train(plain, config_text="", programs=programs)
    like = programs.trainer.saved.parameters
    ours, theirs = (
        opening.load_parameters(Path(config.model_dir) / "checkpoints" / "6", like=like) for config in (first, plain)
    )
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=2e-3, atol=2e-4, err_msg=name)


def test_rsqrt_schedule():
    schedule = rsqrt_schedule(peak=0.1, warmup_steps=100)
    assert [float(np.asarray(schedule(step))) for step in (0, 100, 400, 10_000)] == pytest.approx(
        [0.1, 0.1, 0.05, 0.01]
    )


def test_rows_per_update_counts_examples_of_every_task(records_dir):
    registry.configure(toy.options(records_dir))
    assert rows_per_update(mixture_or_task_name="toy_step_by_step", examples=64, examples_per_row=1) == 128
    assert rows_per_update(mixture_or_task_name="toy_label", examples=64, examples_per_row=4) == 16


def test_an_evaluation_that_scores_nothing_and_never_says_a_label_raises_an_alarm(tmp_path, records_dir, caplog):
    config = toy.config(tmp_path / "run", records_dir)
    registry.configure(config.data)
    programs = loop.Programs.of(config)
    # All logits are 0, so every answer is empty.
    abstract = programs.trainer.abstract.parameters
    zero = {name: jax.numpy.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract.items()}
    result = loop.evaluator(config, programs, split="validation").run(zero)["toy_label"]
    assert result.metrics["accuracy"] == 0.0
    assert "none of 16 predictions is a possible label" in caplog.text


def test_short_rows_are_evaluated_without_the_padding_of_long_ones(tmp_path, monkeypatch):
    file = toy.write_records(tmp_path / "records") / "toy" / "validation.jsonl"
    rows = [
        dataclasses.replace(row, input=row.input + " and so on" * (number % 3 == 1))
        for number, row in enumerate(records.read_records(file))
    ]
    records.write_records(file, rows)
    config = toy.config(tmp_path / "run", tmp_path / "records")
    registry.configure(config.data)
    programs = loop.Programs.of(config)
    parameters = families.init(config.model, seed=1)[1]

    def result() -> list[dict[str, Any]]:
        grader: Any = loop.evaluator(config, programs, split="validation")
        seen.append([len(rows) for _, rows in grader._graders["toy_label"]._groups])
        return grader.run(parameters)["toy_label"].rows

    seen: list[list[int]] = []
    monkeypatch.setattr(evaluate, "_LEAST_BATCHES", 1)
    grouped = result()
    monkeypatch.setattr(evaluate, "_LEAST_BATCHES", 17)
    padded = result()
    assert seen == [[11, 5], [16]]
    scores = [[row.pop("score") for row in rows] for rows in (grouped, padded)]
    assert grouped == padded
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_scores_besides_the_primary_metric_are_kept_per_row(tmp_path, records_dir, monkeypatch):
    """With their mean in the metrics, so that they have intervals."""
    dataset = dataclasses.replace(toy.DATASET, metric_fns=(grading.rouge_l, grading.accuracy), primary_metric="rouge_l")
    monkeypatch.setitem(catalogue._DATASETS, "toy", dataset)
    config = toy.config(tmp_path / "run", records_dir)
    registry.configure(config.data)
    programs = loop.Programs.of(config)
    parameters = families.init(config.model, seed=1)[1]
    result = loop.evaluator(config, programs, split="validation").run(parameters)["toy_label"]
    scores = [row["scores"] for row in result.rows]
    assert {tuple(each) for each in scores} == {("rouge_l",)}
    assert result.metrics["rouge_l"] == pytest.approx(100 * np.mean([each["rouge_l"] for each in scores]))
    assert set(result.metrics) == {"rouge_l", "accuracy"}


def test_evaluate_and_predict_use_the_saved_configuration(finished, tmp_path, records_dir):
    config, result = finished
    out = tmp_path / "out"
    evaluation = evaluate.EvaluateConfig(
        checkpoint_path=config.model_dir,
        split="test",
        mixture_or_task_name=None,
        records_dir=None,
        batch_size=3,
        max_decode_length=None,
        output_dir=str(out),
        layout=config.layout,
    )
    out.mkdir()
    (out / "metrics.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="was written by no evaluation; choose another OUTPUT_DIR"):
        evaluate.evaluate(evaluation)
    (out / "metrics.json").unlink()
    metrics = evaluate.evaluate(evaluation)
    assert metrics["accuracy"] == result["test"]["accuracy"]
    best = checkpoints.best_step(config.model_dir)
    graded = [json.loads(line) for line in (out / f"toy_label-test-{best}.jsonl").read_text().splitlines()]
    inputs = tmp_path / "in.jsonl"
    inputs.write_text(
        "".join(json.dumps({"id": row["id"], "input": row["input"].removeprefix("predict: ")}) + "\n" for row in graded)
    )
    predictor = engine.Predictor.load(config.model_dir, settings=engine.Settings(batch_size=5))
    done = files.predict(predictor, input_path=inputs, output_path=tmp_path / "out.jsonl")
    predicted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert done.rows == len(predicted) == 16
    assert done.errors == 0
    for row, answer in zip(graded, predicted, strict=True):
        assert (row["id"], row["prediction"]) == (answer["id"], answer["prediction"])
        assert answer["score"] == pytest.approx(row["score"], rel=1e-4)


def test_accuracies_are_printed_with_rows_interval_and_labels(finished, capsys, tmp_path):
    """At the end of `sbs train`, and by `sbs evaluate`."""
    config, result = finished
    found = graded.of_run(config.model_dir, result, labels={"toy_label": toy.DATASET.labels})
    accuracy = result["test"]["accuracy"]
    for kind in ("validation", "test"):
        low, high = found[kind]["intervals"]["accuracy"]
        assert (found[kind]["rows"], found[kind]["accuracy"]) == (16, result[kind]["accuracy"])
        assert low <= found[kind]["accuracy"] <= high < low + 50
        assert 0 <= found[kind]["macro_f1"] <= 100
    assert found["train"] == result["train"]
    assert directory.read_manifest(config.model_dir)["labels"] == list(toy.LETTERS)

    assert main.main(["evaluate", config.model_dir, "--batch_size=8", f"--output={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr()
    printed = json.loads(told.out)
    assert printed["intervals"] == found["test"]["intervals"]
    assert (printed["accuracy"], printed["rows"]) == (accuracy, 16)
    assert "outside of the set" in told.err
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sum(each["rows"] for each in written["labels"].values()) == 16
    in_set = sum(count for row in written["confusion"].values() for count in row.values())
    assert in_set == 16 - written["outside_of_the_set"]


def test_rationales_are_asked_for_with_their_own_prefix(finished, tmp_path, monkeypatch):
    config, _ = finished
    asked = []
    encode = tokens.encode

    def recording(texts, vocabulary):
        asked.extend(texts)
        return encode(texts, vocabulary)

    monkeypatch.setattr(tokens, "encode", recording)
    question = engine.Question(id="one", input="a b c")
    found = {}
    for name, settings in (
        ("label", engine.Settings(batch_size=8)),
        ("rationale", engine.Settings(batch_size=8, objective="rationale")),
        ("both", engine.Settings(batch_size=8, rationale=True)),
    ):
        predictor = engine.Predictor.load(config.model_dir, settings=settings)
        (found[name],) = predictor.answer([question])
    assert asked == ["predict: a b c", "explain: a b c", "predict: a b c", "explain: a b c"]
    assert found["label"].rationale is None
    assert (found["both"].prediction, found["both"].score) == (found["label"].prediction, found["label"].score)
    assert found["both"].rationale == found["rationale"].prediction
