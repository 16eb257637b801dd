"""Non-finite steps, and preemption at any moment of a run."""

import dataclasses
import functools
import json
import math
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from builders.finished_runs import assert_same

from sbs_jax import hosts
from sbs_jax.data import batches, registry
from sbs_jax.hosts import api, preemption
from sbs_jax.run import checkpoints, directory
from sbs_jax.student import families
from sbs_jax.training import failures, loop, replay
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import TrainState, root_key, train_step

PACKED = {"pack": True, "task_feature_lengths": {"inputs": 40, "targets": 32}, "batch_size": 16, "micro_batches": 2}


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory):
    return toy.write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, records_dir):
    """An uninterrupted packed run over several epochs, and its compiled programs.

    Log, evaluation and checkpoints fall on different steps.
    """
    config = toy.config(
        tmp_path_factory.mktemp("whole") / "run", records_dir, train_steps=14, log_period=5, eval_period=7,
        checkpoint_period=3, eval_batch_size=8, **PACKED,
    )  # fmt: skip
    programs = loop.Programs.of(config)
    loop.train(config, config_text="", programs=programs)
    return config, programs


def told_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Sends a real SIGTERM just before the run's `call`-th check for one."""
    ask, calls = hosts.preemption_requested, []

    def preemption_requested() -> bool:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            api._preempted.wait(10)
        return ask()

    monkeypatch.setattr(hosts, "preemption_requested", preemption_requested)


# Calls 1 to 7 follow steps, 8 and 9 come before the batches of the first evaluation, 10 to 16 follow steps,
# 17 and 18 are in the second evaluation, 19 and 20 in the test.
@pytest.mark.slow
@pytest.mark.parametrize(
    "calls",
    [
        (18, 2, 1),
        *(pytest.param(x, marks=pytest.mark.faults) for x in [(1,), (4, 4), (7,), (8, 1), (9, 7), (16, 2), (20,)]),
    ],
    ids=str,
)
def test_a_run_that_was_told_to_end_ends_as_if_it_had_not(whole, tmp_path, monkeypatch, calls):
    uninterrupted, programs = whole
    config = dataclasses.replace(uninterrupted, model_dir=str(tmp_path / "run"))
    for call in calls:
        with monkeypatch.context() as patch:
            told_at(patch, call)
            with pytest.raises(preemption.PreemptedError, match="Repeat the command"):
                loop.train(config, config_text="", programs=programs)
    loop.train(config, config_text="", programs=programs)
    assert_same(config.model_dir, uninterrupted.model_dir)


def step_function(config: TrainConfig):
    """Makes a jitted step on one device, a fresh state, and a batch."""
    optimizer = config.gradient_transformation()
    structure, parameters = families.init(config.model, seed=0)
    state = TrainState(jnp.int32(0), parameters, optimizer.init(parameters), jnp.int32(0), root_key(0))
    found = batches.train_dataset(
        config.mixture_or_task_name, lengths=config.task_feature_lengths, split="train", batch_size=8,
        pack=config.pack, seed=0, skip_batches=0,
    )  # fmt: skip
    step = functools.partial(train_step, structure=structure, config=config, optimizer=optimizer, separate=structure)
    return jax.jit(step), state, {name: jnp.asarray(x) for name, x in next(found).items()}


def poisoned(state: TrainState, value: float) -> TrainState:
    name = "token_embedder/embedding"
    parameters = {**state.parameters, name: state.parameters[name].at[:].set(value)}
    return dataclasses.replace(state, parameters=parameters)


def test_a_step_that_is_not_finite_changes_nothing_and_ends_the_rest(records_dir, tmp_path):
    config = toy.config(tmp_path, records_dir, skip_non_finite=1)
    registry.configure(config.data)
    step, state, batch = step_function(config)
    for value in (math.inf, math.nan):
        bad = poisoned(state, value)
        first, metrics = step(bad, batch)
        assert not math.isfinite(float(metrics["gradient_norm"]))
        assert (int(first.step), int(first.skipped)) == (1, 1)
        second, _ = step(first, batch)
        assert (int(second.step), int(second.skipped)) == (1, 2)  # one too many: no step from here on
        again, _ = step(second, batch)
        assert (int(again.step), int(again.skipped)) == (1, 2)
        third, _ = step(dataclasses.replace(state, step=second.step, skipped=second.skipped), batch)
        assert (int(third.step), int(third.skipped)) == (1, 2)
        for got, want in ((second, bad), (third, state)):
            for name, array in want.parameters.items():
                np.testing.assert_array_equal(got.parameters[name], array)
        for got, want in zip(jax.tree.leaves(second.optimizer), jax.tree.leaves(state.optimizer), strict=True):
            np.testing.assert_array_equal(got, want)
    good, _ = step(state, batch)
    assert (int(good.step), int(good.skipped)) == (1, 0)
    assert any(np.any(good.parameters[name] != want) for name, want in state.parameters.items())


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    """Records, a start and the ids of `toy.poison`."""
    folder = tmp_path_factory.mktemp("poison")
    path = toy.write_records(folder / "records")
    return path, *toy.poison(path, folder / "start.npz")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_what_a_replay_needs(poison, tmp_path):
    path, start, ids = poison
    config = toy.config(
        tmp_path / "run", path, train_steps=30, log_period=7, checkpoint_period=4, eval_period=30,
        evaluate_test=False, initial_checkpoint_path=str(start), **PACKED,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step \d+ is not finite; .*sbs replay"):
        loop.train(config, config_text="")
    step = failures.newest(config.model_dir)
    assert step is not None
    kept = failures.read(config.model_dir, step)
    assert kept is not None
    assert [row["step"] for row in kept["steps"]][-1] == step
    assert all(isinstance(row["loss"], float) for row in kept["steps"][:-1])
    assert kept["steps"][-1]["gradient_norm"] in ("nan", "inf")
    assert ids & {example["id"] for example in kept["examples"]}
    # Every earlier checkpoint is good, and none is of a later step.
    assert all(earlier < step for earlier in checkpoints.steps(config.model_dir))

    found = replay.replay(config, config.model_dir, step=None)
    assert found["step"] == step
    assert not math.isfinite(found["metrics"]["gradient_norm"])
    guilty = {row["id"] for row in found["examples"] if not math.isfinite(row["alone"])}
    assert guilty
    assert guilty <= ids
    # Examples that share a row with it are not finite in the batch, but finite by themselves.
    rows = {row["row"] for row in found["examples"] if row["id"] in guilty}
    assert all(math.isfinite(row["loss"]) == (row["row"] not in rows) for row in found["examples"])
    assert found["parameters"] == {
        "token_embedder/embedding": {"not finite": toy.MODEL.emb_dim, "first at": [toy.POISON, 0]}
    }
    said = replay.text(found, kept)
    assert f"toy_label {sorted(guilty)[0]}" in said or f"toy_rationale {sorted(guilty)[0]}" in said
    # Without what the failure kept, the state comes from the checkpoints and the steps since: the same.
    for file in (Path(config.model_dir) / "failures" / str(step) / "checkpoints").iterdir():
        file.rename(tmp_path / file.name)
    again = replay.replay(config, config.model_dir, step=step)
    assert json.dumps(again) == json.dumps(found)


@pytest.mark.slow
def test_the_command_line_says_how_to_replay_and_replays(starter, tmp_path):
    folder = toy.write_command(tmp_path, TRAIN_STEPS=30, EXAMPLES=2, CHECKPOINT_PERIOD=4, EVAL_PERIOD=30, LOG_PERIOD=7)
    start, ids = toy.poison(folder / "records", folder / "start.npz")
    run = folder / "run"
    with starter.alone(
        folder, toy.train_flags(folder, run, f"INITIAL_CHECKPOINT_PATH={start}"), path=[folder]
    ) as process:
        assert process.wait() == 1
        assert f"`sbs replay {run}` shows which" in process.complained()
    step = failures.newest(run)
    assert step is not None
    with starter.alone(folder, ["replay", str(run)], path=[folder]) as process:
        assert process.wait() == 0, process.complained()
        said = process.said()
    assert re.search(rf"^Step {step}: .*\bloss nan", said)
    guilty = re.findall(r" nan  toy_\w+ ([\w-]+)$", said, re.MULTILINE)
    assert guilty
    assert set(guilty) <= ids
    assert f"{toy.MODEL.emb_dim} values are not finite, the first at [{toy.POISON}, 0]" in said
    # Any other step: from the newest checkpoint before it, with the same numbers as in the run.
    kept = failures.read(run, step)
    assert kept is not None
    before = kept["steps"][-2]
    with starter.alone(folder, ["replay", str(run), "--step", str(before["step"]), "--json"], path=[folder]) as process:
        assert process.wait() == 0, process.complained()
        found = json.loads(process.said())
    assert {name: before[name] for name in found["metrics"]} == found["metrics"]


@pytest.mark.slow
def test_steps_that_are_not_finite_are_left_out_up_to_a_number(poison, tmp_path, monkeypatch):
    path, start, _ = poison
    whole = toy.config(
        tmp_path / "whole", path, train_steps=24, log_period=1, checkpoint_period=5, eval_period=24,
        evaluate_test=False, initial_checkpoint_path=str(start), skip_non_finite=100, **PACKED,
    )  # fmt: skip
    programs = loop.Programs.of(whole)
    loop.train(whole, config_text="", programs=programs)
    lines = [line for line in directory.read_metrics(whole.model_dir) if line["kind"] == "train"]
    left_out = [line["step"] for line in lines if "loss" not in line]
    assert left_out
    assert lines[-1]["skipped"] == len(left_out)
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    stopped = dataclasses.replace(whole, model_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        told_at(patch, left_out[0] + 1)
        with pytest.raises(preemption.PreemptedError):
            loop.train(stopped, config_text="", programs=programs)
    loop.train(stopped, config_text="", programs=programs)
    assert_same(stopped.model_dir, whole.model_dir)
    few = dataclasses.replace(whole, model_dir=str(tmp_path / "few"), skip_non_finite=1)
    with pytest.raises(FloatingPointError, match="after 1 skipped steps"):
        loop.train(few, config_text="")
    assert failures.newest(few.model_dir) == left_out[1]


def test_the_examples_of_a_batch_are_those_that_it_was_made_of(records_dir):
    registry.configure(toy.options(records_dir))
    options = {"lengths": {"inputs": 40, "targets": 32}, "split": "train", "batch_size": 8, "pack": True, "seed": 3}
    found = batches.train_dataset("toy_step_by_step", skip_batches=5, **options)
    batch = next(found)
    examples, alone = batches.batch_examples("toy_step_by_step", batch=5, **options)
    assert len(alone["decoder_target_tokens"]) == len(examples) == sum(batch["decoder_segment_ids"].max(axis=1))
    texts = {
        (task, row.id): row.inputs
        for task in ("toy_label", "toy_rationale")
        for row in registry.examples(task, "train")
    }
    vocabulary = registry.vocabulary("byte")
    for number, example in enumerate(examples):
        mine = batch["encoder_segment_ids"][example.row] == example.segment
        tokens = batch["encoder_input_tokens"][example.row][mine]
        assert vocabulary.decode([int(x) for x in tokens[:-1]]) == texts[example.task, example.id]
        np.testing.assert_array_equal(alone["encoder_input_tokens"][number][: len(tokens)], tokens)
