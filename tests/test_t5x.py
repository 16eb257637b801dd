"""Unmodified T5X as a second engine: the same logits, losses and gradients, and its three commands on our gin files."""

# T5X may be missing where the types are checked; where it is there, its own annotations name NumPy's arrays for JAX's.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import traverse_util

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from t5x import optimizers, train_state, trainer, utils
        from t5x.examples.t5 import network

        from sbs_jax.training import t5x_model
except ImportError as error:
    pytest.skip(f"T5X is not installed here ({error}); docs/t5x.md says how.", allow_module_level=True)

import tasks
from sbs_jax.data import batches, records, registry, release, selection
from sbs_jax.student import families, losses, partitioning, t5
from sbs_jax.training import evaluate, gin_files
from sbs_jax.training.state import initial_state
from sbs_jax.training.step import TrainState, loss_and_gradients, prepare
from sbs_jax.weights import names
from sbs_jax.weights import t5x as t5x_checkpoints
from tasks import builtin

pytestmark = [pytest.mark.t5x, pytest.mark.filterwarnings("ignore")]

REPOSITORY = Path(tasks.__file__).parents[1]
LENGTHS = {"inputs": 40, "targets": 40}
VERSIONS = {
    "v1.0": dataclasses.replace(toy.MODEL, mlp_activations=("relu",), logits_via_embedding=True, dropout_rate=0.0),
    "v1.1": dataclasses.replace(toy.MODEL, num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0),
}


@pytest.fixture(autouse=True)
def t5x_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory):
    return toy.write_records(tmp_path_factory.mktemp("records"))


def seeded(config: t5.T5Config, *, seed: int = 0) -> families.Parameters:
    """Parameters from NumPy's generator, of the size that T5's own have at the start; norms vary around 1.

    Others (0.2 everywhere) make Adam's first steps depend on rounding: our trainer then differs by 2e-3 from itself
    with micro-batches after ten steps.
    """
    random = np.random.default_rng(seed)
    parameters = {}
    for name, shape in sorted(families.abstract(config)[1].items()):
        values = random.standard_normal(shape.shape)
        if name.endswith("scale"):
            values = 1.0 + 0.1 * values
        elif name.endswith("rel_embedding"):
            values *= config.emb_dim**-0.5
        elif name.endswith("kernel"):
            values *= (shape.shape[0] * (config.head_dim if "/query/" in name else 1)) ** -0.5
        parameters[name] = jnp.asarray(values, jnp.float32)
    return parameters


def nested(parameters: families.Parameters) -> dict:
    """The tree that T5X's network takes."""
    return traverse_util.unflatten_dict({name.t5x: parameters[name.ours] for name in names.of(parameters)}, sep="/")


def t5x_network(config: t5.T5Config) -> network.Transformer:
    shared = {field.name for field in dataclasses.fields(network.T5Config)}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in shared}
    return network.Transformer(config=network.T5Config(**settings))


def t5x_student(config: t5.T5Config, records_dir: Path, *, alpha: float, z_loss: float) -> t5x_model.StepByStepModel:
    return t5x_model.StepByStepModel(
        module=t5x_network(config),
        optimizer_def=optimizers.sgd(0.1),
        data=toy.options(records_dir),
        alpha=alpha,
        z_loss=z_loss,
    )


def toy_batch(records_dir: Path, *, pack: bool) -> dict[str, jax.Array]:
    registry.configure(toy.options(records_dir))
    rows = batches.train_dataset(
        "toy_step_by_step", lengths=LENGTHS, split="train", batch_size=8, pack=pack, seed=0, skip_batches=0
    )
    batch = next(rows)
    # Unequal shares of the two tasks in the parts of the batch that micro-batches are cut from.
    batch["decoder_task_ids"][:2] = np.where(batch["decoder_task_ids"][:2] > 0, losses.RATIONALE, 0)
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_are_t5x_s(records_dir, version, pack):
    config, batch = VERSIONS[version], toy_batch(records_dir, pack=pack)
    assert ("decoder_segment_ids" in batch) == pack
    parameters = seeded(config)
    ours = families.join(families.abstract(config)[0], parameters)(
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        encoder_segment_ids=batch.get("encoder_segment_ids"),
        decoder_segment_ids=batch.get("decoder_segment_ids"),
    )
    model = t5x_student(config, records_dir, alpha=0.5, z_loss=0.0)
    theirs = model._compute_logits(nested(parameters), batch)
    # Values at padding differ, and count nowhere.
    real = batch["decoder_target_tokens"] > 0
    difference = np.abs(np.asarray(ours) - np.asarray(theirs))[real].max()
    print(f"logits {version} pack={pack}: max difference {difference:.2e}, std {np.asarray(ours)[real].std():.2f}")
    assert difference < 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_our_checkpoints_have_the_names_and_shapes_of_t5x_s_network(records_dir, tmp_path, version):
    config = VERSIONS[version]
    model = t5x_student(config, records_dir, alpha=0.5, z_loss=0.0)
    inputs = ("encoder_input_tokens", "decoder_input_tokens")
    init = functools.partial(
        model.get_initial_variables, input_shapes=dict.fromkeys(inputs, (1, 8)), input_types=dict.fromkeys(inputs, int)
    )
    theirs = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.PRNGKey(0))["params"], sep="/")
    ours = traverse_util.flatten_dict(nested(seeded(config)), sep="/")
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
    written = t5x_checkpoints.open_checkpoint(t5x_checkpoints.write(tmp_path, seeded(config), step=3))
    assert written.config == dataclasses.replace(config, dropout_rate=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pack", [False, True])
def test_loss_gradients_and_metrics_are_ours(records_dir, pack, alpha):
    config, batch = VERSIONS["v1.1"], toy_batch(records_dir, pack=pack)
    parameters = seeded(config)
    loss, sums, gradients = loss_and_gradients(
        parameters,
        batch,
        structure=families.abstract(config)[0],
        loss=losses.Loss(objectives=losses.step_by_step(alpha), z_loss=1e-3),
        micro_batches=1,
        vocabulary_chunks=1,
        dropout_key=jax.random.key(0),
    )
    model = t5x_student(config, records_dir, alpha=alpha, z_loss=1e-3)
    (theirs, metrics), their_gradients = jax.value_and_grad(model.loss_fn, has_aux=True)(
        nested(parameters), model.with_token_weights(batch), jax.random.key(0)
    )
    assert float(theirs) == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), their_gradients, nested(gradients))
    values = {name: float(metric.compute()) for name, metric in metrics.items() if not name.startswith("timing/")}
    for name in sums:
        for key, value in sums[name].means(name).items():
            assert values[key] == pytest.approx(float(value), rel=1e-5)
    by_task = alpha * values["loss/label"] + (1 - alpha) * values["loss/rationale"]
    assert values["cross_ent_loss"] == pytest.approx(by_task, rel=1e-5)
    assert values["loss"] == pytest.approx(by_task + values["z_loss"], rel=1e-5)
    assert values["z_loss"] > 0
    without_key, _ = model.eval_fn(nested(parameters), batch)
    assert float(without_key) == pytest.approx(float(loss), rel=1e-5)


def test_a_batch_without_a_task_reports_zero_and_no_nan(records_dir):
    batch = toy_batch(records_dir, pack=False)
    batch["decoder_task_ids"] = (batch["decoder_task_ids"] > 0).astype(jnp.int32)
    model = t5x_student(VERSIONS["v1.1"], records_dir, alpha=0.5, z_loss=0.0)
    loss, metrics = model.eval_fn(nested(seeded(VERSIONS["v1.1"])), batch)
    assert float(metrics["loss/rationale"].compute()) == float(metrics["tokens/rationale"].compute()) == 0.0
    assert float(loss) == pytest.approx(0.5 * float(metrics["loss/label"].compute()), rel=1e-5)


@pytest.mark.parametrize("pieces", [2, 4])
def test_micro_batches_change_nothing(records_dir, pieces):
    config, batch = VERSIONS["v1.1"], toy_batch(records_dir, pack=True)
    first, second = (np.bincount(np.ravel(half)) for half in np.split(batch["decoder_task_ids"], 2))
    assert not np.array_equal(first[1:], second[1:])  # or each part's own counts would do
    model = t5x_student(config, records_dir, alpha=0.3, z_loss=1e-3)
    state = train_state.FlaxOptimTrainState.create(model.optimizer_def, {"params": nested(seeded(config))})
    gradients_of = functools.partial(
        trainer.accumulate_grads_microbatched, model, state, model.with_token_weights(batch), jax.random.PRNGKey(0)
    )
    whole, _, _ = gradients_of(None)
    cut, metrics, _ = gradients_of(pieces)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), cut, whole)
    expected, _ = model.eval_fn(nested(seeded(config)), batch)
    assert float(metrics["loss"].replace_steps(1).compute()) == pytest.approx(float(expected), rel=1e-5)


def test_t5x_s_own_trainer_is_refused(records_dir):
    model = t5x_student(VERSIONS["v1.1"], records_dir, alpha=0.5, z_loss=0.0)
    with pytest.raises(ValueError, match=r"trainer_cls = @t5x_model.StepByStepTrainer"):
        model.loss_fn(nested(seeded(VERSIONS["v1.1"])), toy_batch(records_dir, pack=True), jax.random.key(0))


def test_wrong_settings_are_refused(records_dir):
    with pytest.raises(ValueError, match=r"alpha 1\.5"):
        t5x_student(VERSIONS["v1.1"], records_dir, alpha=1.5, z_loss=0.0)
    with pytest.raises(ValueError, match="has 359 ids, and the network's table 300 rows"):
        t5x_student(dataclasses.replace(toy.MODEL, vocab_size=300), records_dir, alpha=0.5, z_loss=0.0)


def test_a_checkpoint_of_another_model_is_refused():
    model = {"target": {"encoder": {"scale": 1, "kernel": 2}}, "state": {"step": 0}}
    checkpoint = {"target": {"encoder": {"scale": 1}}, "state": {"step": 9}}
    with pytest.raises(ValueError, match="lacks 1 of the model's 2 parameters, encoder/kernel"):
        t5x_model.only_parameters(checkpoint, model)
    assert t5x_model.only_parameters(checkpoint, model, is_resuming=True) == checkpoint
    assert t5x_model.only_parameters(model, model) == {"target": model["target"]}


# ------------------------------------------------------------------- the commands, as a user runs them

STEPS, ROWS = 10, 16
T5X_LENGTHS = {"inputs": 64, "targets": 32, "task_ids": 32}
BUILTIN = t5.T5Config(
    vocab_size=384,
    emb_dim=64,
    num_heads=4,
    head_dim=16,
    mlp_dim=128,
    num_encoder_layers=2,
    num_decoder_layers=2,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=True,
    dropout_rate=0.0,
)


def student() -> families.Parameters:
    """The embedded student's pre-trained parameters."""
    with np.load(builtin.student_path()) as arrays:
        return {name: jnp.asarray(arrays[name], jnp.float32) for name in arrays}


def builtin_options(folder: Path) -> selection.DataOptions:
    prefix = "" if (folder / "mixture").read_text() == SINGLE else "{dataset} "
    return selection.DataOptions(
        records_dir=str(folder / "records"), vocabulary=builtin.vocabulary_path(), dataset_prefix=prefix
    )


def call_t5x(module: str, gin_files: list[str], **macros) -> None:
    """Runs `python -m t5x.<module>` as docs/t5x.md describes it."""
    places = [file if file.endswith(".gin") else f"gin_configs/t5x/{file}.gin" for file in gin_files]
    command = [sys.executable, "-m", f"t5x.{module}", *(f"--gin_file={place}" for place in places)]
    command += [f"--gin.{name}={value!r}" for name, value in macros.items()]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


SINGLE, SEVERAL = "builtin_step_by_step", "builtin.svamp_step_by_step"
# As gin_configs/t5x/four_base.gin has it.
MIXTURE = """
from __gin__ import dynamic_registration
from sbs_jax.data import registry
from sbs_jax.data import selection
from sbs_jax.training import t5x_model
include "gin_configs/t5x/builtin.gin"
registry.task_name.dataset = ("builtin", "svamp")
registry.task_name.kind = "step_by_step"
MIXTURE_OR_TASK_NAME = @registry.task_name()
selection.DataOptions.dataset_prefix = "{dataset} "
t5x_model.StepByStepModel.mixture_or_task_name = %MIXTURE_OR_TASK_NAME
"""


def write_sums(folder: Path) -> None:
    """Writes records of svamp: 60 sums to train on, 4 of each other split."""
    for split, numbers in (("train", range(60)), ("validation", range(60, 64)), ("test", range(64, 68))):
        rows = []
        for n in numbers:
            label = f"( {n}.0 + {n % 9}.0 )"
            rows.append(
                records.Record(
                    id=f"{n}",
                    input=f"{n} and {n % 9}",
                    label=label,
                    teacher_label=label,
                    rationale=f"{n} and {n % 9} are together.",
                    teacher_text="",
                    outcome=records.OK,
                )
            )
        records.write_records(folder / "svamp" / f"{split}.jsonl", rows)


@pytest.fixture(scope="module", params=[SINGLE, SEVERAL])
def t5x_run(request, tmp_path_factory):
    """Folder of a run of `t5x.train` (train/) from our checkpoint (initial/), with its data (records/)."""
    folder = tmp_path_factory.mktemp("t5x")
    (folder / "mixture").write_text(request.param)
    (folder / "mixture.gin").write_text(MIXTURE)
    builtin.write_release(folder / "release", rows={"train": 200, "validation": 16, "test": 24}, seed=0)
    release.import_release(
        builtin.DATASET, release_dir=folder / "release", records_dir=folder / "records", parser="strict"
    )
    (folder / "records" / "svamp").mkdir()
    write_sums(folder / "records")
    initial = t5x_checkpoints.write(folder / "initial", student(), step=7)
    call_t5x(
        "train",
        ["builtin" if request.param == SINGLE else str(folder / "mixture.gin")],
        RECORDS_DIR=str(folder / "records"),
        MODEL_DIR=str(folder / "train"),
        INITIAL_CHECKPOINT_PATH=initial,
        TRAIN_STEPS=STEPS,
        EVAL_PERIOD=STEPS,
        CHECKPOINT_PERIOD=STEPS,
        MICRO_BATCHES=2,
        **{"train.stats_period": 1},
    )
    return folder


def our_run(folder: Path) -> tuple[list[dict[str, float]], TrainState]:
    """Metrics of each step of our trainer on the batches that T5X's pipeline gives, and the state after the last."""
    config = toy.config(
        folder / "unused",
        folder / "records",
        model=BUILTIN,
        data=builtin_options(folder),
        mixture_or_task_name=(folder / "mixture").read_text(),
        task_feature_lengths={"inputs": 64, "targets": 32},
        pack=True,
        batch_size=ROWS,
        train_steps=STEPS,
        optimizer=functools.partial(optax.adamw, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
        learning_rate=optax.linear_schedule(2e-3, 0.0, STEPS),
        clip_norm=1.0,
    )
    registry.configure(config.data)
    if config.mixture_or_task_name == SEVERAL:
        registry.task_name(dataset=("builtin", "svamp"), kind="step_by_step")
    dataset = utils.get_dataset(
        utils.DatasetConfig(
            mixture_or_task_name=config.mixture_or_task_name,
            task_feature_lengths=T5X_LENGTHS,
            split="train",
            batch_size=ROWS,
            shuffle=True,
            seed=0,
            pack=True,
        ),
        0,
        1,
        batches.StepByStepFeatureConverter,
    )
    our_trainer = prepare(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, our_trainer.abstract)
    parameters = jax.device_put(student(), shardings.parameters)
    state = dataclasses.replace(
        initial_state(config, our_trainer),
        parameters=parameters,
        optimizer=jax.jit(config.gradient_transformation().init, out_shardings=shardings.optimizer)(parameters),
    )
    lines = []
    for batch in dataset.take(STEPS).as_numpy_iterator():
        state, metrics = our_trainer.step(state, our_trainer.partitioner.put_batch(batch))
        lines.append({name: float(value) for name, value in metrics.items()})
    return lines, state


def logged(folder: Path, name: str) -> list[float]:
    """Values of a scalar of T5X's event files, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(folder / "train" / "train"), size_guidance={"tensors": 0})
    events.Reload()
    return [float(tensor_util.make_ndarray(event.tensor_proto)) for event in events.Tensors(name)]


@pytest.mark.slow
def test_ten_steps_of_t5x_train_are_ten_steps_of_ours(t5x_run):
    lines, state = our_run(t5x_run)
    objectives = [name for name in lines[0] if name.startswith("loss")]
    assert len(objectives) == (3 if (t5x_run / "mixture").read_text() == SINGLE else 5)
    for name in objectives:
        ours, theirs = np.array([line[name] for line in lines]), np.array(logged(t5x_run, name))
        difference = np.abs(theirs / ours - 1).max()
        print(f"{name}: from {ours[0]:.4f} to {ours[-1]:.4f}, max relative difference {difference:.1e}")
        assert len(theirs) == STEPS
        assert difference < 1e-4
    losses_of = [line["loss"] for line in lines]
    assert losses_of[-1] < 0.8 * losses_of[0]
    trained = t5x_checkpoints.open_checkpoint(t5x_run / "train")
    assert (trained.step, set(trained.arrays)) == (STEPS, set(state.parameters))
    start = student()
    for name, array in trained.arrays.items():
        difference = np.abs(array.whole() - np.asarray(state.parameters[name]))
        # Adam makes a whole step of a gradient that is nothing but rounding.
        assert difference.max() < 2e-3, name
        assert np.mean(difference > 2e-4) < 1e-3, name
        assert np.abs(array.whole() - start[name]).max() > 1e-3


@pytest.mark.slow
def test_t5x_eval_and_infer_answer_and_grade_as_we_do(t5x_run):
    if (t5x_run / "mixture").read_text() == SEVERAL:
        pytest.skip("T5X evaluates each task of a mixture, as of one dataset")
    checkpoint = t5x_run / "train" / f"checkpoint_{STEPS}"
    given = {"RECORDS_DIR": str(t5x_run / "records"), "CHECKPOINT_PATH": str(checkpoint)}
    given |= {"MIXTURE_OR_TASK_NAME": "builtin_step_by_step", "TASK_FEATURE_LENGTHS": T5X_LENGTHS}
    call_t5x("eval", ["builtin_student", "eval"], EVAL_OUTPUT_DIR=str(t5x_run / "eval"), **given)
    call_t5x("infer", ["builtin_student", "infer"], INFER_OUTPUT_DIR=str(t5x_run / "infer"), **given)
    # Rationales have no metrics.
    (graded,) = (t5x_run / "eval" / "inference_eval").glob("*-metrics.jsonl")
    assert graded.name == "builtin_label-metrics.jsonl"

    registry.configure(builtin_options(t5x_run))
    trained = t5x_checkpoints.open_checkpoint(checkpoint)
    parameters = {name: jnp.asarray(array.whole()) for name, array in trained.arrays.items()}
    for task in ("builtin_label", "builtin_rationale"):
        generators = evaluate.Generators(
            structure=families.abstract(BUILTIN)[0],
            eos_id=BUILTIN.eos_id,
            partitioner=partitioning.DATA_PARALLEL.partitioner(),
            batch_size=8,
            max_decode_length=32,
        )
        grader = evaluate.evaluator(
            tasks=[task], split="test", task_feature_lengths={"inputs": 64, "targets": 32}, generators=generators
        )
        result = grader.run(parameters)[task]
        if task == "builtin_label":
            assert json.loads(graded.read_text()) == {"step": STEPS, **result.metrics}
        ours = [row.get("text", row["prediction"]) for row in result.rows]
        lines = (t5x_run / "infer" / f"{task}-predict.jsonl-00000-of-00001").read_text().splitlines()
        print(f"{task}: {len(ours)} answers, {len(set(ours))} different, such as {ours[:3]}")
        assert [json.loads(line)["prediction"] for line in lines] == ours
        assert len(set(ours)) > 1


@pytest.mark.slow
def test_svamp_base_is_the_same_experiment_for_both_engines(tmp_path):
    """Parses T5X's and ours, and compares what they say."""
    code = """
import json, sys
from t5x.train import train
from t5x import gin_utils
import dataclasses, gin, jax
gin.external_configurable(train, module="__main__")
gin_utils.parse_gin_flags([], ["gin_configs/t5x/svamp_base.gin"], sys.argv[1:])
value = lambda name: gin.query_parameter(name + "/macro.value")
model = value("MODEL").scoped_configurable_fn()
from sbs_jax.data import registry
schedule = gin.get_configurable("optax.linear_schedule")()
print(json.dumps({
    "data": dataclasses.asdict(registry.options()), "network": dataclasses.asdict(model.module.config),
    "alpha": model._alpha, "z_loss": model._z_loss, "rates": [float(schedule(step)) for step in (0, 5000, 10000)],
    **{name: value(name) for name in ("TASK_FEATURE_LENGTHS", "TRAIN_STEPS", "BATCH_SIZE", "PACK", "CLIP_NORM",
                                      "MIXTURE_OR_TASK_NAME")},
}, default=str))
"""
    given = [f"RECORDS_DIR = {str(tmp_path)!r}", "VOCABULARY = 'byte'", f"MODEL_DIR = {str(tmp_path / 'run')!r}"]
    given += ["INITIAL_CHECKPOINT_PATH = 'nowhere'"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, *given], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours, _ = gin_files.configure(
        "train.TrainConfig",
        gin_files=["gin_configs/experiments/svamp/base.gin"],
        bindings=[b.replace(" ", "") for b in given],
    )
    assert theirs["data"] == dataclasses.asdict(ours.data)
    for name in (
        "vocab_size",
        "emb_dim",
        "num_heads",
        "head_dim",
        "mlp_dim",
        "num_encoder_layers",
        "dropout_rate",
        "dtype",
    ):
        assert theirs["network"][name] == getattr(ours.model, name)
    assert (theirs["alpha"], theirs["z_loss"], theirs["CLIP_NORM"]) == (ours.alpha, ours.z_loss, ours.clip_norm)
    assert theirs["TASK_FEATURE_LENGTHS"] == {
        **ours.task_feature_lengths,
        "task_ids": ours.task_feature_lengths["targets"],
    }
    assert theirs["rates"] == pytest.approx([float(ours.learning_rate(step)) for step in (0, 5000, 10000)])
    assert (theirs["TRAIN_STEPS"], theirs["BATCH_SIZE"], theirs["PACK"]) == (
        ours.train_steps,
        ours.batch_size,
        ours.pack,
    )
    assert theirs["MIXTURE_OR_TASK_NAME"] == ours.mixture_or_task_name


def test_the_table_has_the_names_and_shapes_of_t5x_s_scanned_network():
    """T5X's `scalable_t5`, whose layers have a bias each and which keeps heads and their width apart."""
    from t5x.examples.scalable_t5 import network as scanned

    config = dataclasses.replace(VERSIONS["v1.1"], relative_attention_bias="per_layer", num_encoder_layers=3)
    sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers")
    module = scanned.Transformer(
        config=scanned.T5Config(
            **{name: getattr(config, name) for name in sizes},
            mlp_activations=config.mlp_activations,
            logits_via_embedding=config.logits_via_embedding,
        )
    )
    tokens = jnp.ones((1, 4), jnp.int32)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False))
    found = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(made["params"]).items()}
    expected = {}
    shapes = names.parameters(config)
    for name in names.of(shapes):
        shape = shapes[name.ours].shape
        if "attention/" in name.ours and name.ours.endswith("kernel"):
            heads = (config.num_heads, config.head_dim)
            shape = (*heads, shape[1]) if "/out/" in name.ours else (shape[0], *heads)
        if name.layer is not None:
            layers = config.num_encoder_layers if name.ours.startswith("encoder") else config.num_decoder_layers
            shape = (shape[0], layers, *shape[1:])
        expected[name.scanned] = shape
    assert found == expected
