"""Distillation from a teacher in memory: its divergence, what the student samples, the step, and runs."""

import dataclasses
import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from builders import bpe, decoders, finished_runs

from sbs_jax.run import checkpoints
from sbs_jax.student import (
    decoding,
    families,
    losses,
    on_policy,
    partitioning,
    rollouts,
    soft_targets,
    stacking,
    stacks,
)
from sbs_jax.student.losses import LABEL, RATIONALE
from sbs_jax.training import lessons, loop, replay
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import loss_and_gradients
from sbs_jax.weights import runs

# --------------------------------------------------------------------------------------- the divergence


def by_hand(teacher: np.ndarray, student: np.ndarray, beta: float) -> np.ndarray:
    """JSD(beta) in float64; at the ends the limits of its quotients."""
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (teacher.astype(np.float64), student.astype(np.float64)))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    if beta in (0, 1):
        p, q = (p, q) if beta == 0 else (q, p)
        return (p * np.log(p / q)).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)


def pair(*, scale: float = 3.0, shape: tuple[int, ...] = (2, 3, 11)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    teacher, student = scale * random.normal(size=(2, *shape)).astype(np.float32)
    return teacher, student


BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_are_those_of_the_definition(beta):
    teacher, student = pair()
    got = on_policy.divergence(jnp.asarray(teacher), jnp.asarray(student), beta=beta)
    np.testing.assert_allclose(got, by_hand(teacher, student, beta), rtol=2e-5, atol=1e-6)
    gradient = jax.grad(lambda student: jnp.sum(on_policy.divergence(jnp.asarray(teacher), student, beta=beta)))(
        jnp.asarray(student)
    )
    step, place = 1e-5, (1, 2, 4)
    moved = [student.astype(np.float64) for _ in range(2)]
    moved[0][place] += step
    moved[1][place] -= step
    up, down = (by_hand(teacher, each, beta).sum() for each in moved)
    assert float(gradient[place]) == pytest.approx((up - down) / (2 * step), rel=1e-3)


@pytest.mark.parametrize(("beta", "end"), [(1e-3, 0.0), (1 - 1e-3, 1.0)])
def test_the_ends_are_the_limits_of_the_quotients(beta, end):
    """JSD itself goes to 0 there."""
    teacher, student = (jnp.asarray(x) for x in pair(scale=1.0))
    near, at = (on_policy.divergence(teacher, student, beta=each) for each in (beta, end))
    np.testing.assert_allclose(near / min(beta, 1 - beta), at, rtol=0.02)
    assert float(jnp.max(near)) < 2e-2


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_none_and_it_is_bounded_and_finite(beta):
    teacher, student = (jnp.asarray(x) for x in pair())
    np.testing.assert_allclose(on_policy.divergence(teacher, teacher + 1.5, beta=beta), 0.0, atol=1e-6)
    sure = 300.0 * jnp.eye(11)[None, :2]
    value, gradient = jax.value_and_grad(
        lambda student: jnp.sum(on_policy.divergence(sure, student[None, ::-1], beta=beta))
    )(sure[0])
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(gradient)).all()
    if 0 < beta < 1:
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert float(value) == pytest.approx(2 * bound, rel=1e-5)
        assert float(jnp.max(on_policy.divergence(teacher, student, beta=beta))) < bound


# --------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_the_distribution_of_the_student(temperature):
    """Of a vocabulary of 4 and 2 tokens, all 13 targets: EOS alone, and 3 * 4 others."""
    config = dataclasses.replace(toy.MODEL, vocab_size=4, dropout_rate=0.0)
    structure, parameters = families.init(config, seed=1)
    model = families.join(structure, {**parameters, "logits_dense/kernel": 3 * parameters["logits_dense/kernel"]})
    source = jnp.tile(jnp.array([[2, 3, 2, 1]]), (4096, 1))
    draw = jax.jit(functools.partial(rollouts.sample, model, length=2, temperature=temperature))
    found = np.asarray(draw(source, key=jax.random.key(3)))
    possible = [(1, 0), *itertools.product((0, 2, 3), range(4))]
    before = decoding.shifted(jnp.asarray(possible), start=0)
    log_p = jax.nn.log_softmax(jax.jit(model)(source[: len(possible)], before) / temperature, axis=-1)
    first, second = np.exp(np.take_along_axis(np.asarray(log_p), np.asarray(possible)[..., None], -1))[..., 0].T
    expected = first * np.where(np.asarray(possible)[:, 0] == 1, 1.0, second)
    assert expected.sum() == pytest.approx(1.0, rel=1e-5)
    assert expected.max() > 3 * expected.min()
    counts = np.array([(found == np.asarray(each)).all(axis=1).sum() for each in possible])
    assert counts.sum() == len(found)
    statistic = ((counts - 4096 * expected) ** 2 / (4096 * expected)).sum()
    assert statistic < 32.9  # chi-square of 12 degrees of freedom, p = 0.001


def test_every_token_up_to_eos_counts():
    tokens = jnp.array([[5, 0, 7, 1, 0], [1, 0, 0, 0, 0], [4, 4, 4, 4, 4], [0, 0, 0, 0, 0]])
    tasks = jnp.array([[LABEL, 0, 0, 0, 0], [RATIONALE] * 5, [RATIONALE, 0, 0, 0, 0], [0] * 5])
    inputs, task_ids = rollouts.as_targets(tokens, tasks, eos_id=1)
    np.testing.assert_array_equal(inputs, [[0, 5, 0, 7, 1], [0, 1, 0, 0, 0], [0, 4, 4, 4, 4], [0] * 5])
    np.testing.assert_array_equal(task_ids, [[1, 1, 1, 1, 0], [2, 0, 0, 0, 0], [2] * 5, [0] * 5])
    assert [float(x) for x in rollouts.mean_length(task_ids)] == [10.0, 3.0]


# --------------------------------------------------------------------------------------- the step


STUDENT = dataclasses.replace(toy.MODEL, dropout_rate=0.0)
# A teacher of another family.
TEACHER = decoders.config("gemma3", vocab_size=384, emb_dim=32, num_heads=2, head_dim=16, mlp_dim=64, dropout_rate=0.0)
LENGTHS = (8, 6)


def batch_of() -> dict[str, np.ndarray]:
    """Sixteen rows, labels and rationales in turn, one of them without any token."""
    random = np.random.default_rng(11)
    source, target = np.zeros((16, LENGTHS[0]), np.int32), np.zeros((16, LENGTHS[1]), np.int32)
    for row in range(15):
        count = random.integers(1, LENGTHS[1])
        source[row, :5] = [*random.integers(2, 384, 4), 1]
        target[row, : count + 1] = [*random.integers(2, 384, count), 1]
    tasks = np.where(target > 0, np.arange(16)[:, None] % 2 + 1, 0).astype(np.int32)
    return {
        "encoder_input_tokens": source,
        "decoder_input_tokens": np.asarray(decoding.shifted(jnp.asarray(target), start=0)),
        "decoder_target_tokens": target,
        "decoder_task_ids": tasks,
        "decoder_loss_weights": (tasks > 0).astype(np.float32),
    }


def prepared(term: on_policy.OnPolicy, *, devices: int = 1, micro_batches: int = 1, execution=stacks.UNROLLED):
    """Makes the function of a step's key that computes lesson, loss, sums and gradients, laid out as asked."""
    partitioner = partitioning.FSDP.partitioner(jax.devices()[:devices])

    def placed(config, seed, scale=1.0):
        structure, shapes, axes = families.abstract(config, execution=execution)
        parameters = {name: scale * x for name, x in families.init(config, seed=seed)[1].items()}
        parameters = stacking.stack(parameters) if execution.layers == "scanned" else parameters
        return structure, jax.device_put(parameters, partitioner.shardings(shapes, parameters=shapes, axes=axes))

    structure, parameters = placed(STUDENT, 0)
    of_teacher, teacher = placed(TEACHER, 1, 1.5)
    separate = families.abstract(STUDENT)[0]
    loss = losses.Loss(objectives=losses.step_by_step(0.4), on_policy=term)

    @jax.jit
    def compute(parameters, teacher, batch, key):
        with partitioner.active():
            lesson = lessons.of(batch, parameters, teacher, student=separate, structure=of_teacher, term=term, key=key)
            assert lesson is not None
            found = loss_and_gradients(
                *(parameters, batch), structure=structure, loss=loss, micro_batches=micro_batches, vocabulary_chunks=1,
                dropout_key=key, lesson=lesson,
            )  # fmt: skip
            return (lesson.inputs, lesson.task_ids, lesson.sampled), *found

    def of_key(key):
        rows, value, sums, gradients = jax.device_get(
            compute(parameters, teacher, partitioner.put_batch(batch_of()), key)
        )
        metrics = {k: float(x) for name, each in sums.items() for k, x in each.means(name).items()}
        return rows, float(value), metrics, stacking.unstack(gradients)

    return of_key


FORWARD = on_policy.OnPolicy(share=0.3, beta=0.0, probability=0.5)


@pytest.fixture(scope="module")
def steps():
    """A step on the dataset's targets, and one on sampled ones."""
    compute = prepared(FORWARD)
    found = {}
    for seed in range(20):
        key = jax.random.key(seed)
        rows, *rest = compute(key)
        found.setdefault(bool(rows[2]), (key, rows, *rest))
        if len(found) == 2:
            break
    return found


@pytest.mark.parametrize("sampled", [False, True])
def test_a_step_is_the_whole_forward_divergence_on_fixed_targets(steps, sampled):
    """With beta 0 it is that of soft targets at K = V, and no gradient flows through the sampling."""
    _, (inputs, task_ids, _), value, metrics, gradients = steps[sampled]
    batch = {name: jnp.asarray(x) for name, x in batch_of().items()}
    inputs = jnp.asarray(inputs)
    assert bool((inputs == batch["decoder_input_tokens"]).all()) == (not sampled)
    assert (task_ids[15] == 0).all()
    structure, parameters = families.init(STUDENT, seed=0)
    of_teacher, teacher = families.init(TEACHER, seed=1)
    source, objectives = batch["encoder_input_tokens"], losses.step_by_step(0.4)
    taught = jax.jit(families.join(of_teacher, {name: 1.5 * x for name, x in teacher.items()}))(source, inputs)
    teacher_targets = soft_targets.largest(taught, count=384)

    def loss_of(parameters):
        model = families.join(structure, parameters)
        plain, sums = losses.weighted_cross_entropy(
            losses.token_statistics(model(source, batch["decoder_input_tokens"]), batch["decoder_target_tokens"]),
            task_ids_BT=batch["decoder_task_ids"],
            weights_BT=losses.token_weights(batch["decoder_task_ids"], objectives),
            objectives=objectives,
            z_loss=0.0,
        )
        logits = model(source, inputs)
        kl = soft_targets.divergence(logits, jax.nn.logsumexp(logits, axis=-1), teacher=teacher_targets).kl
        weights = losses.token_weights(jnp.asarray(task_ids), objectives)
        return 0.7 * plain + 0.3 * jnp.sum(weights * kl), (kl, sums)

    (want, (kl, sums)), expected = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(parameters)
    assert value == pytest.approx(float(want), rel=1e-5)
    for number, name in enumerate(("label", "rationale"), start=1):
        mine = task_ids == number
        assert mine.any()
        assert metrics[f"jsd/{name}"] == pytest.approx(float(np.asarray(kl)[mine].mean()), rel=1e-4)
        assert metrics[f"loss/{name}"] == pytest.approx(float(sums[name].means("x")["loss/x"]), rel=1e-5)
    assert metrics["on_policy"] == float(sampled)
    assert metrics["sampled_length"] == (pytest.approx((task_ids > 0).sum() / 15, rel=1e-6) if sampled else 0.0)
    for name, x in expected.items():
        np.testing.assert_allclose(gradients[name], x, rtol=1e-3, atol=3e-5 * np.abs(x).max(), err_msg=name)


def test_devices_micro_batches_and_scanned_layers_change_nothing(steps):
    scanned = stacks.Execution(layers="scanned", remat="full")
    compute = prepared(FORWARD, devices=4, micro_batches=4, execution=scanned)
    for key, rows, value, metrics, gradients in steps.values():
        again, its_value, its_metrics, its_gradients = compute(key)
        for ours, theirs in zip(again, rows, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert its_value == pytest.approx(value, rel=1e-5)
        assert its_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for name, x in gradients.items():
            np.testing.assert_allclose(its_gradients[name], x, rtol=1e-3, atol=3e-5 * np.abs(x).max(), err_msg=name)


def test_without_sampling_it_is_the_step_on_the_dataset(steps):
    key, _, value, metrics, gradients = steps[False]
    _, its_value, its_metrics, its_gradients = prepared(dataclasses.replace(FORWARD, probability=0.0))(key)
    assert its_value == pytest.approx(value, rel=1e-6)
    assert its_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    for name, x in gradients.items():
        np.testing.assert_allclose(its_gradients[name], x, rtol=1e-4, atol=1e-5 * np.abs(x).max(), err_msg=name)


# --------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds records, a teacher (run/) and another one (other/)."""
    place = tmp_path_factory.mktemp("taught")
    toy.write_records(place / "records")
    toy.write_untrained(place)
    model = dataclasses.replace(toy.MODEL, dropout_rate=0.0)
    checkpoints.save_parameters(place / "other", families.init(model, seed=1)[1], config=model, step=1)
    shutil.copy(place / "run" / "manifest.json", place / "other")
    return place


def student_config(run: Path, folder: Path, **changes) -> TrainConfig:
    defaults = {
        "teacher": str(folder / "run"),
        "on_policy": 1.0,
        "jsd_share": 0.9,
        "evaluate_test": False,
        "train_steps": 6,
    }
    defaults |= {"log_period": 1, "eval_period": 6, "learning_rate": optax.constant_schedule(1e-2)}
    return toy.config(run, folder / "records", **{**defaults, **changes})


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[TrainConfig, loop.Programs]:
    """A run that samples at every step, and its programs."""
    config = student_config(folder / "student", folder)
    programs = loop.Programs.of(config)
    loop.train(config, config_text="", programs=programs)
    return config, programs


def test_a_run_learns_from_its_teacher_and_resumes_bit_for_bit(finished, folder, monkeypatch):
    config, programs = finished
    found = lines(folder / "student")
    assert all(line["on_policy"] == 1.0 and 1 <= line["sampled_length"] <= 16 for line in found)
    assert found[-1]["jsd/rationale"] < 0.95 * found[0]["jsd/rationale"]
    of_checkpoint = set(runs.open_run(folder / "student").arrays)
    assert of_checkpoint == set(families.abstract(toy.MODEL)[1])  # the teacher is in memory alone
    first = dataclasses.replace(config, model_dir=str(folder / "resumed"))
    with finished_runs.ending_at_a_save(monkeypatch):
        loop.train(first, config_text="", programs=programs)
    with pytest.raises(FileExistsError, match=r"data\.teacher\.checksum"):
        loop.train(dataclasses.replace(first, teacher=str(folder / "other")), config_text="")
    with pytest.raises(FileExistsError, match=r"data\.teacher\.checksum"):
        loop.train(dataclasses.replace(first, teacher=None), config_text="")
    with pytest.raises(FileExistsError, match="jsd_share"):
        loop.train(dataclasses.replace(first, jsd_share=0.25), config_text="")
    shutil.copytree(folder / "run", folder / "moved")
    loop.train(dataclasses.replace(first, teacher=str(folder / "moved")), config_text="")
    measured = ("loss", "gradient_norm", "jsd/label", "sampled_length")
    for ours, theirs in zip(lines(folder / "resumed"), found, strict=True):
        assert [ours[name] for name in measured] == [theirs[name] for name in measured]


def test_a_replay_samples_again(finished, folder):
    config, _ = finished
    said = replay.replay(config, config.model_dir, step=5)
    line = lines(folder / "student")[4]
    for name, value in said["metrics"].items():
        assert value == pytest.approx(line[name], rel=1e-6), name
    norm = math.hypot(*said["gradients"].values())
    assert norm == pytest.approx(line["gradient_norm"], rel=1e-3)  # of the same samples
    with pytest.raises(ValueError, match="has changed since the run"):
        replay.replay(dataclasses.replace(config, teacher=str(folder / "other")), config.model_dir, step=5)


def test_what_cannot_be_taught_is_refused_before_training(folder, tmp_path):
    def fails(message: str, **changes) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            loop.train(student_config(tmp_path / "run", folder, **changes), config_text="")
        assert not (tmp_path / "run").exists()

    fails("teacher is ''", teacher="")
    fails("gone", teacher=str(tmp_path / "gone"))
    fails("on_policy is 1.5", on_policy=1.5)
    fails("jsd_beta is -0.1", jsd_beta=-0.1)
    fails("jsd_share is 0", jsd_share=0.0)
    fails("sampling_temperature is 0", sampling_temperature=0.0)
    fails("one target per row.*PACK = False", pack=True)
    fails("needs all logits at a time; got vocabulary_chunks 4", vocabulary_chunks=4)
    fails("has 384 rows, and the student's 400", model=dataclasses.replace(toy.MODEL, vocab_size=400))
    shutil.copytree(folder / "run", tmp_path / "strange")
    value = json.loads((folder / "run" / "manifest.json").read_text())
    value["data"]["options"]["vocabulary"] = bpe.write(tmp_path, bpe.byte_level(["abc"]))
    (tmp_path / "strange" / "manifest.json").write_text(json.dumps(value))
    fails("has another vocabulary", teacher=str(tmp_path / "strange"))
