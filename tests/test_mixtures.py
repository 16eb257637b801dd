"""Mixtures of several datasets: their names, objectives and turns, and one student trained on two of them."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import toy
from builders.finished_runs import unmeasured

from sbs_jax.cli import main
from sbs_jax.data import batches, records, registry, selection, task_names
from sbs_jax.run import directory, manifest
from sbs_jax.stats import folders, results, study
from sbs_jax.student import losses
from sbs_jax.training import loop

BOTH = "toy.twin_step_by_step"
TWIN = dataclasses.replace(toy.DATASET, name="twin")


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of toy, 48 rows to train on, and of twin, 24."""
    folder = toy.write_records(tmp_path_factory.mktemp("records"))
    registry.add(TWIN)
    for split in ("train", "validation", "test"):
        rows = records.read_records(folder / "toy" / f"{split}.jsonl")
        (folder / "twin").mkdir(exist_ok=True)
        records.write_records(folder / "twin" / f"{split}.jsonl", rows[: 24 if split == "train" else 8])
    return folder


@pytest.fixture(autouse=True)
def options(records_dir: Path) -> selection.DataOptions:
    found = toy.options(records_dir)
    registry.configure(found)
    return found


# ------------------------------------------------------------------------------------- names


def test_a_name_of_several_datasets_has_a_part_for_each(records_dir):
    assert task_names.task_name(dataset=("toy", "twin"), kind="step_by_step") == BOTH
    assert task_names.parts(BOTH) == ("toy_step_by_step", "twin_step_by_step")
    assert task_names.subtasks(BOTH) == ("toy_label", "toy_rationale", "twin_label", "twin_rationale")
    assert task_names.graded(BOTH) == ("toy_label", "twin_label")
    assert task_names.parts("toy.twin_rationale_then_label") == (
        "toy_rationale_then_label",
        "twin_rationale_then_label",
    )
    assert task_names.subtasks("toy.twin_cascade")[2:] == ("twin_label_given_rationale", "twin_rationale")
    assert task_names.graded("toy.twin_cascade") == ("toy_label_given_rationale", "twin_label_given_rationale")
    assert task_names.task_ids("toy.twin_cascade") == task_names.task_ids(BOTH) == (1, 2, 3, 4)
    assert task_names.task_ids("toy.twin_label") == (1, 2)
    assert task_names.task_ids("toy_rationale") == (losses.RATIONALE,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy.twim_label", r"Unknown task or mixture 'toy.twim_label'"),
        ("toy_lable", r"Did you mean 'toy_label'"),
    ],
)
def test_unknown_parts_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        task_names.parts(name)


def test_a_mixture_is_no_single_task():
    with pytest.raises(ValueError, match=r"toy.twin_label has several parts; expected one of them: toy_label, twin_la"):
        task_names.split("toy.twin_label")
    with pytest.raises(ValueError, match=r"DATASET is \('toy', 'toy'\); expected"):
        task_names.task_name(dataset=("toy", "toy"), kind="label")


# -------------------------------------------------------------------------------- objectives


def test_objectives_are_alpha_and_the_rest_times_the_weight_of_a_dataset():
    found = task_names.objectives(BOTH, alpha=0.25)
    assert [(each.name, each.weight) for each in found] == [
        ("toy/label", 0.125),
        ("toy/rationale", 0.375),
        ("twin/label", 0.125),
        ("twin/rationale", 0.375),
    ]
    weighed = task_names.objectives("toy.twin_label", alpha=1.0, weights={"toy": 3.0, "twin": 1.0})
    assert [(each.name, each.weight) for each in weighed] == [("toy/label", 3.0), ("twin/label", 1.0)]
    assert task_names.objectives("toy_step_by_step", alpha=0.3) == losses.step_by_step(0.3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"toy": 1.0}, r"LOSS_WEIGHTS gives 'twin' no weight"),
        ({"toy": 1.0, "twin": 0.0}, r"LOSS_WEIGHTS\['twin'\] is 0.0; expected"),
        ({"toy": 1.0, "twins": 1.0}, r"LOSS_WEIGHTS has 'twins', which is not trained.*Did you mean 'twin'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_compile(tmp_path, records_dir, weights, message):
    with pytest.raises(ValueError, match=message):
        toy.config(tmp_path, records_dir, mixture_or_task_name=BOTH, loss_weights=weights)


def test_weights_of_one_dataset_are_refused(tmp_path, records_dir):
    with pytest.raises(ValueError, match=r"toy_step_by_step is one dataset; ALPHA weighs"):
        toy.config(tmp_path, records_dir, loss_weights={"toy": 1.0})


def test_the_loss_of_four_objectives_is_that_of_float64():
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(3, 7, 11)), random.integers(11, size=(3, 7))
    ids = random.integers(5, size=(3, 7))
    objectives = task_names.objectives(BOTH, alpha=0.3, weights={"toy": 0.7, "twin": 2.0})
    entropy = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = sum(each.weight * entropy[ids == number].mean() for number, each in enumerate(objectives, start=1))
    loss, sums = losses.weighted_cross_entropy(
        losses.token_statistics(jnp.asarray(logits, jnp.float32), jnp.asarray(targets)),
        task_ids_BT=jnp.asarray(ids),
        weights_BT=losses.token_weights(jnp.asarray(ids), objectives),
        objectives=objectives,
        z_loss=0.0,
    )
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    means = sums["twin/rationale"].means("twin/rationale")
    assert float(means["loss/twin/rationale"]) == pytest.approx(entropy[ids == 4].mean(), rel=1e-6)
    assert float(means["tokens/twin/rationale"]) == (ids == 4).sum()


# -------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize(
    ("rates", "counts"),
    [((1, 1, 1), (1, 1, 1)), ((0.5, 0.25), (2, 1)), ((3, 1, 4), (3, 1, 4)), ((549_367, 9_741, 800), None)],
)
def test_turns_have_the_shares_of_their_rates_and_are_spread_evenly(rates, counts):
    order = task_names.cycle([float(rate) for rate in rates])
    found = Counter(order)
    if counts is not None:
        assert tuple(found[part] for part in range(len(rates))) == counts
    shares = np.array(rates) / sum(rates)
    for part, share in enumerate(shares):
        mine = np.cumsum(np.array(order) == part)
        # Never more than a turn away from the exact share, at any point.
        assert np.abs(mine - share * np.arange(1, len(order) + 1)).max() < 1.6
        assert found[part] / len(order) == pytest.approx(share, rel=1e-2)


def drawn(*, count: int, **changes) -> Counter[str]:
    """Counts the examples of each task in some batches."""
    found = [
        batches.batch_examples(
            BOTH, lengths=toy.DATASET.feature_lengths, split="train", batch_size=24, pack=False, seed=0, batch=number
        )[0]
        for number in range(count)
    ]
    return Counter(example.task for example in itertools.chain.from_iterable(found))


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1 / 2),
        ({"rates": "proportional"}, 2 / 3),
        ({"rates": "proportional", "rate_maximum": 24}, 1 / 2),
        ({"rates": "proportional", "temperature": 2.0}, 2**0.5 / (1 + 2**0.5)),
        ({"rates": {"toy": 3, "twin": 1}}, 3 / 4),
    ],
)
def test_datasets_have_the_share_of_batches_that_their_rates_say(records_dir, changes, share):
    registry.configure(toy.options(records_dir, **changes))
    found = drawn(count=8)
    assert found["toy_label"] / (found["toy_label"] + found["twin_label"]) == pytest.approx(share, abs=0.02)
    assert found["toy_label"] == pytest.approx(found["toy_rationale"], abs=1)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"toy": 1}, r"RATES gives 'twin' no rate"),
        ({"toy": 1, "twin": 0}, r"RATES\['twin'\] is 0; expected"),
        ({"toy": 1, "twin": 1, "thrid": 1}, r"RATES has 'thrid', which is not trained"),
    ],
)
def test_rates_that_do_not_fit_are_refused(records_dir, rates, message):
    registry.configure(toy.options(records_dir, rates=rates))
    with pytest.raises(ValueError, match=message):
        drawn(count=1)


def test_every_row_of_a_dataset_comes_once_in_its_own_epoch(records_dir):
    registry.configure(toy.options(records_dir, rates="proportional"))
    arguments = {"lengths": toy.DATASET.feature_lengths, "split": "train", "pack": False, "seed": 0}
    found = [  # 144 places are an epoch of each task
        example
        for number in range(6)
        for example in batches.batch_examples(BOTH, **arguments, batch_size=24, batch=number)[0]
    ]
    seen = Counter((example.task, example.id) for example in found)
    assert set(seen.values()) == {1}
    assert len(seen) == 2 * (48 + 24)


def test_seqio_gives_the_tasks_the_same_turns_and_objectives(records_dir):
    """So T5X trains the same mixture."""
    registry.configure(toy.options(records_dir, rates={"toy": 3, "twin": 1}))
    assert registry.task_name(dataset=("toy", "twin"), kind="step_by_step") == BOTH
    dataset = seqio.get_mixture_or_task(BOTH).get_dataset(
        {**toy.DATASET.feature_lengths, "task_ids": 16}, split="train", shuffle=True, seed=0, num_epochs=None
    )
    theirs = [int(row["task_ids"][0]) for row in itertools.islice(dataset.as_numpy_iterator(), 24)]
    examples, _ = batches.batch_examples(
        BOTH, lengths=toy.DATASET.feature_lengths, split="train", batch_size=24, pack=False, seed=0, batch=0
    )
    names = task_names.subtasks(BOTH)
    assert theirs == [task_names.task_ids(BOTH)[names.index(example.task)] for example in examples]


def test_prefixes_can_name_the_dataset(records_dir):
    registry.configure(toy.options(records_dir, dataset_prefix="{dataset}, ", rationale_prefix="why: "))
    assert registry.examples("twin_label", "train")[0].inputs.startswith("twin, predict: a")
    assert registry.examples("toy_rationale", "train")[0].inputs.startswith("toy, why: a")


# ------------------------------------------------------------------------------- the whole path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, records_dir: Path):
    options = toy.options(records_dir, dataset_prefix="{dataset} ")
    registry.configure(options)
    config = toy.config(
        tmp_path_factory.mktemp("runs") / "both", records_dir, data=options, mixture_or_task_name=BOTH, batch_size=16,
        task_feature_lengths={"inputs": 24, "targets": 16},
    )  # fmt: skip
    return config, loop.train(config, config_text="")


def test_each_dataset_is_graded_and_their_mean_is_the_score(trained):
    config, result = trained
    for kind in ("validation", "test"):
        line = result[kind]
        assert line["score"] == pytest.approx((line["toy/accuracy"] + line["twin/accuracy"]) / 2)
    assert {"loss/toy/label", "loss/toy/rationale", "loss/twin/label", "loss/twin/rationale"} <= set(result["train"])
    assert result["train"]["tokens/twin/rationale"] > 0
    assert directory.read_scores(config.model_dir)[6] == result["validation"]["score"]
    step = result["test"]["step"]
    names = {f"{name}_label-test-{step}.jsonl" for name in ("toy", "twin")}
    assert names <= {path.name for path in Path(config.model_dir, "predictions").iterdir()}


def test_a_run_of_two_datasets_resumes_unchanged(trained, tmp_path):
    config, result = trained
    assert loop.train(config, config_text="") == result
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, rates={"toy": 1, "twin": 2}))
    with pytest.raises(FileExistsError, match=r"data.options.rates.twin = 2\nRepeat"):
        loop.train(changed, config_text="")


def test_the_manifest_can_be_read_as_that_of_one_dataset(trained):
    config, _ = trained
    whole = manifest.read(config.model_dir)
    assert manifest.parts(whole) == {"toy": "toy_step_by_step", "twin": "twin_step_by_step"}
    one = manifest.of_part(whole, "twin")
    assert one["run"]["mixture_or_task_name"] == "twin_step_by_step"
    assert one["data"]["splits"]["train"]["counts"]["rows"] == 24
    assert one["data"]["options"]["label_prefix"] == "twin predict: "
    with pytest.raises(ValueError, match=r"trained on toy, twin, not on 'twins'.*Did you mean 'twin'"):
        manifest.of_part(whole, "twins")


def test_evaluate_grades_both_and_predict_answers_for_one(trained, tmp_path, capsys):
    config, result = trained
    assert main.main(["evaluate", config.model_dir, "--split", "test", "--batch_size", "8"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["score"] == pytest.approx(result["test"]["score"])
    assert printed["twin/rows"] == 8
    asked = tmp_path / "in.jsonl"
    step = result["test"]["step"]
    graded = Path(config.model_dir, "predictions", f"twin_label-test-{step}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in graded]
    asked.write_text(
        "".join(
            json.dumps({"id": row["id"], "input": row["input"].removeprefix("twin predict: ")}) + "\n" for row in rows
        )
    )
    flags = ["predict", config.model_dir, "--input", str(asked), "--batch_size", "8"]
    flags += ["--output", str(tmp_path / "out.jsonl")]
    assert main.main(flags) == 1
    assert "trained on toy, twin; choose the one to answer for by --dataset" in capsys.readouterr().err
    assert main.main([*flags, "--dataset", "twin"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in answers] == [row["prediction"] for row in rows]
    assert main.main([*flags[:-1], str(tmp_path / "other.jsonl"), "--dataset", "twins"]) == 1
    assert "Did you mean 'twin'" in capsys.readouterr().err


def test_a_report_has_the_run_under_each_dataset(trained):
    config, result = trained
    found = folders.find([config.model_dir]).runs
    assert [(run.dataset, run.method) for run in found] == [
        ("toy", "step-by-step (2 datasets)"),
        ("twin", "step-by-step (2 datasets)"),
    ]
    read = results.load(found[1])
    assert read.accuracy == pytest.approx(result["test"]["twin/accuracy"])
    assert read.curve("validation", "accuracy")[-1] == (6, result["validation"]["twin/accuracy"])
    assert read.curve("train", "loss/label")[-1][1] == result["train"]["loss/twin/label"]
    assert [summary.dataset for summary in study.study(found).summaries] == ["toy", "twin"]


def test_gradients_of_a_mixture_do_not_depend_on_devices_or_micro_batches(records_dir, tmp_path):
    """Nor do the metrics of its objectives, to rounding."""
    lines = []
    for name, micro_batches, count in (("one", 1, 1), ("split", 2, 4)):
        config = toy.config(
            tmp_path / name, records_dir, mixture_or_task_name=BOTH, batch_size=16, micro_batches=micro_batches,
            model=dataclasses.replace(toy.MODEL, dropout_rate=0.0), train_steps=1, log_period=1, pack=True,
            task_feature_lengths={"inputs": 48, "targets": 32}, evaluate_test=False,
        )  # fmt: skip
        programs = loop.Programs.of(config)
        assert len(jax.devices()) >= count
        found = loop.train(config, config_text="", programs=programs)["train"]
        lines.append(unmeasured(found))
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
