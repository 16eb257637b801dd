"""Early stopping by patience, also resumed and with several processes; the warning that training rows are memorized."""

import dataclasses
import logging
import os
import signal

import optax
import pytest
import toy
from builders.finished_runs import assert_same

from sbs_jax import hosts
from sbs_jax.hosts import api, preemption
from sbs_jax.run import checkpoints, directory
from sbs_jax.stats import results
from sbs_jax.training import loop, stopping


@pytest.mark.parametrize(
    ("scores", "patience", "ends"),
    [
        ([50, 60, 55], 1, True),
        ([50, 60, 55], 2, False),
        ([50, 60, 60, 55], 2, True),  # an equal score is not better
        ([60, 50, 55, 61], 3, False),
        ([60, 50, 55, 59], 3, True),
        ([float("nan"), 40, 50], 1, False),
        ([50, float("nan")], 1, True),
        ([float("nan")] * 2, 2, True),
        ([], 1, False),
        ([60, 50, 40, 30], None, False),
    ],
)
def test_patience_counts_evaluations_since_the_best(scores, patience, ends):
    assert stopping.out_of_patience({10 * (i + 1): float(score) for i, score in enumerate(scores)}, patience) is ends


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory):
    return toy.write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, records_dir):
    """A run that could make 60 steps, and its compiled programs."""
    config = toy.config(
        tmp_path_factory.mktemp("whole") / "run", records_dir, train_steps=60, patience=2, checkpoint_period=2
    )
    programs = loop.Programs.of(config)
    return config, loop.train(config, config_text="", programs=programs), programs


def test_a_run_ends_early_and_says_why(whole):
    config, result, programs = whole
    lines = [line for line in directory.read_metrics(config.model_dir) if line["kind"] == "validation"]
    scores = {line["step"]: line["accuracy"] for line in lines}
    last = max(scores)
    assert last < 60
    assert stopping.out_of_patience(scores, 2)
    assert not stopping.out_of_patience({step: score for step, score in scores.items() if step < last}, 2)
    assert result["test"]["step"] == stopping.best_step(scores) == last - 6
    ended = directory.read_manifest(config.model_dir)["ended"]
    assert (ended["step"], ended["memorized"]) == (last, None)
    assert ended["why"] == (
        f"early, at step {last} of 60: no better validation score after step {last - 6}, in 2 evaluations"
    )
    # Repeated, it is finished.
    before = directory.read_metrics(config.model_dir)
    assert loop.train(config, config_text="", programs=programs) == result
    assert directory.read_metrics(config.model_dir) == before
    assert directory.read_manifest(config.model_dir)["ended"] == ended
    loaded = results.load(results.identify(config.model_dir))
    assert (loaded.updates, loaded.patient, loaded.ended) == (last, True, ended)


def test_a_run_that_is_preempted_again_and_again_ends_early_at_the_same_step(whole, tmp_path, monkeypatch):
    """While it trains, in its last evaluation, and before its test."""
    config, _, programs = whole
    config = dataclasses.replace(config, model_dir=str(tmp_path / "run"))
    last = directory.read_manifest(whole[0].model_dir)["ended"]["step"]
    ask, left = hosts.preemption_requested, [0]

    def preemption_requested():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            api._preempted.wait(10)
        return ask()

    monkeypatch.setattr(hosts, "preemption_requested", preemption_requested)
    # Each step asks once; each evaluation, every third step, once per batch, of which there are two.
    trains = 5 * (last // 3 - 2) + 1
    for asks, step, evaluated in ((trains, last - 5, last - 6), (5 + 2 + 1, last, last - 3), (2 + 1, last, last)):
        left[0] = asks
        with pytest.raises(preemption.PreemptedError):
            loop.train(config, config_text="", programs=programs)
        lines = directory.read_metrics(config.model_dir)
        assert checkpoints.steps(config.model_dir)[-1] == step
        assert max(line["step"] for line in lines if line["kind"] == "validation") == evaluated
        assert not any(line["kind"] == "test" for line in lines)
    loop.train(config, config_text="", programs=programs)
    assert_same(tmp_path / "run", whole[0].model_dir)
    ended = directory.read_manifest(config.model_dir)["ended"]
    assert ended == directory.read_manifest(whole[0].model_dir)["ended"]


def test_another_patience_is_another_configuration(whole):
    config, _, _ = whole
    with pytest.raises(FileExistsError, match=r"(?s)-settings.patience = 2.*\+settings.patience = 3"):
        loop.train(dataclasses.replace(config, patience=3), config_text="")
    with pytest.raises(ValueError, match="patience is 0; expected a whole number of at least 1"):
        dataclasses.replace(config, patience=0)


# Memorized training rows


@pytest.mark.parametrize(
    ("token_accuracy", "tokens", "validation", "rows", "warns"),
    [
        (1.0, 2.0, 60.0, 400, True),
        (0.99, 2.0, 60.0, 400, True),
        (0.96, 2.0, 60.0, 400, False),  # 92 % of the answers, perhaps
        (0.99, 20.0, 60.0, 400, False),  # the same share of longer answers
        (1.0, 2.0, 91.0, 400, False),  # nearly as good on validation
        (1.0, 2.0, 75.0, 20, False),  # too few rows to say
        (1.0, 2.0, 60.0, 20, True),
        (None, 2.0, 60.0, 400, False),
    ],
)
def test_memorized_is_only_what_is_certainly_so(token_accuracy, tokens, validation, rows, warns):
    found = stopping.memorized(
        token_accuracy, answer_tokens=tokens, validation=validation, rows=rows, metric="accuracy"
    )
    assert (found is not None) is warns
    if found is not None:
        assert f"accuracy is {validation:.1f} % on {rows} validation rows" in found
        assert "of the training answers of the latest steps are right" in found


def test_a_run_that_memorizes_says_so(tmp_path, caplog):
    """Eight rows are learned by heart."""
    records_dir = toy.write_records(tmp_path / "records", train_rows=8, other_rows=56)
    config = toy.config(
        tmp_path / "run", records_dir, train_steps=100, eval_period=100, checkpoint_period=100, log_period=10,
        mixture_or_task_name="toy_label", alpha=1.0, learning_rate=optax.constant_schedule(3e-3), eval_batch_size=56,
        model=dataclasses.replace(toy.MODEL, dropout_rate=0.0), evaluate_test=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        result = loop.train(config, config_text="")
    ended = directory.read_manifest(config.model_dir)["ended"]
    assert ended["why"] == "all 100 steps"
    said = f"accuracy is {result['validation']['accuracy']:.1f} % on 56 validation rows"
    assert said in ended["memorized"]
    assert said in caplog.text
