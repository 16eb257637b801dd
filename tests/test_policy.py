"""Policy optimization: its gradient against the exact one, rewards, the step on any mesh, and runs that resume."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from builders import decoders, finished_runs

from sbs_jax.data import registry, release, rewards
from sbs_jax.student import decoding, families, losses, partitioning, policy, stacks
from sbs_jax.training import loop, replay
from sbs_jax.training.config import TrainConfig
from tasks import builtin, svamp

# ------------------------------------------------------------------------------------------ the gradient
# A policy of two tokens among three: 9 answers, so its objective and gradient are known exactly.

FIRST, SECOND = jnp.divmod(jnp.arange(9), 3)
RANDOM = np.random.default_rng(3)
START = {"first": RANDOM.normal(size=3), "second": RANDOM.normal(size=(3, 3))}
REFERENCE = {"first": RANDOM.normal(size=3), "second": RANDOM.normal(size=(3, 3))}
GAIN = jnp.asarray(RANDOM.normal(size=9), jnp.float32)
BETA = 0.3


def log_p(parameters, first, second):
    """Log probabilities of both tokens, [.., 2]."""
    of_first = jax.nn.log_softmax(parameters["first"])[first]
    return jnp.stack([of_first, jax.nn.log_softmax(parameters["second"], axis=-1)[first, second]], axis=-1)


def objective(parameters, *, gain=GAIN, beta=BETA):
    of_each, of_reference = (log_p(each, FIRST, SECOND).sum(-1) for each in (parameters, REFERENCE))
    return jnp.sum(jnp.exp(of_each) * (gain - beta * (of_each - of_reference)))


def term(**changes):
    return policy.Policy(rewards=(("own", 1.0),), **{"samples": 4, "kl_weight": BETA, **changes})


def drawn(parameters, *, prompts, samples=4, seed=0):
    p = np.exp(np.asarray(log_p(parameters, FIRST, SECOND).sum(-1), np.float64))
    return np.random.default_rng(seed).choice(9, size=prompts * samples, p=p / p.sum())


def loss_of(parameters, answers, of_policy, *, prompts, gain=GAIN):
    first, second = FIRST[answers], SECOND[answers]
    return policy.loss(
        log_p(parameters, first, second),
        log_p(REFERENCE, first, second),
        real_BT=jnp.ones((len(answers), 2)),
        rewards_BR=jnp.asarray(gain, jnp.float32)[answers][:, None],
        policy=of_policy,
        prompts=prompts,
    )[0]


def estimates(parameters, of_policy, *, batches=400, prompts=64):
    """Gradients of independent batches, flattened, [batches, 12]."""
    gradient = jax.jit(jax.grad(functools.partial(loss_of, of_policy=of_policy, prompts=prompts)))
    found = []
    for seed in range(batches):
        each = gradient(parameters, jnp.asarray(drawn(parameters, prompts=prompts, seed=seed)))
        found.append(np.concatenate([np.ravel(each[name]) for name in ("first", "second")]))
    return np.stack(found)


def exact(of=objective):
    found = jax.grad(of)(START)
    return np.concatenate([np.ravel(found[name]) for name in ("first", "second")])


def test_the_gradient_of_rloo_is_the_exact_one():
    found = -estimates(START, term())
    error = found.std(axis=0) / np.sqrt(len(found))
    assert error.max() < 0.006
    assert np.abs(found.mean(axis=0) - exact()).max() < 5 * error.max()


def test_a_penalty_of_k3_in_the_loss_would_have_another_gradient():
    """The penalty that others put into the loss, without the score's part, at the same answers."""

    def expected_k3(parameters):
        """Its gradient with the answers' probabilities held, as a loss on samples has it."""
        p = jnp.exp(jax.lax.stop_gradient(log_p(parameters, FIRST, SECOND).sum(-1)))
        ratio = log_p(REFERENCE, FIRST, SECOND) - log_p(parameters, FIRST, SECOND)
        return -BETA * jnp.sum(p[:, None] * (jnp.exp(ratio) - ratio - 1))

    of_kl = functools.partial(objective, gain=jnp.zeros(9))
    assert np.abs(exact(expected_k3) - exact(of_kl)).max() > 0.05
    ours = -estimates(START, term(), batches=100) + estimates(START, term(kl_weight=0.0), batches=100)
    assert np.abs(ours.mean(axis=0) - exact(of_kl)).max() < 0.02


@pytest.mark.parametrize("kind", policy.ADVANTAGES)
def test_equal_rewards_give_no_gradient(kind):
    found = policy.advantages(jnp.full((3, 4), 0.7), kind=kind)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)
    mixed = policy.advantages(jnp.asarray([[1.0, 0.0, 0.0, 0.0]]), kind=kind)[0]
    first = {"rloo": 1.0, "grpo": 0.75 / (np.sqrt(3) / 4), "dr_grpo": 0.75}[kind]
    np.testing.assert_allclose(mixed, first * np.array([1, -1 / 3, -1 / 3, -1 / 3]), rtol=1e-3)


@pytest.mark.parametrize(("gain", "beta"), [(np.eye(9)[4], 0.0), (np.zeros(9), 1.0)], ids=["bandit", "zero reward"])
def test_a_bandit_is_solved_and_without_rewards_it_returns_to_the_reference(gain, beta):
    parameters, optimizer = jax.tree.map(jnp.asarray, START), optax.adam(0.05)
    state = optimizer.init(parameters)
    gradient = jax.jit(jax.grad(functools.partial(loss_of, of_policy=term(kl_weight=beta), prompts=32, gain=gain)))
    for step in range(300):
        answers = jnp.asarray(drawn(parameters, prompts=32, seed=step))
        updates, state = optimizer.update(gradient(parameters, answers), state)
        parameters = optax.apply_updates(parameters, updates)
    p, wanted = (np.exp(log_p(each, FIRST, SECOND).sum(-1)) for each in (parameters, REFERENCE))
    if beta:
        np.testing.assert_allclose(p, wanted, atol=0.05)
    else:
        assert p[4] > 0.95


def test_metrics_are_those_of_the_answers():
    answers = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    first, second = FIRST[answers], SECOND[answers]
    real = np.ones((8, 2), np.float32)
    real[5, 1] = 0.0
    ours, theirs = log_p(START, first, second), log_p(REFERENCE, first, second)
    gains = np.float32(GAIN[answers])
    two = dataclasses.replace(term(), rewards=(("label", 2.0), ("ended", -1.0)))
    graded = jnp.stack([jnp.asarray(gains), jnp.ones(8)], axis=1)
    _, found = policy.loss(ours, theirs, real_BT=jnp.asarray(real), rewards_BR=graded, policy=two, prompts=2)
    means = {name: float(total / count) for name, (total, count) in found.items()}
    assert means == pytest.approx(
        {
            "reward": float(2 * gains.mean() - 1),
            "reward/label": float(gains.mean()),
            "reward/ended": 1.0,
            "kl": float((real * (ours - theirs)).sum(1).mean()),
            "entropy": float(-(real * ours).sum() / 15),
            "answer_length": 15 / 8,
            "equal_groups": 0.5,
        },
        rel=1e-5,
    )


# --------------------------------------------------------------------------------------------- rewards


def answer(text, *, right="yes", dataset=builtin.DATASET, kind="label", **changes):
    given = {"tokens": 2, "most": 8, "ended": True, **changes}
    return rewards.Answer(text=text, right=right, dataset=dataset, kind=kind, **given)


def test_rewards_by_name():
    names = ("label", "form", "ended", "short")
    assert rewards.of(answer("yes"), names, None) == [1, 1, 1, 0.75]
    assert rewards.of(answer("no", tokens=8, ended=False), names, None) == [0, 1, 0, 0]
    assert rewards.of(answer("perhaps"), names, None)[:2] == [0, 0]
    reasoned = functools.partial(answer, kind="rationale_then_label", right="Iron sinks. Answer: no")
    assert rewards.of(reasoned("It swims. Answer: no"), names, None)[:2] == [1, 1]
    assert rewards.of(reasoned("no"), names, None)[:2] == [0, 0]
    equation = functools.partial(answer, dataset=svamp.DATASET, right="( 8.0 - 3.0 )")
    assert rewards.of(equation("8 - 3"), names, None)[:2] == [1, 1]
    assert rewards.of(equation("3 - 8"), names, None)[:2] == [0, 1]
    assert rewards.of(answer("yes"), ("own", "label"), lambda each: len(each.text) / 10) == [0.3, 1]
    with pytest.raises(ValueError, match="The reward 'own' of the answer 'yes' is nan; expected a number"):
        rewards.of(answer("yes"), ("own",), lambda each: float("nan"))


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds records and a student that has learned half of its task."""
    place = tmp_path_factory.mktemp("policy")
    toy.write_records(place / "records")
    config = toy.config(
        *(place / "start", place / "records"),
        model=dataclasses.replace(toy.MODEL, dropout_rate=0.0),
        train_steps=60,
        eval_period=60,
        checkpoint_period=60,
        mixture_or_task_name="toy_label",
        learning_rate=optax.constant_schedule(5e-3),
        evaluate_test=False,
    )
    loop.train(config, config_text="")
    return place


def rewarded(run: Path, folder: Path, **changes) -> TrainConfig:
    start = str(folder / "start")
    defaults = {
        "model": dataclasses.replace(toy.MODEL, dropout_rate=0.0),
        "mixture_or_task_name": "toy_label",
        "task_feature_lengths": {"inputs": 20, "targets": 6},
        "initial_checkpoint_path": start,
        "teacher": start,
        "rewards": {"label": 1.0, "ended": 0.1},
        "evaluate_test": False,
        "log_period": 1,
        "eval_period": 6,
        "learning_rate": optax.constant_schedule(4e-3),
    }
    return toy.config(run, folder / "records", **{**defaults, **changes})


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def test_rewards_rise_and_a_preempted_run_ends_bit_for_bit(folder, monkeypatch):
    config = rewarded(folder / "run", folder, train_steps=60, eval_period=60, checkpoint_period=30)
    programs = loop.Programs.of(config)
    loop.train(config, config_text="", programs=programs)
    found = lines(folder / "run")
    first, last = (np.mean([line["reward/label"] for line in part]) for part in (found[:10], found[-10:]))
    assert last > first + 0.08
    assert found[0]["kl"] == pytest.approx(0.0, abs=1e-4)  # it begins as its reference
    assert all(line["kl"] > -0.5 and 0 <= line["equal_groups"] <= 1 for line in found)
    assert found[-1]["kl"] > 0.01

    resumed = dataclasses.replace(config, model_dir=str(folder / "resumed"))
    with finished_runs.ending_at_a_save(monkeypatch):
        loop.train(resumed, config_text="", programs=programs)
    with pytest.raises(FileExistsError, match="samples"):
        loop.train(dataclasses.replace(resumed, samples=2), config_text="")
    loop.train(resumed, config_text="", programs=programs)
    names = ("loss", "gradient_norm", "reward", "kl", "entropy")
    assert [[line[name] for name in names] for line in lines(folder / "resumed")] == [
        [line[name] for name in names] for line in found
    ]
    with pytest.raises(ValueError, match=r"sbs replay.*rewards"):
        replay.replay(config, config.model_dir, step=5)


@pytest.mark.slow
def test_the_method_s_file_raises_the_reward_of_the_built_in_dataset(starter, tmp_path):
    """The commands that users type: a student of 100 rows and few steps, then its rewards on all rows."""
    builtin.write_release(tmp_path / "release", rows={"train": 400, "validation": 50, "test": 50}, seed=7)
    written = release.import_release(
        registry.get("builtin"), release_dir=tmp_path / "release", records_dir=tmp_path / "records", parser="strict"
    )
    assert written
    experiment = "--gin_file=gin_configs/experiments/builtin/demo.gin"
    flags = [f"--gin.RECORDS_DIR={tmp_path / 'records'}", "--gin.CHECKPOINT_PERIOD=50", "--gin.LOG_PERIOD=1"]

    def train(method: str, *more: str, steps: int) -> list[dict]:
        method_file, run = f"--gin_file=gin_configs/methods/{method}.gin", tmp_path / method
        steps_of = [f"--gin.TRAIN_STEPS={steps}", f"--gin.EVAL_PERIOD={steps}", f"--gin.MODEL_DIR={run}"]
        done = starter.run(tmp_path, ["train", experiment, method_file, *flags, *steps_of, *more])
        assert done.returncode == 0, done.stderr
        return lines(run)

    train("step_by_step", "--gin.FRACTION=0.25", steps=60)
    found = train(
        "rloo", f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / 'step_by_step'}", "--gin.LEARNING_RATE=5e-4", steps=50
    )
    first, last = (np.mean([line["reward"] for line in part]) for part in (found[:10], found[-10:]))
    assert last > first + 0.1


MESHES = {
    "2x2x2": {
        "layout": partitioning.Layout(slice=1, data=2, fsdp=2, tensor=2),
        "micro_batches": 2,
    },
    "2x2x2, scanned, chunks": {
        "layout": partitioning.Layout(slice=1, data=2, fsdp=2, tensor=2),
        "execution": stacks.Execution(layers="scanned", remat="minimal"),
        "vocabulary_chunks": 4,
    },
}


@pytest.mark.parametrize("changes", MESHES.values(), ids=MESHES)
def test_meshes_micro_batches_and_chunks_change_nothing(folder, changes):
    want, got = (first_steps(rewarded(folder / "unused", folder, **options), folder) for options in ({}, changes))
    for ours, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name


def first_steps(config, folder):
    """Metrics of the first three steps."""
    found = folder / f"steps-{len(list(folder.glob('steps-*')))}"
    loop.train(dataclasses.replace(config, model_dir=str(found), train_steps=3), config_text="")
    names = ("loss", "gradient_norm", "reward", "kl", "entropy", "equal_groups")
    return [{name: line[name] for name in names} for line in lines(found)]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_sampled_answer_has_its_teacher_forced_probability(kind):
    model_config = dataclasses.replace(toy.MODEL, dropout_rate=0.0) if kind == "t5" else decoders.config(kind)
    structure, parameters = families.init(model_config, seed=1)
    model = families.join(structure, parameters)
    sources = np.random.default_rng(0).integers(3, 200, (6, 9)).astype(np.int32)
    sources[::2, 6:] = 0
    keys = jax.random.bits(jax.random.key(0), (6, 2), jnp.uint32)
    options = {"length": 7, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    tokens, scores = decoding.sample(model, jnp.asarray(sources), keys, **options)
    shifted = decoding.shifted(tokens, start=decoding.PAD)
    found = losses.token_statistics(model(jnp.asarray(sources), shifted), tokens)
    ends = np.asarray(tokens) == model_config.eos_id
    real = np.cumsum(ends, axis=1) - ends == 0
    np.testing.assert_allclose((real * (found.target - found.log_z)).sum(axis=1), scores, atol=1e-4)


def test_what_does_not_go_with_rewards_is_refused(folder, tmp_path):
    def fails(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            rewarded(tmp_path / "run", folder, **changes)

    fails("a reward is 'lable'|A reward is 'lable'", rewards={"lable": 1.0})
    fails("rewards is empty", rewards={})
    fails("OWN_REWARD a function", rewards={"own": 1.0})
    fails("OWN_REWARD a function", own_reward=lambda each: 1.0)
    fails("samples is 1", samples=1)
    fails("kl_weight is -1", kl_weight=-1.0)
    fails("advantage is 'ppo'", advantage="ppo")
    fails("toy_step_by_step is trained; expected one task", mixture_or_task_name="toy_step_by_step")
    fails("teacher is None, but kl_weight is above 0", teacher=None)
    fails("dropout_rate is 0.1", model=toy.MODEL)
    fails("pack is True", pack=True)
    fails("number_slots is True", data=toy.options(folder / "records", number_slots=True))
    fails("soft targets are given", soft_targets="x")
